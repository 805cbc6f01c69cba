"""The demo's users: a stream that ends too early is a failure, and latencies are told apart by training."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from scripts.tools.demo.users import Answer, Users


class Engine(BaseHTTPRequestHandler):
    """Streams two tokens, then ends as `finish` says."""

    finish = True

    def do_POST(self) -> object:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if not asked.get("stream"):
            return self._answer_whole(asked)
        assert asked["model"] == "support"
        self.send_response(200)
        self.send_header("content-type", "text/event-stream")
        self.send_header("x-umbel-adapter", "support@v3")
        self.end_headers()
        for content in ("a", "b"):
            self._chunk({"delta": {"role": "assistant", "content": content}, "index": 0, "finish_reason": None})
        if self.finish:
            self._chunk({"delta": {}, "index": 0, "finish_reason": "stop"})
        return self.wfile.write(b"data: [DONE]\n\n")

    def _answer_whole(self, asked: dict[str, Any]) -> None:
        content = f" {asked['model']} at {asked['temperature']} on {asked['messages'][0]['content']}\n"
        choice = {"message": {"role": "assistant", "content": content}, "index": 0, "finish_reason": "stop"}
        body = {"id": "1", "object": "chat.completion", "created": 1, "model": "support", "choices": [choice]}
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("x-umbel-adapter", "support@v3")
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None: ...

    def _chunk(self, choice: dict[str, object]) -> None:
        body = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "support", "choices": [choice]}
        self.wfile.write(f"data: {json.dumps(body)}\n\n".encode())


@pytest.fixture
def url() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Engine)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("finish", [True, False])
def test_an_answer_counts_when_its_stream_ends(url: str, finish: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "finish", finish)
    answered = threading.Event()

    def training() -> bool:
        if users.answers or users.failures:
            answered.set()
        return True

    users = Users(url, "support", ["x"], training, seed=0)
    users.start()
    assert answered.wait(30)
    users.stop()
    found = users.summary()
    assert found["requests"] == len(users.answers) + len(users.failures)
    if finish:
        assert (found["failed"], found["answers_by_version"]) == (0, {"support@v3": len(users.answers)})
        assert found["with_training"]["answers"] == len(users.answers)
    else:
        assert found["failed"] == found["requests"]
        assert found["failures"][0] == "RuntimeError: the stream ended before its answer did"


def test_a_question_asked_once_is_answered_greedily_and_counted_without_a_time(url: str) -> None:
    users = Users(url, "support", [], lambda: False, seed=0)
    assert users.ask_once("smollm2", "why?") == ("smollm2 at 0.0 on why?", "support@v3")
    found = users.summary()
    assert (found["requests"], found["failed"], found["answers_by_version"]) == (1, 0, {})
    assert found["without_training"] == found["with_training"] == {"answers": 0}


def test_latencies_are_in_milliseconds_and_apart_by_training() -> None:
    users = Users("http://nobody", "support", ["x"], lambda: False, seed=0)
    users.answers = [Answer("base", False, ms / 1000, 0.0) for ms in range(1, 100)]
    users.answers.append(Answer("support@v1", True, 0.1, 0.02))
    found = users.summary()
    assert found["answers_by_version"] == {"base": 99, "support@v1": 1}
    assert found["without_training"] == {"answers": 99, "ttft_ms_p50": 50.0, "ttft_ms_p95": 95.0}
    assert found["with_training"] == {"answers": 1}, "one answer has no quantiles"
