"""A real site whose users need keys, under requests that SGLang itself has to refuse or bear; it goes on serving."""

import contextlib
import json
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from scripts.tools.trial_site import random_adapter
from serving.router.bodies import MAX_BODY_BYTES
from tests.toys.hostile.catalogue import Hostile
from tests.toys.hostile.requests import CHAT, USERS
from tests.toys.sites.site_process import SiteProcess

pytestmark = pytest.mark.e2e

API_KEY = "sk-" + "e2e" * 12
HEADERS = {"authorization": f"Bearer {API_KEY}"}
BEARER = (b"authorization", HEADERS["authorization"].encode())
SENT_WHOLE = {"9 MiB", "chunks without an end", "a length of a petabyte"}
"""The server closes such a connection while the client still sends."""
PRIVATE, ASKED = "qzx7419", "jvk2853"
"""A word that only the site's training data have, and one that only a user's prompt has."""


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    data = "\n".join(json.dumps({"prompt": f"{PRIVATE} {i}", "completion": f"room {i % 13}"}) for i in range(40))
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder, pytest.MonkeyPatch.context() as environment:
        keys = Path(folder) / "users.keys"
        keys.write_text(f"# for this test\n{API_KEY}\n")
        keys.chmod(0o600)
        environment.setenv("UMBEL_SITE__ENGINE__API_KEYS", str(keys))
        environment.setenv("UMBEL_SITE__ADAPTER", json.dumps([{"name": "support", "api_keys": str(keys)}]))
        environment.setenv("UMBEL_SITE__ENGINE__EXTRA_ARGS__ENABLE_CACHE_REPORT", "true")  # only to test it
        with SiteProcess(Path(folder) / "site", tiny_llama, data=data) as site:
            yield site


def ask(site: SiteProcess, path: str = CHAT, **fields: Any) -> httpx.Response:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "ward 3"}], "max_tokens": 4, **fields}
    return site.users.post(path, json=body, headers=HEADERS, timeout=120)


def still_serves(site: SiteProcess) -> None:
    reply = ask(site)
    assert (reply.status_code, reply.headers["x-umbel-adapter"]) == (200, "base"), reply.text
    assert site.status()["engine"]["starts"] == 1, "it was never started anew"


