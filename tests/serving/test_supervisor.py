"""The supervisor: one engine after the other, each with what is to be served then, and no wait for a dead one."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

import pytest

from serving import supervisor as supervisor_module
from serving.aliases import AliasTable
from serving.supervisor import Supervisor
from tests.toys.deployment import until
from tests.toys.engine import LOAD, MEASURED, ToyEngine, ToyMachine, site_config
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import EngineError, EngineGone

V1, V2 = (AdapterRef("support", version) for version in (1, 2))


class Serves:
    """A site with one live version, or none; `asked` is what was loaded each time it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.live = folder, V1
        self.asked: list[set[AdapterRef]] = []

    def what_to_serve(self, loaded: Collection[AdapterRef]) -> tuple[AliasTable, dict[AdapterRef, Path]]:
        self.asked.append(set(loaded))
        path = self.folder / self.live.engine_name
        path.mkdir(exist_ok=True)
        (path / peft_dir.WEIGHTS).touch()
        live = str(self.live)
        return AliasTable(base="tiny", adapters={"support": {"live": live}}, addressable=(live,)), {self.live: path}


class FailsToStart(ToyEngine):
    async def start(self, table: AliasTable, adapters: Mapping[AdapterRef, Path]) -> None:
        raise EngineError("no GPU")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    monkeypatch.setattr(supervisor_module, "Engine", made.engine)
    monkeypatch.setattr(supervisor_module, "RESTART_DELAY_S", 0.001)
    return made


Story = Callable[[Supervisor, Serves], Coroutine[Any, Any, None]]


def run(folder: Path, story: Story) -> None:
    async def main() -> None:
        served = Serves(folder)
        supervisor = Supervisor(site_config(folder), MEASURED, served)
        running = asyncio.create_task(supervisor.run())
        try:
            async with asyncio.timeout(10):
                await story(supervisor, served)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
            await supervisor.stop()

    asyncio.run(main())


def test_an_engine_that_dies_is_started_again_with_what_is_to_be_served_then(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(supervisor: Supervisor, served: Serves) -> None:
        await supervisor.ready()
        assert (supervisor.starts, supervisor.loaded, machine.engines[-1].adapters) == (1, {V1}, {"support-v1"})
        served.live = V2
        served.asked.clear()
        machine.kill()
        await until(lambda: supervisor.starts == 2)
        assert (supervisor.loaded, machine.engines[-1].adapters) == ({V2}, {"support-v2"})
        assert served.asked[0] == set(), "the new engine has nothing yet"

    run(tmp_path, story)


def test_a_promotion_during_a_start_is_served_once_the_engine_is_ready(tmp_path: Path, machine: ToyMachine) -> None:
    machine.gates["start"] = asyncio.Event()

    async def story(supervisor: Supervisor, served: Serves) -> None:
        await until(lambda: len(machine.engines) == 1 and machine.engines[0].router is not None)
        assert supervisor.engine is None
        served.live = V2
        machine.gates["start"].set()
        await supervisor.ready()
        assert machine.calls[LOAD, "support-v2"] == 1
        assert supervisor.loaded == {V1, V2}

    run(tmp_path, story)


def test_work_on_an_engine_that_dies_is_given_up_at_once(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(supervisor: Supervisor, served: Serves) -> None:
        await supervisor.ready()
        assert await supervisor.while_running(asyncio.sleep(0, "done")) == "done"
        work = asyncio.create_task(supervisor.while_running(asyncio.sleep(3600)))
        await asyncio.sleep(0)
        machine.gates["start"] = asyncio.Event()
        machine.kill()
        with pytest.raises(EngineGone, match="clinic-a: the engine went away"):
            await work
        assert (supervisor.engine, supervisor.loaded) == (None, set())
        machine.gates["start"].set()

    run(tmp_path, story)


def test_a_first_start_that_fails_ends_the_daemon_and_a_later_one_is_tried_again(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(config: Any) -> ToyEngine:
        return FailsToStart(config, machine)

    monkeypatch.setattr(supervisor_module, "Engine", failing)
    with pytest.raises(EngineError, match="no GPU"):
        asyncio.run(Supervisor(site_config(tmp_path), MEASURED, Serves(tmp_path)).run())
    monkeypatch.setattr(supervisor_module, "Engine", machine.engine)

    async def story(supervisor: Supervisor, served: Serves) -> None:
        await supervisor.ready()
        failures = iter((True, True))
        monkeypatch.setattr(
            supervisor_module, "Engine", lambda config: (failing if next(failures, False) else machine.engine)(config)
        )
        machine.kill()
        await until(lambda: supervisor.starts == 2)

    run(tmp_path, story)
