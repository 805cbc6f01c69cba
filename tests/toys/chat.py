"""`ToyChat`: answers like SGLang, one text for each version, whole or as a stream; `Site`: a router in front of it."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from serving.aliases import AliasTable
from serving.router.asgi import Receive, Scope, Send
from serving.router.pin import apply_pin
from serving.router.router import Router

KEY = "k" * 64
VOCAB = 512
ADMIN = {"authorization": f"Bearer {KEY}"}
CHAT = "/v1/chat/completions"


class ToyChat:
    """Stands for SGLang; `answered` lists the requests, the router's own included."""

    def __init__(self) -> None:
        self.says: dict[str | None, str] = {}
        """Engine name → its answer; None is the base."""
        self.status: dict[str | None, int] = {}
        self.answered: list[tuple[str | None, str, dict[str, Any]]] = []
        """(engine name, path, body with its class) of each request."""
        self.gates: dict[str | None, asyncio.Event] = {}
        """Engine name → its answers wait until this is set."""
        self.keys: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = json.loads((await receive())["body"])
        asked = SimpleNamespace(lora_path=None, extra_key=None)
        apply_pin(None, asked)
        version = asked.lora_path
        self.keys.add(dict(scope["headers"])[b"authorization"])
        self.answered.append((version, scope["path"], {**body, "priority": asked.priority}))
        if version in self.gates:
            await self.gates[version].wait()
        status, text = self.status.get(version, 200), self.says.get(version, "what all say")
        identity = f"{scope['path']}-{len(self.answered)}"
        if not body.get("stream"):
            choice = {"text": text} if scope["path"] == "/v1/completions" else {"message": {"content": text}}
            content = json.dumps({"id": identity, "choices": [{"index": 0, **choice}]}).encode()
            await send({"type": "http.response.start", "status": status, "headers": []})
            return await send({"type": "http.response.body", "body": content})
        await send({
            "type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/event-stream")],
        })  # fmt: skip
        for word in (None, *text.split(" ")):
            said = {"role": "assistant", "content": ""} if word is None else {"content": f"{word} "}
            choice = {"text": said["content"]} if scope["path"] == "/v1/completions" else {"delta": said}
            event = json.dumps({"id": identity, "choices": [{"index": 0, **choice}]})
            await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})
        return await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


class Site:
    """A router in front of a toy chat, and its users."""

    def __init__(self, folder: Path, **shares: dict[str, float]) -> None:
        self.file = folder / "aliases.json"
        self.table = AliasTable(
            base="tiny",
            adapters={"support": {"live": "support@v2", "previous": "support@v1", "shadow": "support@v3"}},
            addressable=("support@v2", "support@v1"),
            **shares,  # type: ignore[arg-type]
        )
        self.table.write(self.file)
        self.chat = ToyChat()
        self.router = Router(self.chat, self.file, KEY, VOCAB)

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.router, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://site") as http:
            yield http

    async def ask(self, http: httpx.AsyncClient, path: str = CHAT, **body: Any) -> httpx.Response:
        said = {"/v1/completions": {"prompt": "hello"}, "/v1/responses": {"input": "hi"}}
        asked = said.get(path, {"messages": [{"role": "user", "content": "hi"}]})
        return await http.post(path, json={"model": "support", **asked, **body})
