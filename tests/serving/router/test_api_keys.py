"""Users' API keys: read from the operator's file, and needed on every route but the health checks."""

import json
import logging
from pathlib import Path

import pytest

from serving.router.api_keys import ApiKeys
from serving.router.router import GENERATING, OPEN, Router
from serving.run_dir import RouterSettings
from tests.toys.serving.router import ADMIN, CHAT, KEY, TABLE, VOCAB, Inner, send
from umbel import secret_file
from umbel.errors import ConfigError

KEYS = ("sk-" + "a" * 40, "sk-" + "b" * 40)
WITH_KEYS = [("POST", CHAT), ("POST", "/v1/completions"), ("POST", "/v1/responses"), ("POST", "/v1/messages"),
             ("GET", "/v1/models"), ("GET", "/v1/models/tiny"), ("GET", "/metrics")]  # fmt: skip


@pytest.fixture
def locked(inner: Inner, tmp_path: Path) -> Router:
    TABLE.write(tmp_path / "aliases.json")
    return Router(inner, tmp_path / "aliases.json", KEY, VOCAB, ApiKeys(KEYS))


@pytest.mark.parametrize(("method", "path"), [*WITH_KEYS, ("POST", "/generate"), ("GET", "/nothing")])
@pytest.mark.parametrize(
    "headers",
    [[], [(b"authorization", b"Bearer ")], [(b"authorization", b"Bearer " + KEYS[0][:-1].encode())],
     [(b"authorization", b"Basic " + KEYS[0].encode())], [(b"authorization", KEYS[0].encode())],
     [(b"x-api-key", b"")], [(b"x-api-key", b"\xff")], [(b"x-api-key", (KEYS[0] + KEYS[1]).encode())],
     [(b"x-api-key", b"Bearer " + KEYS[0].encode())]],
)  # fmt: skip
def test_without_a_key_nothing_but_health_answers(
    locked: Router, inner: Inner, method: str, path: str, headers: list[tuple[bytes, bytes]]
) -> None:
    status, body, _ = send(locked, (method, path, headers, [b'{"model": "tiny"}']))
    error = json.loads(body)["error"]
    assert status == 401
    if path == "/v1/messages":  # Anthropic's form
        assert error["type"] == "authentication_error"
    else:
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
    assert "x-api-key: KEY" in error["message"]
    assert inner.paths == []
    for open_path in sorted(OPEN):
        assert send(locked, ("GET", open_path, [], [b""]))[0] == 200


@pytest.mark.parametrize(("method", "path"), WITH_KEYS)
@pytest.mark.parametrize(
    "header",
    [(b"authorization", b"Bearer " + KEYS[1].encode()), (b"authorization", b"bearer  " + KEYS[0].encode()),
     (b"x-api-key", KEYS[0].encode())],
)  # fmt: skip
def test_each_key_opens_the_users_routes_and_goes_no_further(
    locked: Router, inner: Inner, method: str, path: str, header: tuple[bytes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    assert send(locked, (method, path, [header], [b'{"model": "tiny"}']))[0] == 200
    assert send(locked, ("POST", "/generate", [header], [b"{}"]))[0] == 404
    if path in GENERATING:
        assert inner.headers[b"authorization"] == ADMIN["authorization"].encode()
    assert not any(key.encode() in value for key in KEYS for value in inner.headers.values())
    assert not any(key in caplog.text for key in KEYS)


def test_the_daemon_needs_no_users_key(locked: Router) -> None:
    admin = [(b"authorization", ADMIN["authorization"].encode())]
    assert send(locked, ("POST", "/umbel/aliases", admin, [b""]))[0] == 200
    assert send(locked, ("POST", "/load_lora_adapter", admin, [b"{}"]))[0] == 200


def test_a_file_of_keys_has_comments_and_one_owner(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# eva\n{KEYS[0]}\n\n  {KEYS[1]}  \n")
    file.chmod(0o600)
    assert secret_file.read_keys(file) == KEYS
    for mode in (0o640, 0o604, 0o660):
        file.chmod(mode)
        with pytest.raises(ConfigError, match=f"others can read the API keys; chmod 600 {file}"):
            ApiKeys.read(RouterSettings(api_keys=file))


@pytest.mark.parametrize(
    ("content", "says"),
    [("", "holds no API key; write one per line"), ("# only this\n", "holds no API key"),
     ("tiny-key\n", r"line 1: shorter than 16 characters.*openssl rand"),
     (f"{KEYS[0]}\ntwo words of a key\n", "line 2: not an API key"), ("schlüssel-schlüssel", "line 1: not an API key")],
)  # fmt: skip
def test_a_file_that_holds_no_keys_says_what_to_do_and_no_key(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    file.chmod(0o600)
    with pytest.raises(ConfigError, match=says) as error:
        ApiKeys.read(RouterSettings(api_keys=file))
    assert not any(line and line in str(error.value) for line in content.splitlines())
    with pytest.raises(ConfigError, match="none: the API keys cannot be read"):
        ApiKeys.read(RouterSettings(adapter_keys={"support": tmp_path / "none"}))
