"""`Engine`: starts, watches and stops a site's SGLang server; `EngineClient`: talks to it over HTTP as its admin."""

import asyncio
import contextlib
import os
import random
import secrets
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from serving import engine_log, launch
from serving.aliases import AliasTable
from serving.loopback import alone
from serving.run_dir import ADMIN_KEY, ALIASES, PARENT_VARIABLE, RUN_DIR_VARIABLE, RouterSettings
from serving.traffic_report import TrafficReport
from umbel import ports
from umbel.adapter import AdapterRef, EngineRef
from umbel.errors import EngineError, NoAnswer
from umbel.peft_dir import replace_durably
from umbel.site.config import SiteConfig

READY_POLL_S = 0.5
"""Seconds between two questions whether a starting engine is ready."""
ANSWER_S = 60.0
"""Seconds that a call of the running engine may take."""
PREFILL_S = 5.0
"""Seconds that a promotion or a roll-back may wait for the KV cache of shared prompts."""
PASSIVE_WAITING = {"OMP_WAIT_POLICY": "PASSIVE"}
"""Environment in which OpenMP's threads sleep when they wait; by default they spin for milliseconds first.

Beside other busy processes, spinning threads keep the cores from those that they wait for: a token takes 20 times as
long. `GOMP_SPINCOUNT` follows from it: libgomp, torch's OpenMP, sets it to 0.
"""
MEASURED_LOADS = [(together, tokens) for tokens in (8, 32, 100) for together in (1, 1, 2, 4)]
"""(requests at a time, prompt tokens of each) for each step of `EngineClient.measure`."""


def command_line(config: SiteConfig, adapters: Mapping[EngineRef, Path]) -> list[str]:
    """Return the arguments that start a site's SGLang; it loads `adapters` (ref → directory) before it is ready."""
    engine = config.engine
    flags: dict[str, Any] = {
        "config": config.site.state_dir / "engine.yaml",  # holds the key, which must not show in `ps`
        "model_path": config.model.path,
        "served_model_name": config.model.served_name,
        "host": engine.host,
        "port": engine.port,
        "dtype": engine.dtype,
        # With "auto", SGLang would read another format's files by the name of a folder or the files beside them.
        "load_format": "safetensors",
        "model_config_parser": "hf",
        "enable_lora": True,
        "max_lora_rank": engine.max_lora_rank,
        "lora_target_modules": list(engine.target_modules),
        "max_loras_per_batch": config.slots,
        "sleep_on_idle": True,
        **({} if engine.device == "auto" else {"device": engine.device}),
        **{flag.lstrip("-").replace("-", "_"): value for flag, value in engine.extra_args.items()},
    }
    if adapters:
        flags["lora_paths"] = [f"{ref.engine_name}={path}" for ref, path in adapters.items()]
    return ["-m", "serving.launch", *_as_arguments(flags)]


def _as_arguments(flags: Mapping[str, Any]) -> list[str]:
    arguments: list[str] = []
    for flag, value in flags.items():
        name = flag.replace("_", "-")
        arguments.append(launch.NOT + name if value is False else "--" + name)
        if not isinstance(value, bool):
            arguments += map(str, value if isinstance(value, list) else [value])
    return arguments


