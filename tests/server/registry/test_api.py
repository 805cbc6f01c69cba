"""The registry over HTTP: answers like the command line's, free to read, no change without the token."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest
from fastapi.testclient import TestClient

from server.registry import views as registry_views
from server.registry.api import read_token, registry_api
from tests.toys.command_line import refusal
from tests.toys.registry import begun, blob, grow
from tests.toys.schema import answers
from umbel.adapter import AdapterRef
from umbel.errors import ConfigError

TOKEN = "a token of at least sixteen characters"
BEARER = {"authorization": f"Bearer {TOKEN}"}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    registry = begun(tmp_path / "r")
    grow(registry, "aaro")
    registry.close()
    return tmp_path / "r"


def test_reading_needs_no_token_and_says_what_the_command_line_says(root: Path) -> None:
    registry = begun(root)
    with TestClient(registry_api(root, TOKEN)) as client:
        assert client.get("/adapter/ls").json() == registry_views.ls(registry)
        shown = client.get("/adapter/show/support@live").json()
        assert shown == registry_views.show(registry, "support@v2")
        assert client.get("/adapter/diff/support@v1/support@v2").json()["fields"]["version"] == [1, 2]
        assert [move["to"] for move in client.get("/adapter/alias/support").json()][-1] == {"head": 2, "live": 2}
        assert client.get("/adapter/lineage/support").text.count("support@v") == 5
        assert client.get("/adapter/verify").json() == {"versions": 5, "damages": []}
        assert client.get("/adapter/verify/support@v1").json() == {"versions": 1, "damages": []}
        assert client.get("/adapter/gc").json()["versions"] == ["support@v3"]
        content = io.BytesIO(client.get("/adapter/export/support@live").content)
    with tarfile.open(fileobj=content) as archive:
        assert sorted(archive.getnames())[1:] == [
            f"support-v2/{name}"
            for name in ("README.md", "SHA256SUMS", "adapter_config.json", "adapter_model.safetensors", "manifest.json")
        ]
        assert archive.extractfile("support-v2/adapter_model.safetensors").read() == blob(2)
    assert registry.moves("support")[-1].to == {"head": 2, "live": 2}


CHANGES = [
    ("/adapter/alias/support@v1", {"alias": "stable", "why": "audit"}),
    ("/adapter/rollback/support", {"why": "worse"}),
    ("/adapter/gc", {"why": "full"}),
]


@pytest.mark.parametrize(("path", "body"), CHANGES)
@pytest.mark.parametrize("token", [None, TOKEN])
@pytest.mark.parametrize(
    "header", [{}, {"authorization": "Bearer no"}, {"authorization": TOKEN}, {"authorization": "Bearer "}]
)
def test_a_change_without_the_token_is_refused_and_changes_nothing(
    root: Path, path: str, body: dict[str, str], token: str | None, header: dict[str, str]
) -> None:
    before = sorted((file, file.stat().st_size) for file in root.rglob("*") if "sqlite" not in file.name)
    with TestClient(registry_api(root, token)) as client:
        reply = client.post(path, json=body, headers=header)
        assert reply.status_code == 401
        assert reply.json()["error"]["type"] == "Unauthorized"
    assert sorted((file, file.stat().st_size) for file in root.rglob("*") if "sqlite" not in file.name) == before


def test_a_server_without_a_token_refuses_every_token(root: Path) -> None:
    with TestClient(registry_api(root)) as client:
        reply = client.post("/adapter/rollback/support", json={"why": "x"}, headers=BEARER)
        assert reply.status_code == 401
        assert "start it with --token-file" in reply.json()["error"]["message"]


def test_the_holder_of_the_token_moves_aliases_rolls_back_and_removes(root: Path) -> None:
    with TestClient(registry_api(root, TOKEN), headers=BEARER) as client:
        assert [client.post(path, json={**body, "who": "eva"}).status_code for path, body in CHANGES] == [200] * 3
    registry = begun(root)
    assert registry.aliases("support") == dict.fromkeys(("head", "live", "stable"), AdapterRef("support", 1))
    assert registry.moves("support")[-1].who == "eva from testclient"
    assert [row["pruned"] for row in registry_views.ls(registry)] == [False, False, False, True, False]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/adapter/alias/support@v9", {"alias": "stable", "why": "x"}, 404),
        ("/adapter/alias/support@v1", {"alias": "shadow", "why": "x"}, 422),
        ("/adapter/alias/support@v1", {"alias": "stable", "why": ""}, 422),
        ("/adapter/alias/support@v1", {"alias": "stable", "reason": "x"}, 422),
        ("/adapter/rollback/other", {"why": "x"}, 404),
    ],
)
def test_a_change_that_cannot_be_made_says_why(root: Path, path: str, body: dict[str, str], status: int) -> None:
    with TestClient(registry_api(root, TOKEN), headers=BEARER) as client:
        assert client.post(path, json=body).status_code == status
        assert client.get("/adapter/show/support@v9").status_code == 404


def test_a_token_file_that_others_read_or_that_can_be_guessed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n")
    path.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        read_token(path)
    path.chmod(0o600)
    assert read_token(path) == TOKEN
    path.write_text("short")
    with pytest.raises(ConfigError, match="too short"):
        read_token(path)


@pytest.mark.parametrize("kind", ["application/json", None])
def test_a_body_is_json_also_without_a_content_type(root: Path, kind: str | None) -> None:
    headers = {**BEARER, **({"content-type": kind} if kind else {})}
    with TestClient(registry_api(root, TOKEN), headers=headers) as client:
        reply = client.post("/adapter/alias/support@v1", content=b'{"alias": "stable", "why": "audit"}')
        assert reply.json() == {"stable": "support@v1"}


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "kind", "says"),
    [
        ("POST", "/adapter/gc", "{", 422, "WireError", "body.1: JSON decode error"),
        ("POST", "/adapter/gc", "", 422, "WireError", "body: Field required"),
        ("POST", "/adapter/gc", '{"why": "x", "reason": 1}', 422, "WireError", "body.reason: Extra inputs are not"),
        ("GET", "/adapter/gc?drop_ancestors=perhaps", "", 422, "WireError", "query.drop_ancestors: Input should be"),
        ("GET", "/adapter/nothing", "", 404, "NotFound", "GET /adapter/nothing: Not Found"),
        ("DELETE", "/adapter/ls", "", 405, "MethodNotAllowed", "DELETE /adapter/ls: Method Not Allowed"),
        ("GET", "/adapter/show/support@v9", "", 404, "NotFound", "'support@v9' is not in"),
    ],
)
def test_every_error_has_one_shape(
    root: Path, method: str, path: str, body: str, status: int, kind: str, says: str
) -> None:
    with TestClient(registry_api(root, TOKEN), headers=BEARER) as client:
        reply = client.request(method, path, content=body)
    assert reply.status_code == status
    assert reply.json()["error"]["type"] == kind
    assert reply.json()["error"]["message"].startswith(says)


def test_a_port_that_is_taken_is_said_in_one_line(root: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = refusal("registry", "serve", "--registry", root, "--port", port)
    assert said.startswith(f"127.0.0.1:{port} cannot be listened on (Address already in use); stop what listens there")


def test_a_token_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none: the token cannot be read \(No such file or directory\); name a file"):
        read_token(tmp_path / "none")


def test_it_is_served_by_the_command(root: Path) -> None:
    command = [sys.executable, "-m", "umbel.cli", "registry", "serve", "--registry", str(root), "--port", "0"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "UMBEL_LOG": "text"})
    try:
        assert server.stderr is not None
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+", line)))
        assert len(httpx.get(f"{address}/adapter/ls").json()) == 5
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate()


def test_no_request_is_answered_with_a_server_error(tmp_path: Path) -> None:
    registry = begun(tmp_path / "r")
    grow(registry, "aaro")
    registry.close()
    asked = answers(registry_api(tmp_path / "r", TOKEN), [{}, BEARER])
    assert len(asked) == 13, "every route"
    registry = begun(tmp_path / "r")
    assert str(registry.resolve("support@live")) == "support@v2"
    registry.close()
