"""`Router`: pins each request to one version, to its last token, and lets only users' routes reach SGLang.

It resolves the alias, and pins the version and the request's class (`pin`). Routes that users need answer, with the
fields that `fields` knows; all others are 404 without the admin key.
"""

import asyncio
import contextlib
import json
import logging
import secrets
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from serving.aliases import BASE_LABEL, AliasTable
from serving.priorities import CLASSES, Priority
from serving.router import asgi, feedback
from serving.router.api_keys import ALL, Access, ApiKeys
from serving.router.asgi import ASGIApp, Receive, Scope, Send
from serving.router.bodies import MAX_BODY_BYTES, Bodies, BodyRefused, refuse
from serving.router.canary import user_of, version_for
from serving.router.feedback import Feedback
from serving.router.fields import body as fields
from serving.router.fields.routes import ROUTES, checked
from serving.router.mirror import MAX_REQUEST_BYTES, Mirror
from serving.router.pin import Pin
from serving.router.prefixes import Prefixes
from serving.router.traffic import Traffic
from serving.traffic_report import TrafficReport
from umbel.adapter import AdapterRef
from umbel.errors import EngineError, NotFound, RequestRefused

GENERATING = frozenset(ROUTES)
"""Routes that answer users with tokens."""
OPEN = frozenset({"/health", "/health_generate", "/ready"})
"""Routes that answer GET without a key, also where users have API keys."""
CHAT, FEEDBACK = "/v1/chat/completions", "/v1/feedback"
UNAUTHORIZED = "An API key of this site is needed: 'Authorization: Bearer KEY', or 'x-api-key: KEY'."
BUSY = (429, 503)
"""Statuses with which SGLang refuses a request because it has too many."""
logger = logging.getLogger(__name__)