def test_without_a_key_only_health_answers(site: SiteProcess) -> None:
    for method, path in (("POST", CHAT), ("GET", "/v1/models"), ("GET", "/metrics"), ("POST", "/generate")):
        reply = site.users.request(method, path, json={"model": "tiny"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (401, "invalid_api_key"), path
    assert site.users.get("/health").status_code == 200
    assert site.users.get("/ready").status_code == 200
    assert site.users.get("/v1/models", headers={"x-api-key": API_KEY}).status_code == 200
    still_serves(site)
    for log in (site.log, site.folder / "state" / "engine.log"):
        assert API_KEY not in log.read_text()
    assert all(API_KEY not in " ".join(process.cmdline()) for process in site.family())


@pytest.mark.parametrize("one", [one for one in USERS if one.what not in SENT_WHOLE], ids=lambda one: one.what)
def test_the_catalogue_over_the_wire(site: SiteProcess, one: Hostile) -> None:
    method, path, headers, chunks = one.make()
    named = [(name, value) for name, value in headers if name != b"authorization"]
    sent = [*named, BEARER]
    with httpx.Client(base_url=site.url, timeout=120) as client:
        reply = client.request(method, httpx.URL(site.url + path), headers=sent, content=b"".join(chunks))
    assert str(reply.status_code) == one.answer, reply.text[:500]
    assert re.search(one.says, reply.json()["error"]["message"]), reply.text[:500]
    still_serves(site)


BOMBS: dict[str, dict[str, Any]] = {
    "min_tokens above max_tokens": {"min_tokens": 10**6},
    "the most that can be asked for": {"n": 128, "max_tokens": 1 << 24, "top_k": 1 << 20, "seed": -(2**63) + 1},
    "every penalty at its end": {
        "temperature": 2, "top_p": 1e-9, "min_p": 1, "repetition_penalty": 0.01, "frequency_penalty": -2,
        "presence_penalty": -2, "logit_bias": {"3": -100, "4": 100}, "stop_token_ids": [0], "min_tokens": 3,
    },
    "a prompt over the context": {"messages": [{"role": "user", "content": "ward " * 100_000}]},
    "no messages": {"messages": []},
    "a template argument that the template does not know": {"chat_template_kwargs": {"thinking": True}},
    "a schema at all its bounds": {
        "response_format": {
            "type": "json_schema",
            "json_schema": {
                "name": "x",
                "schema": {
                    "type": "object",
                    "properties": {f"p{i}": {"type": "string"} for i in range(127)} | {"l": {"maxLength": 256}},
                },
            },
        }
    },
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_what_only_sglang_can_judge_does_not_end_it(site: SiteProcess, bomb: str) -> None:
    reply = ask(site, **BOMBS[bomb])
    print(bomb, reply.status_code, reply.text[:200])
    assert reply.status_code < 500, reply.text[:500]
    still_serves(site)


@pytest.mark.parametrize(
    "head",
    ["content-length: 5\r\ncontent-length: 7\r\n", "content-length: 5\r\ntransfer-encoding: chunked\r\n",
     "content-length: -1\r\n", "x-umbel-adapter: a\r\n\tb\0\r\n", f"x: {'y' * (1 << 20)}\r\n"],
    ids=["two lengths", "a length and chunks", "a negative length", "a null byte", "a header of a megabyte"],
)  # fmt: skip
def test_a_head_that_is_ambiguous_is_not_served(site: SiteProcess, head: str) -> None:
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        said = b""
        with contextlib.suppress(ConnectionError):  # it may hang up before all of it is sent
            connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{head}\r\n".encode() + b"{}...")
            with contextlib.suppress(OSError):  # ENOTCONN, where it has
                connection.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: connection.recv(4096), b""))
    assert said == b"" or said.split(b" ")[1] in (b"400", b"401", b"431"), said[:200]
    still_serves(site)


def test_no_websocket_is_opened(site: SiteProcess) -> None:
    upgrade = "upgrade: websocket\r\nconnection: Upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: eA==\r\n"
    with socket.create_connection(("127.0.0.1", site.port), timeout=60) as connection:
        connection.sendall(f"GET /v1/realtime HTTP/1.1\r\nhost: x\r\n{upgrade}\r\n".encode())
        connection.shutdown(socket.SHUT_WR)
        said = connection.recv(4096)
    assert b" 101 " not in said
    still_serves(site)


def cached(site: SiteProcess, model: str, version: str, **fields: Any) -> int:
    """Ask for a prompt that no other test begins as; return how many of its 64 tokens came from the KV cache."""
    body = {"model": model, "prompt": list(range(300, 364)), "max_tokens": 1, **fields}
    reply = site.users.post("/v1/completions", json=body, headers=HEADERS)
    assert (reply.status_code, reply.headers["x-umbel-adapter"]) == (200, version), reply.text
    return int(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])


def test_what_the_base_was_asked_for_an_adapter_with_keys_is_in_no_other_ones_cache(site: SiteProcess) -> None:
    """Not for `tiny`, which other keys of a site may ask, too."""
    asked = {"prompt": list(range(364, 428))}
    assert [cached(site, model, "base", **asked) for model in ("support", "tiny")] == [0, 0]
    assert [cached(site, model, "base", **asked) for model in ("support", "tiny")] == [63, 63], "each has its own"


def test_no_version_is_answered_from_the_cache_of_another(site: SiteProcess) -> None:
    versions = {"tiny": "base"}
    for number in (1, 2):
        ref = str(site.deploy(number, random_adapter(site.model, seed=number)))
        versions[ref] = ref
    first = [cached(site, *named) for named in versions.items()]
    assert first == [0, 0, 0], "each computes it for itself"
    again = [cached(site, *named) for named in versions.items()]
    assert again == [63, 63, 63], "and has it then: so the zeros above mean something"
    assert cached(site, "support", "support@v2") == 63, "the same version by another name"
    salted = {ref: [cached(site, ref, version, cache_salt="s") for _ in range(2)] for ref, version in versions.items()}
    assert salted == {ref: [0, 63] for ref in versions}, "a salt of one's own parts it further, and joins nothing"
    still_serves(site)


