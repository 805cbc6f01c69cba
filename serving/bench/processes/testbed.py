"""`Testbed`: the processes of a benchmark run on two cores.

The engine's scheduler and the separate trainer share the first core; HTTP, detokenizer and load share the second.
"""

import asyncio
import os
import platform
import resource
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import httpx
import psutil

from serving.aliases import AliasTable
from serving.bench.load import Client
from serving.bench.processes.core_use import Use, core_use
from serving.bench.rounds import ADAPTER
from serving.bench.systems import UseSystem
from serving.bench.world import World
from serving.engine import PASSIVE_WAITING, Engine, command_line
from serving.run_dir import RUN_DIR_VARIABLE
from serving.trainer_socket import CoTrainerClient, CoTrainerSettings, socket_path
from umbel.adapter import AdapterRef, EngineRef
from umbel.errors import ConfigError, EngineError
from umbel.site.config import SiteConfig
from umbel.site.template import Tables, site_toml

ENGINE_CORE, CLIENT_CORE = 0, 1
INITIAL = AdapterRef(ADAPTER, 0)
START_S = 600.0
ANY_NICE = 20
"""RLIMIT_NICE with which a process may go back to nice 0."""
AUTOGROUP = Path("/proc/sys/kernel/sched_autogroup_enabled")
"""1 if the kernel groups processes by session for its scheduling (Linux)."""


class BenchEngine(Engine):
    """An engine that can be stopped (SIGSTOP) while another one is measured."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def pause(self) -> None:
        """Stop all its processes until `go_on`."""
        os.killpg(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)


class BenchTrainerClient(CoTrainerClient):
    """A client of `serving.bench.systems.BenchCoTrainer`."""

    async def use(self, system: UseSystem) -> None:
        """Switch the engine to another system. Raises EngineError if it refuses."""
        status = await self._ask(system)
        if status.job is None and status.error:  # with a job, the error would be the job's
            raise EngineError(f"the engine cannot be {system.policy}: {status.error}")


@dataclass
class Testbed:
    """All processes of a run. They are started once; systems are switched inside them."""

    world: World
    folder: Path
    engine: BenchEngine
    scheduler: psutil.Process
    trainer: BenchTrainerClient
    """Client of the trainer inside the engine."""
    separate: CoTrainerClient
    separate_process: psutil.Process
    client: Client
    stock: "StockServer | None"
    nice: int = 0

    def use(self) -> AbstractContextManager[Use]:
        """Measure how the cores are used until the context is left."""
        return core_use(self.scheduler, self.separate_process)

    def set_nice(self, nice: int) -> None:
        """Set the priority of the separate trainer, and of its session if the kernel groups processes by session."""
        if nice == self.nice:
            return
        self.nice = nice
        for thread in Path(f"/proc/{self.separate_process.pid}/task").iterdir():
            os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
        if AUTOGROUP.is_file() and AUTOGROUP.read_text().strip() == "1":
            Path(f"/proc/{self.separate_process.pid}/autogroup").write_text(str(nice))


def site_config(folder: Path, world: World) -> SiteConfig:
    """Write the site file of the benchmark's engine, and read it."""
    (folder / "state").mkdir(parents=True, exist_ok=True)
    file = folder / "site.toml"
    tables: Tables = {"adapter": [{"name": ADAPTER}], **world.tables}
    file.write_text(site_toml(tables, name="bench", model=world.model, port=_free_port(), data="none"))
    return SiteConfig.load(file)


def require_machine(with_priorities: bool) -> None:
    """Raise ConfigError if the two cores, or the right to change priorities, are not there."""
    if not {ENGINE_CORE, CLIENT_CORE} <= os.sched_getaffinity(0):
        raise ConfigError(f"cores {ENGINE_CORE} and {CLIENT_CORE} are needed; this process may not use both")
    if with_priorities and os.geteuid() != 0 and resource.getrlimit(resource.RLIMIT_NICE)[0] < ANY_NICE:
        raise ConfigError("a priority that was lowered is raised again between blocks: run as root, or ulimit -e 20")


async def start(folder: Path, world: World, with_stock: bool) -> Testbed:
    """Start engine, separate trainer and, if asked for, a stock server. If one fails, stop the others and raise."""
    config = site_config(folder, world)
    for run_dir in (config.site.state_dir, folder / "separate"):
        run_dir.mkdir(parents=True, exist_ok=True)
        CoTrainerSettings.of(config).write(run_dir)
    engine = BenchEngine(config)
    stock = StockServer(config, {INITIAL: world.initial}, engine.key) if with_stock else None
    process: asyncio.subprocess.Process | None = None
    # Started where they will run, they find one core and take one thread each.
    _pin_threads(os.getpid(), ENGINE_CORE)
    try:
        table = AliasTable(base="base", adapters={ADAPTER: {"live": str(INITIAL)}})
        # The engine comes first and alone: it times its quanta, and writes the file with the key that stock reads too.
        await engine.start(table, {INITIAL: world.initial})
        process = await _start_separate(folder / "separate", world)
        if stock:
            await stock.start()
        scheduler = pin(engine.pid)
        if stock:
            pin(stock.pid)
            stock.pause()
        _pin_threads(os.getpid(), CLIENT_CORE)
        separate = CoTrainerClient(socket_path(folder / "separate"))
        await separate.status(START_S)
        trainer = BenchTrainerClient(socket_path(config.site.state_dir))
        status = await trainer.status()
        if status.error:
            raise EngineError(f"the engine of the benchmark cannot train: {status.error}; see {engine.log}")
        client = Client(engine.client.url, ADAPTER, world.prompt_ids)
        return Testbed(
            world, folder, engine, scheduler, trainer, separate, psutil.Process(process.pid), client, stock
        )  # fmt: skip
    except BaseException:
        engine.kill()
        if stock:
            stock.kill()
        if process:
            process.kill()
        raise


