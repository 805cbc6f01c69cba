"""SGLang's HTTP server as far as the daemon needs it, in this process, behind umbel's real router and real client."""

import asyncio
import json
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx

from serving import engine_state
from serving.aliases import AliasTable
from serving.engine import EngineClient
from serving.engine_state import EngineState
from serving.router.asgi import Receive, Scope, Send
from serving.router.pin import apply_pin
from serving.router.router import GENERATING, Router
from serving.router.suspects import refuse_suspects
from serving.trainer_socket import CoTrainerStatus
from umbel.adapter import AdapterRef
from umbel.site.config import SiteConfig

KEY = "k" * 64
VOCAB = 512
LOAD, UNLOAD, GENERATE, ALIASES = "/load_lora_adapter", "/unload_lora_adapter", "/generate", "/umbel/aliases"


class ToyMachine:
    """A machine that engines run on: keeps the engines that were started, and tests' settings across restarts."""

    def __init__(self) -> None:
        self.engines: list[ToyEngine] = []
        self.refuse: dict[str, str] = {}
        """Path → the reason with which it is refused."""
        self.gates: dict[str, asyncio.Event] = {}
        """Path ("start" for a start, "answer" for SGLang's answer to a user) → a call of it waits until this is set."""
        self.late: Counter[str] = Counter()
        """Path → the number of its next calls that the engine does, and whose answers come too late."""
        self.calls: Counter[tuple[str, str]] = Counter()
        self.broken: set[str | None] = set()
        """Engine names (None for the base) of versions that answer users with an error."""
        self.says: dict[str | None, str] = {}
        """Engine name → what it answers."""
        self.generated: list[tuple[str | None, dict[str, Any]]] = []
        """(engine name, body with its class) of each request that was answered, users' and the router's own."""

    def engine(self, config: SiteConfig) -> "ToyEngine":
        """Make an engine, in the place of `serving.engine.Engine`."""
        self.engines.append(ToyEngine(config, self))
        return self.engines[-1]

    def kill(self) -> None:
        self.engines[-1].ended.set()


class ToyEngine:
    def __init__(self, config: SiteConfig, machine: ToyMachine) -> None:
        self.config, self.machine = config, machine
        self.log = config.site.state_dir / "engine.log"
        self.ended = asyncio.Event()
        self.adapters: set[str] = set()
        """Engine names of what is loaded."""
        self.router: Router | None = None
        self.state: EngineState | None = None
        self.client = EngineClient("http://toy", KEY)
        self.client._http = httpx.AsyncClient(
            transport=_Wire(self), base_url="http://toy", headers={"Authorization": f"Bearer {KEY}"}
        )

    async def start(self, table: AliasTable, adapters: Mapping[AdapterRef, Path]) -> None:
        aliases = self.config.site.state_dir / "aliases.json"
        table.write(aliases)
        self.state = engine_state.opened(aliases.parent)
        self.router = Router(refuse_suspects(self._sglang, aliases.parent), aliases, KEY, VOCAB)
        self.adapters = {ref.engine_name for ref in adapters}
        await self.gate("start")

    def kill(self) -> None:
        self.ended.set()

    async def wait(self) -> int:
        await self.ended.wait()
        return -9

    async def stop(self, drain_s: float) -> None:
        self.ended.set()
        await self.client.close()

    def answers(self, model: str) -> str | None:
        """The version that a user of `model` is answered by, which must be loaded; None for the base."""
        assert self.router is not None
        assert self.router.table is not None
        ref = self.router.table.resolve(model)
        assert ref is None or ref.engine_name in self.adapters, f"{ref} is not loaded"
        return str(ref) if ref else None

    async def gate(self, path: str) -> None:
        if path in self.machine.gates:
            await self.machine.gates[path].wait()

    async def _sglang(self, scope: Scope, receive: Receive, send: Send) -> None:
        path, body = scope["path"], json.loads((await receive())["body"])
        if path in GENERATING:
            await self.gate("answer")
            return await self._answer_user(body, send)
        if path == GENERATE and "lora_path" not in body:
            if self.state is not None:
                self.state.count_output()
            return await _answer(send, 200, "hello")
        name = str(body.get("lora_name") or body.get("lora_path"))
        if path == LOAD:
            assert (Path(body["lora_path"]) / "adapter_model.safetensors").is_file()
            self.adapters.add(name)
        elif path == UNLOAD and name not in self.adapters:
            return await _answer(send, 400, f"LoRA with name {name} does not exist")
        elif path == UNLOAD:
            self.adapters.discard(name)
        elif name not in self.adapters:
            return await _answer(send, 400, f"{name} is not loaded")
        return await _answer(send, 200, "ok")

    async def _answer_user(self, body: dict[str, Any], send: Send) -> None:
        asked = SimpleNamespace(lora_path=None, extra_key=None)
        apply_pin(None, asked)
        version = asked.lora_path
        assert version is None or version in self.adapters, f"a user was sent to {version}, which is not loaded"
        generated = self.machine.generated
        generated.append((version, {**body, "priority": asked.priority}))
        message = {"role": "assistant", "content": self.machine.says.get(version, "the same for all")}
        answer = {"id": f"chat-{len(generated)}", "choices": [{"index": 0, "message": message}]}
        await _answer(send, 500 if version in self.machine.broken else 200, json.dumps(answer))


class _Wire(httpx.AsyncBaseTransport):
    """Connects the daemon's client to the engine's router while the engine lives."""

    def __init__(self, engine: ToyEngine) -> None:
        self.engine = engine

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path, machine = request.url.path, self.engine.machine
        body = json.loads(request.content or b"{}")
        machine.calls[path, body.get("lora_name") or body.get("lora_path") or ""] += 1
        await self.engine.gate(path)
        if self.engine.ended.is_set() or self.engine.router is None:
            raise httpx.ConnectError("Connection refused", request=request)
        if path in machine.refuse:
            return httpx.Response(500, text=machine.refuse[path], request=request)
        answer = await httpx.ASGITransport(self.engine.router).handle_async_request(request)
        if machine.late[path] > 0:
            machine.late[path] -= 1
            raise httpx.ReadTimeout("", request=request)
        return answer


class _Measured:
    """A co-trainer that knows its engine's latencies already."""

    async def status(self) -> CoTrainerStatus:
        return CoTrainerStatus(latency_known=True)


MEASURED: Any = _Measured()


async def _answer(send: Send, status: int, text: str) -> None:
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


def site_config(state_dir: Path, adapters: Collection[str] = ("support",), **engine: Any) -> SiteConfig:
    return SiteConfig(
        site={"name": "clinic-a", "state_dir": state_dir},
        model={"path": state_dir / "base", "served_name": "tiny"},
        adapter=[{"name": name} for name in adapters],
        engine={"port": 30000, "dtype": "float32", "max_lora_rank": 4, **engine},
        training={"data": state_dir / "train.jsonl"},
    )