class Router:
    """ASGI middleware around SGLang's whole application; with `[examples]`, a `Consent` is around it.

    `table_file` holds the alias table, which POST /umbel/aliases reads anew; until it is there, users are answered 503.
    `admin_key` opens every route and is SGLang's own key. Token ids in requests must be below `vocab_size`, the base's.
    Where there are `keys`, users need one of them, and see the names that it opens. `classes` has for each adapter the
    class of its requests that name none.
    """

    def __init__(
        self,
        app: ASGIApp,
        table_file: Path,
        admin_key: str,
        vocab_size: int,
        keys: ApiKeys | None = None,
        classes: Mapping[str, str] | None = None,
    ) -> None:
        self.app = app
        self.vocab_size = vocab_size
        self.keys = keys or ApiKeys()
        self.classes = classes or {}
        self.table_file = table_file
        self.admin_key = admin_key
        self.table: AliasTable | None = None
        self._views: dict[frozenset[str], AliasTable] = {}
        self.in_flight: Counter[str] = Counter()
        self.traffic = Traffic()
        self.prefixes = Prefixes()
        self.mirror = Mirror(self._answer_aside, self._may_mirror)
        self.bodies = Bodies()
        self.draining = False
        if table_file.exists():
            self.table = AliasTable.read(table_file)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008})
        path, admin = scope["path"], self._is_admin(scope)
        access = ALL if admin else self.keys.admit(scope["headers"])
        scope = scope if admin else asgi.without_keys(scope)
        if admin and path.startswith("/umbel/"):
            return await self._administer(scope, receive, send)
        if path in OPEN and scope["method"] == "GET":
            return await (self._ready if path == "/ready" else self.app)(scope, receive, send)
        if access is None:
            return await asgi.error(send, 401, UNAUTHORIZED, "invalid_request_error", code="invalid_api_key", path=path)
        if path == FEEDBACK and scope["method"] == "POST":
            return await self._rate(access, receive, send)
        if path in GENERATING and scope["method"] == "POST":
            return await self._generate(access, scope, receive, send)
        if path == "/v1/models" or path.startswith("/v1/models/"):
            return await self._models(access, scope, send)
        if admin or (path == "/metrics" and scope["method"] == "GET"):
            return await self.app(scope, receive, send)
        said = f"{scope['method']} {path[:200]} does not exist here."
        return await asgi.error(send, 404, said, "not_found_error", path=path)

    def _seen(self, table: AliasTable, access: Access) -> AliasTable:
        """Return the table as it would be if the names that a request does not open were not there.

        All that the request then meets, in texts and in time, is as if they were not.
        """
        if not access.closed:
            return table
        if access.closed not in self._views:
            self._views[access.closed] = table.without(access.closed)
        return self._views[access.closed]

    async def _generate(self, access: Access, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if self.table is None or self.draining:
            return await asgi.not_ready(send, path)
        try:
            async with self.bodies.read(scope, receive) as body:
                return await self._answer(self._seen(self.table, access), scope, receive, send, body)
        except BodyRefused as refused:
            return await refuse(send, refused, path)

    async def _answer(self, table: AliasTable, scope: Scope, receive: Receive, send: Send, body: bytes) -> None:
        path = scope["path"]
        try:
            asked = fields.parse(body)
            model = asked.get("model")
            if not isinstance(model, str):
                raise RequestRefused("'model' is missing; name a model.", "model")
            model = table.plain(model)
            adapter = table.adapter_of(model)
            user = user_of(asked, scope["headers"]) if model in table.adapters else None
            ref, live = version_for(table, model, user), table.resolve(model)
            request = checked(path, asked, self.vocab_size)
            priority = CLASSES[request.pop("priority", self.classes.get(adapter or "", "interactive"))]
            del asked  # what was left out of it would be in memory until the answer ends
            body = fields.serialise(request)  # SGLang reads what was checked, whatever else the body may have said
        except NotFound as error:
            said, kind = str(error), "invalid_request_error"
            return await asgi.error(send, 404, said, kind, "model", "model_not_found", path=path)
        except RequestRefused as error:
            return await asgi.error(send, 400, str(error), "invalid_request_error", error.field, path=path)
        scope = asgi.with_length(asgi.forwarded(scope), len(body))
        apart = adapter if self.keys.guard(adapter) else None  # a version has a cache of its own, the base is shared
        pin, shadow = Pin.set(ref, priority, apart), table.shadow(model)
        if path == CHAT and model in table.adapters:
            self.prefixes.count(model, request)
        self.in_flight[pin.label] += 1
        try:
            with self.traffic.answer(pin.label, adapter, user) as answer:
                if ref == live:
                    self.mirror.watch(answer, path, table.mirror.get(model, 0.0))
                if answer.kept is None or len(body) > MAX_REQUEST_BYTES:
                    request = {}  # not mirrored; it would be in memory until the answer ends
                # SGLang itself answers nobody without the key: if this router were ever missing, nothing would be open.
                inner = asgi.with_key(scope, self.admin_key)
                await self.app(inner, answer.receive(asgi.Replay(body, receive)), pin.tagged(answer.send(send)))
        finally:
            self.in_flight[pin.label] -= 1
        return self.mirror.offer(answer, shadow, scope, request)

    async def _rate(self, access: Access, receive: Receive, send: Send) -> None:
        body = await asgi.read_body(receive, feedback.MAX_BODY_BYTES)
        try:
            given = Feedback.model_validate_json(body or b"")
            label = self.traffic.rate(given.id, given.rating, access)
        except ValidationError:
            wanted = """Send {"id": the id of an answer, "rating": "up" or "down"}."""
            return await asgi.error(send, 400, wanted, "invalid_request_error")
        except NotFound as error:
            return await asgi.error(send, 404, str(error), "not_found_error", "id")
        return await asgi.reply(send, 200, {**given.model_dump(), "umbel_adapter": label})

    async def _answer_aside(self, ref: AdapterRef, scope: Scope, path: str, body: dict[str, Any]) -> bytes | None:
        """Have a version answer a request of the router's own, in the class of nobody waiting.

        Returns None if it gives no answer; raises EngineError if the engine takes no more requests now.
        """
        pin = Pin.set(ref, Priority.MIRROR)  # this task serves no user
        self.in_flight[pin.label] += 1
        try:
            status, answer = await asgi.post(self.app, scope, path, body, self.admin_key)
        finally:
            self.in_flight[pin.label] -= 1
        if status in BUSY:
            raise EngineError(f"{ref}: the engine takes no more requests now ({status})")
        return answer if status == 200 and pin.applied else None

    def _may_mirror(self, shadow: AdapterRef) -> bool:
        """Return whether the shadow is still mirrored and no user waits."""
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
            self.table = AliasTable.read(self.table_file)  # a promotion is this one assignment
            self._views = {}
        except (OSError, ValueError) as error:  # ValidationError and UnicodeDecodeError are ValueErrors
            logger.exception("alias table %s cannot be read; the old one stays", self.table_file)
            return await asgi.error(send, 500, f"{self.table_file}: {error}", "server_error")
        for counts in (self.traffic, self.mirror):
            counts.forget_all_but({BASE_LABEL, *self.table.labels()})
        return await asgi.reply(send, 200, self.table.model_dump(mode="json"))

    async def _prefill(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a version that will soon answer users compute the most used beginnings of conversations."""
        body = await asgi.read_body(receive, MAX_BODY_BYTES)
        asked = json.loads(body or b"{}")
        ref, done = AdapterRef.parse(asked["version"]), 0
        with contextlib.suppress(TimeoutError, EngineError):  # the time is up, or the engine is full
            async with asyncio.timeout(asked["seconds"]):
                for beginning in self.prefixes.top(ref.name, asked["most"]):
                    answer = await self._answer_aside(ref, scope, CHAT, {**beginning, "model": ref.name})
                    done += answer is not None
        return await asgi.reply(send, 200, {"prefilled": done})

    async def _models(self, access: Access, scope: Scope, send: Send) -> None:
        if self.table is None:
            return await asgi.not_ready(send)
        table = self._seen(self.table, access)
        wanted = table.plain(scope["path"].removeprefix("/v1/models").removeprefix("/"))
        if scope["method"] != "GET":
            return await asgi.error(send, 405, "Only GET is allowed here.", "invalid_request_error")
        if not wanted:
            cards = [_card(table, name) for name in table.names()]
            return await asgi.reply(send, 200, {"object": "list", "data": cards})
        try:
            card = _card(table, wanted)
        except NotFound as error:
            return await asgi.error(send, 404, str(error), "invalid_request_error", "model", "model_not_found")
        return await asgi.reply(send, 200, card)

    async def _ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.table is None:
            return await asgi.not_ready(send)
        return await self.app({**scope, "path": "/health", "raw_path": b"/health"}, receive, send)

    def _is_admin(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        return secrets.compare_digest(given, b"Bearer " + self.admin_key.encode())


def _card(table: AliasTable, name: str) -> dict[str, Any]:
    """Return a model's entry in the answer of /v1/models."""
    ref = table.resolve(name)
    version = str(ref) if ref else BASE_LABEL
    parent = None if name == table.base else table.base
    return {
        "id": name, "object": "model", "created": int(time.time()), "owned_by": "umbel",
        "root": version, "parent": parent, "umbel_adapter": version,
    }  # fmt: skip
