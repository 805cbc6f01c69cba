"""`Inner`: an application behind the router that treats a pinned request as SGLang would; and calls of the router."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import httpx

from serving.aliases import AliasTable
from serving.router.asgi import Message, Receive, Scope, Send
from serving.router.pin import apply_pin
from serving.router.router import GENERATING, Router
from tests.toys.hostile.requests import Request

KEY = "0123abcd" * 8
VOCAB = 512
ADMIN = {"authorization": f"Bearer {KEY}"}
TABLE = AliasTable(
    base="tiny",
    adapters={"support": {"live": "support@v2", "previous": "support@v1", "shadow": "support@v3"}},
    addressable=("support@v2", "support@v1"),
)
CHAT = "/v1/chat/completions"


class Inner:
    """Answers every route; on generating ones, with the request as the pinned version changed it."""

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.headers: dict[bytes, bytes] = {}
        self.body: dict[str, Any] = {}
        self.before: Callable[[Receive, Send], Awaitable[None]] | None = None
        """Is awaited before the tokenizer manager is called."""
        self.told: dict[str, Any] = {}
        """Fields that its answers have besides."""
        self.after: Callable[[], Awaitable[None]] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.paths.append(scope["path"])
        self.headers = dict(scope["headers"])
        if scope["path"] not in GENERATING:
            return await answer(send, {"path": scope["path"]})
        if self.before is not None:
            await self.before(receive, send)
        raw = (await receive())["body"]
        assert int(self.headers.get(b"content-length", len(raw))) == len(raw)
        self.body = body = json.loads(raw)
        asked = SimpleNamespace(lora_path="support-v9", extra_key="another tenant's")
        invalid = body.get("messages") == []
        if not invalid:  # an invalid request never reaches the tokenizer manager
            apply_pin(None, asked, None)
        if self.after is not None:
            await self.after()
        await answer(send, {**self.told, **vars(asked), "model": body["model"]}, status=400 if invalid else 200)
        return None


async def answer(send: Send, body: object, status: int = 200) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def ask(router: Router, method: str, path: str, **request: Any) -> httpx.Response:
    """Send one request, in a task of its own as under uvicorn."""

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(router), base_url="http://site") as client:
            return await client.request(method, path, **request)

    return asyncio.run(asked())


def generate(router: Router, model: object, path: str = CHAT, **body: Any) -> httpx.Response:
    return ask(router, "POST", path, json={"model": model, **body})


async def call(router: Router, scope: Scope, messages: list[Message]) -> list[Message]:
    """Make one raw ASGI call that takes its `messages` from their beginning; return the messages that were sent."""
    sent: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await router(scope, receive, send)
    return sent


def send(router: Router, request: Request) -> tuple[int, str, dict[str, str]]:
    """Send one request chunk by chunk; return status, body and headers of the answer."""
    method, path, headers, chunks = request
    messages: list[Message] = [{"type": "http.request", "body": chunk, "more_body": True} for chunk in chunks]
    messages[-1]["more_body"] = False
    answer: list[Message] = []

    async def receive() -> Message:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def out(message: Message) -> None:
        answer.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": headers}
    asyncio.run(router(scope, receive, out))  # type: ignore[arg-type]
    told = {name.decode(): value.decode() for name, value in answer[0]["headers"]}
    return answer[0]["status"], b"".join(one.get("body", b"") for one in answer[1:]).decode(), told
