"""Errors over HTTP: one shape for refusals, malformed requests, unknown routes and faults of the server."""

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from pydantic import BaseModel

from umbel import http_errors
from umbel.errors import AdapterError, Conflict, EngineError, EngineGone, NotFound

RAISED = {
    "conflict": Conflict("taken"),
    "gone": EngineGone("away"),
    "other": AdapterError("bad"),
    "fault": KeyError("x"),
}


class Body(BaseModel):
    number: int


@pytest.fixture
def client() -> TestClient:
    api = FastAPI()

    @api.get("/raise/{name}")
    def fail(name: str) -> None:
        raise RAISED[name]

    @api.post("/body")
    def body(body: Body) -> int:
        return body.number

    @api.get("/long")
    def long() -> None:
        raise NotFound("\ud800" + "x" * 5000)

    http_errors.shape(api, {NotFound: 404, Conflict: 409, EngineError: 503}, lambda: "clinic-a: ")
    return TestClient(api, raise_server_exceptions=False)


@pytest.mark.parametrize(
    ("path", "status", "kind", "message"),
    [
        ("/raise/conflict", 409, "Conflict", "clinic-a: taken"),
        ("/raise/gone", 503, "EngineGone", "clinic-a: away"),
        ("/raise/other", 422, "AdapterError", "clinic-a: bad"),
        ("/raise/fault", 500, "KeyError", "GET /raise/fault failed; the log here says why"),
        ("/none", 404, "NotFound", "GET /none: Not Found"),
        ("/body", 405, "MethodNotAllowed", "GET /body: Method Not Allowed"),
    ],
)
def test_every_error_has_one_shape(client: TestClient, path: str, status: int, kind: str, message: str) -> None:
    reply = client.get(path)
    assert (reply.status_code, reply.json()) == (status, {"error": {"type": kind, "message": message}})


def test_a_body_that_is_wrong_names_the_field(client: TestClient) -> None:
    reply = client.post("/body", json={"number": "many"})
    assert reply.status_code == 422
    assert reply.json()["error"]["type"] == "WireError"
    assert reply.json()["error"]["message"].startswith("body.number: ")


def test_a_message_is_short_and_utf8(client: TestClient) -> None:
    message = client.get("/long").json()["error"]["message"]
    assert message.startswith("clinic-a: ?xxx")
    assert len(message) == http_errors.LONGEST