def test_nothing_of_users_or_of_the_training_data_is_written_down_or_told(site: SiteProcess) -> None:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": ASKED}], "max_tokens": 48, "ignore_eos": True}
    answers = [ask(site, content=ASKED), ask(site, **asked)]
    assert [reply.status_code for reply in answers] == [400, 200], "one is refused, one is answered"
    said = answers[1].json()["choices"][0]["message"]["content"]
    assert site.submit("r1", random_adapter(site.model, seed=7, b_std=0.0)).status_code == 200
    report = site.wait_round("r1")
    assert report["state"] == "done", report
    ref = site.deploy(9, random_adapter(site.model, seed=9))
    told = [
        json.dumps([site.status(), report, site.wait_judged(ref)]),
        site.users.get("/metrics", headers=HEADERS).text,
    ]
    state = site.folder / "state"
    written = {path: path.read_bytes() for path in [site.log, *state.rglob("*")] if path.is_file()}
    assert {state / "engine.log", state / "journal.sqlite3", site.log} <= written.keys()
    for secret in (PRIVATE, ASKED, API_KEY, said):
        assert len(secret) > 6, secret
        assert not [path for path, content in written.items() if secret.encode() in content], secret
        assert not any(secret in text for text in told), secret
    assert any(path.is_relative_to(state / "data") for path in written), "the tokens, for this user only"
    assert {oct(path.stat().st_mode & 0o077) for path in [state, *(state / "data").rglob("*")]} == {"0o0"}
    still_serves(site)


def test_nothing_of_a_site_listens_beyond_its_machine_nor_a_socket_beyond_its_user(site: SiteProcess) -> None:
    assert site.process is not None
    processes = [psutil.Process(site.process.pid), *site.family()]
    ports = [one for process in processes for one in process.net_connections("inet") if one.status == "LISTEN"]
    assert site.port in {one.laddr.port for one in ports}
    assert {one.laddr.ip for one in ports} <= {"127.0.0.1", "::1"}, ports
    paths = {Path(one.laddr) for process in processes for one in process.net_connections("unix") if one.laddr}
    assert {site.state_dir / "site.sock", site.state_dir / "operator.sock"} <= paths
    assert len(paths) > 4, "and those of SGLang's processes, which read pickles from them"
    assert {path: oct(path.stat().st_mode & 0o077) for path in paths} == dict.fromkeys(paths, "0o0")


def dense(field: str, item: str) -> bytes:
    """Return a chat of almost as many bytes as are read, of which one field is a list of the same item."""
    chat = {"model": "tiny", "max_tokens": 1, "messages": [{"role": "user", "content": "ward 3"}]}
    head = json.dumps({name: value for name, value in chat.items() if name != field})[:-1] + f', "{field}": ['
    return f"{head}{','.join([item] * ((MAX_BODY_BYTES - len(head) - 2) // (len(item) + 1)))}]}}".encode()


def long(text: str) -> bytes:
    """Return a chat of almost as many bytes as are read, whose one message repeats a text."""
    return dense("messages", json.dumps({"role": "user", "content": text * ((MAX_BODY_BYTES - 1000) // len(text))}))


SHAPES = {
    "empty lists, in a field without effect": lambda: dense("metadata", "[]"),
    "empty objects, in a field that is unknown": lambda: dense("x", "{}"),
    "messages of nothing": lambda: dense("messages", '{"role":"user","content":""}'),
    "numbers": lambda: dense("stop_token_ids", "1"),
    "objects of a thousand keys": lambda: dense("tools", json.dumps({str(key): 0 for key in range(1000)})),
    "escaped letters": lambda: dense("stop", r'"\u0061\u0061\u0061\u0061"'),
    "one text of many words": lambda: long("ab "),
    "one word": lambda: long("a"),
    "nested as deep as JSON is read": lambda: b'{"model": "tiny", "metadata": ' + b"[" * 900 + b"]" * 900 + b"}",
}
MOST_GROWN = 320 * MAX_BODY_BYTES
"""Bytes by which one body may make SGLang's HTTP process larger: a text's tokens take 200 times as much at first."""


@pytest.mark.parametrize("shape", SHAPES)
def test_no_shape_of_a_body_hangs_the_engine_or_fills_its_memory(site: SiteProcess, shape: str) -> None:
    http, body = site.engine_process(), SHAPES[shape]()
    assert len(body) <= MAX_BODY_BYTES
    before = peak(http)
    reply = site.users.post(CHAT, content=body, headers={**HEADERS, "content-type": "application/json"}, timeout=300)
    grown = peak(http) - before
    print(shape, len(body), reply.status_code, f"{grown >> 20} MiB", reply.text[:200])
    assert reply.status_code in (200, 400), reply.text[:500]
    assert grown <= MOST_GROWN
    assert "engine.hung" not in site.log.read_text()
    still_serves(site)


def peak(process: psutil.Process) -> int:
    """Return the most memory that a process ever had, in bytes."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10
