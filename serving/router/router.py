"""Alias → version, inside SGLang's HTTP process: every request is pinned to one version and keeps it to its last token.

The middleware never rewrites `model`, as SGLang's endpoints each read it differently. It resolves the alias, pins the
version in a context variable, and one hook on `TokenizerManager.generate_request` applies the pin for every endpoint.
It also is the wall around the engine: routes that users need answer, all others are 404 without the admin key.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections import Counter
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.aliases import BASE_LABEL, CLASSES, AliasTable
from serving.router import asgi, feedback
from serving.router.api_keys import ApiKeys
from serving.router.asgi import MAX_BODY_BYTES, ASGIApp, Message, Receive, Scope, Send
from serving.router.canary import version_for
from serving.router.feedback import Feedback
from serving.router.limits import refusal
from serving.router.mirror import Mirror
from serving.router.prefixes import Prefixes
from serving.router.traffic import Traffic
from serving.traffic_report import TrafficReport
from umbel.adapter import AdapterRef
from umbel.errors import EngineError, NotFound

GENERATING = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
"""Routes that answer users with tokens."""
OPEN = frozenset({"/health", "/health_generate", "/ready"})
"""Routes that answer GET for anybody; those of users need a key, where there are keys."""
CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
UNAUTHORIZED = "An API key of this site is needed: 'Authorization: Bearer KEY', or 'x-api-key: KEY'."
BUSY = (429, 503)
"""What SGLang answers when it takes no more requests."""

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
        self.traffic = Traffic()
        self.prefixes = Prefixes()
        self.mirror = Mirror(self._answer_aside, self._may_mirror)
        self.draining = False
        if table_file.exists():
            self.table = AliasTable.read(table_file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path, admin = scope["path"], self._is_admin(scope)
        known = admin or self.keys is None or self.keys.admit(scope["headers"])
        scope = scope if admin else asgi.without_keys(scope)
        if admin and path.startswith("/umbel/"):
            return await self._administer(scope, receive, send)
        if path in OPEN and scope["method"] == "GET":
            return await (self._ready if path == "/ready" else self.app)(scope, receive, send)
        if not known:
            return await asgi.error(send, 401, UNAUTHORIZED, "invalid_request_error", code="invalid_api_key")
        if path == FEEDBACK and scope["method"] == "POST":
            return await self._rate(receive, send)
        if path in GENERATING and scope["method"] == "POST":
            return await self._generate(scope, receive, send)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return await self._models(scope, send)
        if admin or (path == "/metrics" and scope["method"] == "GET"):
            return await self.app(scope, receive, send)
        return await asgi.error(send, 404, f"{scope['method']} {path[:200]} does not exist here.", "not_found_error")

    async def _generate(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.table is None or self.draining:
            return await asgi.not_ready(send)
        body = await asgi.read_body(receive, MAX_BODY_BYTES)
        if body is None:
            return await asgi.error(send, 413, f"The body is over {MAX_BODY_BYTES >> 20} MiB.", "invalid_request_error")
        try:
            request = json.loads(body)
        except (ValueError, RecursionError):
            return await asgi.error(send, 400, "The body is not valid JSON.", "invalid_request_error")
        model = request.get("model") if isinstance(request, dict) else None
        if not isinstance(model, str):
            return await asgi.error(send, 400, "'model' is missing; name a model.", "invalid_request_error", "model")
        refused = refusal(request)
        if refused is not None:
            return await asgi.error(send, 400, refused[0], "invalid_request_error", refused[1])
        try:
            ref = version_for(self.table, model, request, scope["headers"])
        except NotFound as error:
            return await asgi.error(send, 404, str(error), "invalid_request_error", "model", "model_not_found")
        if isinstance(request.get("priority"), str):
            body = json.dumps({**request, "priority": CLASSES[request["priority"]]}).encode()
            scope = asgi.with_length(scope, len(body))
        pin = Pin(ref.engine_name, str(ref)) if ref else Pin(None, BASE_LABEL)
        _pin.set(pin)
        if scope["path"] == CHAT and model in self.table.adapters:
            self.prefixes.count(model, request)
        shadow = self.table.shadow(model)
        self.in_flight[pin.label] += 1
        try:
            with self.traffic.answer(pin.label) as answer:
                if ref != shadow:
                    self.mirror.watch(answer, scope["path"], self.table.mirror.get(model, 0.0))
                # SGLang itself answers nobody without the key: if this router were ever missing, nothing would be open.
                inner = asgi.with_key(scope, self.admin_key)
                await self.app(inner, answer.receive(asgi.replay(body, receive)), _tagged(answer.send(send), pin))
        finally:
            self.in_flight[pin.label] -= 1
        return self.mirror.offer(answer, shadow, scope, request)

    async def _rate(self, receive: Receive, send: Send) -> None:
        body = await asgi.read_body(receive, feedback.MAX_BODY_BYTES)
        try:
            given = Feedback.model_validate_json(body or b"")
            label = self.traffic.rate(given.id, given.rating)
        except ValidationError:
            wanted = """Send {"id": the id of an answer, "rating": "up" or "down"}."""
            return await asgi.error(send, 400, wanted, "invalid_request_error")
        except NotFound as error:
            return await asgi.error(send, 404, str(error), "not_found_error", "id")
        return await asgi.reply(send, 200, {**given.model_dump(), "umbel_adapter": label})

    async def _answer_aside(self, ref: AdapterRef, scope: Scope, path: str, body: dict[str, Any]) -> bytes | None:
        """What a version answers to a request that no user has made, at the priority of those nobody waits for.

        None where it has no answer; raises EngineError where the engine takes no more requests now.
        """
        pin = Pin(ref.engine_name, str(ref))
        _pin.set(pin)  # of this task, which is no user's
        self.in_flight[pin.label] += 1
        try:
            patient = {**body, "priority": CLASSES["batch"]}
            status, answer = await asgi.post(self.app, scope, path, patient, self.admin_key)
        finally:
            self.in_flight[pin.label] -= 1
        if status in BUSY:
            raise EngineError(f"{ref}: the engine takes no more requests now ({status})")
        return answer if status == 200 and pin.applied else None

    def _may_mirror(self, shadow: AdapterRef) -> bool:
        """Whether it is still watched, and nobody waits."""
        if self.table is None or self.table.shadow(shadow.name) != shadow or shadow.name not in self.table.mirror:
            return False
        return not self.traffic.waiting and not self.draining

    async def _administer(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["path"] == "/umbel/aliases":
            return await self._reload(send)
        if scope["path"] == "/umbel/traffic":
            report = TrafficReport(versions=self.traffic.report(), mirror=self.mirror.report())
            return await asgi.reply(send, 200, report.model_dump(mode="json"))
        if scope["path"] == "/umbel/prefill":
            return await self._prefill(scope, receive, send)
        if scope["path"] == "/umbel/drain":
            self.draining = True
            self.mirror.stop()
        return await asgi.reply(send, 200, {label: count for label, count in self.in_flight.items() if count})

    async def _reload(self, send: Send) -> None:
        try:
            self.table = AliasTable.read(self.table_file)  # the promotion: one assignment
        except (OSError, ValueError) as error:  # ValidationError and UnicodeDecodeError are ValueErrors
            logger.exception("alias table %s cannot be read; the old one stays", self.table_file)
            return await asgi.error(send, 500, f"{self.table_file}: {error}", "server_error")
        for counts in (self.traffic, self.mirror):
            counts.forget_all_but({BASE_LABEL, *self.table.labels()})
        return await asgi.reply(send, 200, self.table.model_dump(mode="json"))

    async def _prefill(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a version that will answer soon compute how most conversations begin."""
        body = await asgi.read_body(receive, MAX_BODY_BYTES)
        asked = json.loads(body or b"{}")
        ref, done = AdapterRef.parse(asked["version"]), 0
        with contextlib.suppress(TimeoutError, EngineError):  # out of time, or of room
            async with asyncio.timeout(asked["seconds"]):
                for beginning in self.prefixes.top(ref.name, asked["most"]):
                    answer = await self._answer_aside(ref, scope, CHAT, {**beginning, "model": ref.name})
                    done += answer is not None
        return await asgi.reply(send, 200, {"prefilled": done})

    async def _models(self, scope: Scope, send: Send) -> None:
        if self.table is None:
            return await asgi.not_ready(send)
        wanted = scope["path"].removeprefix("/v1/models").removeprefix("/")
        if scope["method"] != "GET":
            return await asgi.error(send, 405, "Only GET is allowed here.", "invalid_request_error")
        if not wanted:
            cards = [_card(self.table, name) for name in self.table.names()]
            return await asgi.reply(send, 200, {"object": "list", "data": cards})
        if wanted not in self.table.names():
            message = f"The model {wanted[:200]!r} does not exist. Available: {', '.join(self.table.names())}."
            return await asgi.error(send, 404, message, "invalid_request_error", "model", "model_not_found")
        return await asgi.reply(send, 200, _card(self.table, wanted))

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.table is None:
            return await asgi.not_ready(send)
        return await self.app({**scope, "path": "/health", "raw_path": b"/health"}, receive, send)

    def _is_admin(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, b"Bearer " + self.admin_key.encode())


def _card(table: AliasTable, name: str) -> dict[str, Any]:
    ref = table.resolve(name)
    version = str(ref) if ref else BASE_LABEL
    parent = None if name == table.base else table.base
    return {
        "id": name, "object": "model", "created": int(time.time()), "owned_by": "umbel",
        "root": version, "parent": parent, "umbel_adapter": version,
    }  # fmt: skip


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