async def stop(testbed: Testbed) -> None:
    """End all processes."""
    await testbed.client.close()
    testbed.separate_process.kill()
    if testbed.stock is not None:
        await testbed.stock.stop()
    await testbed.engine.stop(drain_s=0)


async def _start_separate(run_dir: Path, world: World) -> asyncio.subprocess.Process:
    """Start the separate trainer in a session of its own, like the engine: the kernel weighs their sessions."""
    module, core = "serving.bench.processes.separate", str(ENGINE_CORE)
    arguments = ["-m", module, str(run_dir), str(world.model), core, world.dtype]
    with (run_dir / "trainer.log").open("ab") as log:
        return await asyncio.create_subprocess_exec(
            sys.executable, *arguments, stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True,
        )  # fmt: skip


class StockServer:
    """SGLang without umbel, with the plugin of the CPU platform only. It is stopped (SIGSTOP) while not measured.

    It has the arguments of umbel's engine, the API key included; its client sends that key, which umbel's router adds.
    """

    def __init__(self, config: SiteConfig, adapters: Mapping[EngineRef, Path], key: str) -> None:
        """`adapters`: ref → PEFT directory, loaded from the start."""
        port = _free_port()
        self.key = key
        self.url, self._log = f"http://127.0.0.1:{port}", config.site.state_dir.parent / "stock.log"
        arguments = command_line(config, adapters)
        arguments[arguments.index("--port") + 1] = str(port)
        self._arguments, self._environment = arguments, config.engine.env
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it answers. Raises EngineError if it ends, TimeoutError after `START_S`."""
        stock = {"HF_HUB_OFFLINE": "1", "SGLANG_PLUGINS": "umbel_cpu"}
        environment = {**PASSIVE_WAITING, **os.environ, **stock, **self._environment}
        environment.pop(RUN_DIR_VARIABLE, None)
        with self._log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, *self._arguments, env=environment, stdin=asyncio.subprocess.DEVNULL, stdout=log,
                stderr=log, start_new_session=True,
            )  # fmt: skip
        async with httpx.AsyncClient(base_url=self.url, trust_env=False) as http, asyncio.timeout(START_S):
            while not await _answers(http):
                if self._process.returncode is not None:
                    raise EngineError(f"stock SGLang ended while starting; see {self._log}")
                await asyncio.sleep(0.5)

    def pause(self) -> None:
        os.killpg(self.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.killpg(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        if self._process is not None and self._process.returncode is None:
            os.killpg(self.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """Kill all its processes, and wait until the first one has ended."""
        self.kill()
        if self._process is not None:
            await self._process.wait()


async def _answers(http: httpx.AsyncClient) -> bool:
    try:
        return (await http.get("/health", timeout=5.0)).status_code == 200
    except httpx.HTTPError:
        return False


def pin(root: int) -> psutil.Process:
    """Pin the scheduler of a server to the engine's core, all its other processes to the client's; return it.

    Raises EngineError if there is none, or if there are several.
    """
    family = family_of(root)
    scheduler = scheduler_of(family)
    for each in family:
        _pin_threads(each.pid, ENGINE_CORE if each == scheduler else CLIENT_CORE)
    return scheduler


def family_of(root: int) -> list[psutil.Process]:
    """Return a process and all its descendants."""
    process = psutil.Process(root)
    return [process, *process.children(recursive=True)]


def scheduler_of(family: Sequence[psutil.Process]) -> psutil.Process:
    """Return SGLang's scheduler among processes; raise EngineError if there is none, or if there are several."""
    schedulers = [each for each in family if " ".join(each.cmdline()).startswith("sglang::scheduler")]
    if len(schedulers) != 1:
        raise EngineError(f"the benchmark needs an engine with one scheduler process; this one has {len(schedulers)}")
    return schedulers[0]


def _pin_threads(pid: int, core: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():  # the affinity of a process is that of its first thread only
        os.sched_setaffinity(int(thread.name), {core})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def describe() -> dict[str, str]:
    """Return the machine and the releases that the figures belong to."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = {name: metadata.version(name) for name in ("umbel", "sglang", "torch", "transformers")}
    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return {"cpu": cpu, "cores": str(os.cpu_count()), "memory": memory, "python": platform.python_version(), **versions}