class Engine:
    """One run of the SGLang server; a new run is a new object.

    >>> engine = Engine(SiteConfig.load(Path("clinic-a.toml")))
    >>> table = AliasTable(base="llama", adapters={"support": {"live": None}})
    >>> await engine.start(table, adapters={})  # the base answers users of "support"
    >>> ref = AdapterRef.parse("support@v1")
    >>> await engine.client.load(ref, Path("state/adapters/support-v1"))
    >>> table = AliasTable(base="llama", adapters={"support": {"live": str(ref)}}, addressable=(str(ref),))
    >>> table.write(engine.config.site.state_dir / ALIASES)
    >>> await engine.client.reload_aliases()  # from here on the version answers
    >>> await engine.stop(drain_s=10.0)
    """

    def __init__(self, config: SiteConfig) -> None:
        self.config = config
        self.key = secrets.token_hex(32)  # SGLang hands it to argparse: it must not begin with "-"
        self.log = config.site.state_dir / engine_log.FILE
        self.client = EngineClient(f"http://{_reachable(config.engine.host)}:{config.engine.port}", self.key)
        self._process: asyncio.subprocess.Process | None = None

    async def start(self, table: AliasTable, adapters: Mapping[EngineRef, Path]) -> None:
        """Start SGLang and wait until it answers users.

        `adapters` (version → directory) are loaded from the start; they must hold every version that `table` serves.
        Raises EngineError if the port is taken, or, with the end of the log, if the start fails.
        """
        require_free_port(self.config.engine.host, self.config.engine.port)
        state_dir = self.config.site.state_dir
        table.write(state_dir / ALIASES)
        RouterSettings.of(self.config).write(state_dir)
        replace_durably(state_dir / ADMIN_KEY, self.key.encode())
        replace_durably(state_dir / "engine.yaml", f"api-key: {self.key}\nadmin-api-key: {self.key}\n".encode())
        environment = {
            **PASSIVE_WAITING, **alone(state_dir), **os.environ,
            "HF_HUB_OFFLINE": "1",
            "SGLANG_PLUGINS": "umbel,umbel_cpu",
            **self.config.engine.env,
            RUN_DIR_VARIABLE: str(state_dir),
            PARENT_VARIABLE: str(os.getpid()),
        }  # fmt: skip
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command_line(self.config, adapters),
                env=environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for the daemon, which drains first
            )
        try:
            async with asyncio.timeout(self.config.engine.start_timeout_s):
                await self._until_ready()
        except TimeoutError as error:
            raise self._failure(f"did not answer within {self.config.engine.start_timeout_s:.0f} s") from error
        await self._require_router()

    async def _until_ready(self) -> None:
        while not await self.client.ready():
            if self._process is None or self._process.returncode is not None:
                raise self._failure("ended while starting")
            await asyncio.sleep(READY_POLL_S)

    async def _require_router(self) -> None:
        # SGLang logs a plugin that fails and goes on without it: there would be no aliases and no training.
        if not await self.client.has_router():
            await self.stop(drain_s=0)
            raise self._failure("runs without umbel's router; is umbel installed in the engine's environment?")

    def _failure(self, what: str) -> EngineError:
        tail = engine_log.tail(self.log)
        return EngineError(f"{self.config.site.name}: SGLang {what}. The end of {self.log}:\n{tail}")

    async def wait(self) -> int:
        """Wait until the engine ends; return its exit status."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, drain_s: float) -> None:
        """Take no new requests, give open ones `drain_s` seconds to finish, then end every process of the engine."""
        process = self._process
        if process is not None and process.returncode is None:
            await self.client.drain(drain_s)
        if process is not None:
            self.kill()
            await process.wait()
        await self.client.close()

    def kill(self) -> None:
        """Kill the engine's process group now."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                os.killpg(self._process.pid, signal.SIGKILL)


