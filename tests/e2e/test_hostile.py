"""A real site whose users need keys, under requests that SGLang itself has to refuse or bear; it goes on serving."""

import contextlib
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.toys.hostile.catalogue import Hostile
from tests.toys.hostile.requests import CHAT, USERS
from tests.toys.sites.site_process import SiteProcess

pytestmark = pytest.mark.e2e

API_KEY = "sk-" + "e2e" * 12
HEADERS = {"authorization": f"Bearer {API_KEY}"}
BEARER = (b"authorization", HEADERS["authorization"].encode())
SENT_WHOLE = {"65 MiB", "chunks without an end"}
"""The server closes such a connection while the client still sends."""


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        keys = Path(folder) / "users.keys"
        keys.write_text(f"# for this test\n{API_KEY}\n")
        keys.chmod(0o600)
        os.environ["UMBEL_SITE__ENGINE__API_KEYS"] = str(keys)
        try:
            with SiteProcess(Path(folder) / "site", tiny_llama) as site:
                yield site
        finally:
            del os.environ["UMBEL_SITE__ENGINE__API_KEYS"]


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
