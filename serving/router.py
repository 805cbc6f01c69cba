"""Alias → version, inside SGLang's HTTP process: every request is pinned to one version and keeps it to its last token.

The middleware never rewrites `model`, as SGLang's endpoints each read it differently. It resolves the alias, pins the
version in a context variable, and one hook on `TokenizerManager.generate_request` applies the pin for every endpoint.
It also is the wall around the engine: routes that users need answer, all others are 404 without the admin key.
"""

import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.aliases import AliasTable
from serving.keys import ApiKeys
from serving.limits import refusal
from umbel.errors import NotFound

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
ASGIApp = Callable[[Scope, Receive, Send], Awaitable[None]]

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Routes that answer users with tokens."""
OPEN = frozenset({"/health", "/health_generate", "/ready"})
"""Routes that answer GET for anybody; those of users need a key, where there are keys."""
MAX_BODY_BYTES = 64 << 20
BASE_LABEL = "base"
UNAUTHORIZED = "An API key of this site is needed: 'Authorization: Bearer KEY', or 'x-api-key: KEY'."
CLASSES = {"interactive": 0, "batch": -1}
"""What a request may carry as `priority`, besides SGLang's numbers: whether somebody waits for it."""

logger = logging.getLogger(__name__)


@dataclass
class Pin:
    """The version that answers one request: decided once, before SGLang sees the request."""

    engine_name: str | None
    label: str
    applied: bool = False


_pin: ContextVar[Pin | None] = ContextVar("umbel_pin", default=None)


def apply_pin(manager: Any, obj: Any, request: Any = None, *args: Any, **kwargs: Any) -> None:
    """BEFORE `TokenizerManager.generate_request`: the pinned version, whatever the body asked for."""
    pin = _pin.get()
    if pin is None:  # the daemon's own request, or SGLang's warm-up
        return
    obj.lora_path = pin.engine_name
    obj.extra_key = None  # part of the KV cache's key: a client must not choose it (sglang#24638)
    pin.applied = True


class Router:
    """Pure-ASGI middleware around SGLang's whole application."""

    def __init__(self, app: ASGIApp, table_file: Path, admin_key: str, keys: ApiKeys | None = None) -> None:
        self.app = app
        self.keys = keys
        self.table_file = table_file
        self.admin_key = admin_key
        self.table: AliasTable | None = None
        self.in_flight: Counter[str] = Counter()
        self.draining = False
        if table_file.exists():
            self.table = AliasTable.read(table_file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path, admin = scope["path"], self._is_admin(scope)
        if admin and path.startswith("/umbel/"):
            return await self._administer(path, send)
        if path in OPEN and scope["method"] == "GET":
            return await (self._ready if path == "/ready" else self.app)(scope, receive, send)
        if not (admin or self.keys is None or self.keys.admit(scope["headers"])):
            return await _error(send, 401, UNAUTHORIZED, "invalid_request_error", code="invalid_api_key")
        if path in GENERATING and scope["method"] == "POST":
            return await self._generate(scope, receive, send)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return await self._models(scope, send)
        if admin or (path == "/metrics" and scope["method"] == "GET"):
            return await self.app(scope, receive, send)
        return await _error(send, 404, f"{scope['method']} {path[:200]} does not exist here.", "not_found_error")

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.table is None or self.draining:
            return await _not_ready(send)
        body = await _read_body(receive)
        if body is None:
            return await _error(send, 413, f"The body is over {MAX_BODY_BYTES >> 20} MiB.", "invalid_request_error")
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return await _error(send, 400, "The body is not valid JSON.", "invalid_request_error")
        model = request.get("model") if isinstance(request, dict) else None
        if not isinstance(model, str):
            return await _error(send, 400, "'model' is missing; name a model.", "invalid_request_error", "model")
        refused = refusal(request)
        if refused is not None:
            return await _error(send, 400, refused[0], "invalid_request_error", refused[1])
        try:
            ref = self.table.resolve(model)
        except NotFound as error:
            return await _error(send, 404, str(error), "invalid_request_error", "model", "model_not_found")
        priority = request.get("priority")
        if isinstance(priority, str):
            if priority not in CLASSES:
                message = f"'priority' is {priority!r}; use 'interactive', 'batch', or a number."
                return await _error(send, 400, message, "invalid_request_error", "priority")
            body = json.dumps({**request, "priority": CLASSES[priority]}).encode()
            scope = _with_length(scope, len(body))
        pin = Pin(ref.engine_name, str(ref)) if ref else Pin(None, BASE_LABEL)
        _pin.set(pin)
        self.in_flight[pin.label] += 1
        try:
            await self.app(self._with_key(scope), _replay(body, receive), _tagged(send, pin))
        finally:
            self.in_flight[pin.label] -= 1

    async def _administer(self, path: str, send: Send) -> None:
        if path == "/umbel/aliases":
            try:
                self.table = AliasTable.read(self.table_file)  # the promotion: one assignment
            except (OSError, ValueError) as error:  # ValidationError and UnicodeDecodeError are ValueErrors
                logger.exception("alias table %s cannot be read; the old one stays", self.table_file)
                return await _error(send, 500, f"{self.table_file}: {error}", "server_error")
            return await _reply(send, 200, self.table.model_dump(mode="json"))
        if path == "/umbel/drain":
            self.draining = True
        return await _reply(send, 200, {label: count for label, count in self.in_flight.items() if count})

    async def _models(self, scope: Scope, send: Send) -> None:
        if self.table is None:
            return await _not_ready(send)
        wanted = scope["path"].removeprefix("/v1/models").removeprefix("/")
        if scope["method"] != "GET":
            return await _error(send, 405, "Only GET is allowed here.", "invalid_request_error")
        if not wanted:
            cards = [_card(self.table, name) for name in self.table.names()]
            return await _reply(send, 200, {"object": "list", "data": cards})
        if wanted not in self.table.names():
            message = f"The model {wanted[:200]!r} does not exist. Available: {', '.join(self.table.names())}."
            return await _error(send, 404, message, "invalid_request_error", "model", "model_not_found")
        return await _reply(send, 200, _card(self.table, wanted))

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.table is None:
            return await _not_ready(send)
        return await self.app({**scope, "path": "/health", "raw_path": b"/health"}, receive, send)

    def _is_admin(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, b"Bearer " + self.admin_key.encode())

    def _with_key(self, scope: Scope) -> Scope:
        # SGLang itself answers nobody without the key: if this router were ever missing, nothing would be open.
        others = [(name, value) for name, value in scope["headers"] if name not in (b"authorization", b"x-api-key")]
        return {**scope, "headers": [*others, (b"authorization", b"Bearer " + self.admin_key.encode())]}


def _with_length(scope: Scope, length: int) -> Scope:
    others = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}