class EngineClient:
    """HTTP client of a running engine, with its admin key.

    Calls raise NoAnswer where the engine did not answer in time and may still do what was asked, any other EngineError
    where it refuses, and httpx.HTTPError where the connection breaks or nobody listens.
    """

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self.loading = 0
        """Number of versions that are being loaded."""
        self._http = httpx.AsyncClient(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=ANSWER_S, trust_env=False
        )

    async def ready(self) -> bool:
        """Return whether the engine answers users."""
        try:
            return (await self._http.get("/ready", timeout=5.0)).status_code == 200
        except httpx.HTTPError:
            return False

    async def has_router(self) -> bool:
        """Return whether umbel's router is in the engine's HTTP process."""
        return (await self.ask("GET", "/umbel/inflight")).status_code == 200

    async def load(self, ref: EngineRef, directory: Path) -> None:
        """Load a version beside the others; it answers no user yet. Loading it twice changes nothing."""
        body = {"lora_name": ref.engine_name, "lora_path": str(directory)}
        self.loading += 1
        try:
            reply = await self.ask("POST", "/load_lora_adapter", json=body)
        finally:
            self.loading -= 1
        if reply.status_code != 200 and "already loaded" not in reply.text:
            raise EngineError(f"{ref}: SGLang refused to load {directory}: {reply.text}")

    async def warm(self, ref: EngineRef) -> None:
        """Generate one token with a version, so that its weights are on the device before users need them."""
        body = {"text": "hello", "lora_path": ref.engine_name, "sampling_params": {"max_new_tokens": 1}}
        reply = await self.ask("POST", "/generate", json=body)
        if reply.status_code != 200:
            raise EngineError(f"{ref}: SGLang loaded it but cannot generate with it: {reply.text}")

    async def measure(self) -> None:
        """Send requests of several sizes, from which the co-trainer learns this engine's latencies."""
        draw = random.Random(0)  # noqa: S311 - nothing secret
        for together, tokens in MEASURED_LOADS:
            bodies = [
                {
                    "input_ids": [draw.randrange(3, 250) for _ in range(tokens)],
                    "sampling_params": {"max_new_tokens": 12, "ignore_eos": True},
                }
                for _ in range(together)
            ]
            await asyncio.gather(*(self.ask("POST", "/generate", json=body) for body in bodies))

    async def unload(self, ref: EngineRef) -> None:
        """Unload a version; return once no request uses it any more."""
        reply = await self.ask("POST", "/unload_lora_adapter", json={"lora_name": ref.engine_name})
        if reply.status_code != 200 and "not exist" not in reply.text and "not loaded" not in reply.text:
            raise EngineError(f"{ref}: SGLang did not unload it: {reply.text}")

    async def reload_aliases(self) -> None:
        """Make the router read `aliases.json` again; a promotion takes effect here."""
        reply = await self.ask("POST", "/umbel/aliases")
        if reply.status_code != 200:
            raise EngineError(f"the router did not take the new alias table: {reply.text}")

    async def in_flight(self) -> dict[str, int]:
        """Return the number of requests that each version is answering."""
        reply = await self.ask("GET", "/umbel/inflight")
        if reply.status_code != 200:
            raise EngineError(f"the router did not tell what is being answered: {reply.text}")
        counts: dict[str, int] = reply.json()
        return counts

    async def traffic(self) -> TrafficReport:
        """Return the counts of each version's answers, to users and to the mirror, since the engine started."""
        reply = await self.ask("GET", "/umbel/traffic")
        if reply.status_code != 200:
            raise EngineError(f"the router did not tell what users get: {reply.text}")
        return TrafficReport.model_validate_json(reply.content)

    async def prefill(self, ref: AdapterRef, most: int) -> int:
        """Let a version compute the `most` most used prompt beginnings within PREFILL_S; return how many it did."""
        body = {"version": str(ref), "most": most, "seconds": PREFILL_S}
        reply = await self.ask("POST", "/umbel/prefill", 2 * PREFILL_S, json=body)
        if reply.status_code != 200:
            raise EngineError(f"{ref}: the router could not prefill ({reply.status_code})")
        return int(reply.json()["prefilled"])

    async def drain(self, seconds: float) -> None:
        """Refuse new requests and wait, at most `seconds`, for the open ones to end. A dead engine is no error."""
        try:
            await self._http.post("/umbel/drain", timeout=5.0)
            async with asyncio.timeout(seconds):
                while await self.in_flight():
                    await asyncio.sleep(0.1)
        except (TimeoutError, EngineError, httpx.HTTPError):
            pass  # the time is up, or the engine is dead; it is ended next either way

    async def ask(self, method: str, path: str, seconds: float = ANSWER_S, **content: Any) -> httpx.Response:
        """Send one request; raise NoAnswer if it takes longer than `seconds`."""
        try:
            return await self._http.request(method, path, timeout=seconds, **content)
        except httpx.TimeoutException as error:
            raise NoAnswer(f"{self.url}{path}: no answer within {seconds:g} s; the engine may still do it") from error

    async def close(self) -> None:
        """Close the connections to the engine."""
        await self._http.aclose()


def require_free_port(host: str, port: int) -> None:
    """Raise EngineError if the engine could not listen there."""
    if why := ports.refusal(host, port):
        raise EngineError(f"{host}:{port} cannot be used ({why}); stop what listens there or change [engine].port")


def _reachable(host: str) -> str:
    """Return an address at which a server that listens on `host` can be reached, as it stands in a URL."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{host}]" if ":" in host else host