def _card(table: AliasTable, name: str) -> dict[str, Any]:
    ref = table.resolve(name)
    version = str(ref) if ref else BASE_LABEL
    parent = None if name == table.base else table.base
    return {
        "id": name, "object": "model", "created": int(time.time()), "owned_by": "umbel",
        "root": version, "parent": parent, "umbel_adapter": version,
    }  # fmt: skip


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body, or None when it is over the limit."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
        if len(body) > MAX_BODY_BYTES:
            return None
    return bytes(body)


def _replay(body: bytes, receive: Receive) -> Receive:
    """Give the body that was read once more, then whatever comes (a disconnect)."""
    pending: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replayed() -> Message:
        return pending.pop() if pending else await receive()

    return replayed


def _tagged(send: Send, pin: Pin) -> Send:
    """Name the version in `x-umbel-adapter`, from what was applied.

    Some streams begin with an event of their own before anything is generated, so what comes first is held back until
    the pin was applied or the response ends.
    """
    held: list[Message] = []

    async def tagged(message: Message) -> None:
        held.append(message)
        ended = message["type"] == "http.response.body" and not message.get("more_body", False)
        if not (pin.applied or ended):
            return
        if pin.applied and held[0]["type"] == "http.response.start":
            held[0]["headers"] = [*held[0].get("headers", []), (b"x-umbel-adapter", pin.label.encode())]
        while held:
            await send(held.pop(0))

    return tagged


async def _reply(send: Send, status: int, body: object, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
    content = json.dumps(body).encode()
    common = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*common, *headers]})
    await send({"type": "http.response.body", "body": content})


async def _error(
    send: Send, status: int, message: str, kind: str, param: str | None = None, code: str | None = None
) -> None:
    """An error as OpenAI's clients expect it."""
    await _reply(send, status, {"error": {"message": message, "type": kind, "param": param, "code": code}})


async def _not_ready(send: Send) -> None:
    body = {
        "error": {
            "message": "The site is starting or stopping; try again.",
            "type": "server_error",
            "param": None,
            "code": "not_ready",
        }
    }
    await _reply(send, 503, body, ((b"retry-after", b"2"),))
