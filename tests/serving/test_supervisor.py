"""The supervisor: one engine after the other, each with what is to be served then, and no wait for a dead one."""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving import supervisor as supervisor_module
from serving.aliases import AliasTable
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerStatus
from tests.toys.deployment import until
from tests.toys.engine import GENERATE, LOAD, MEASURED, ToyEngine, ToyMachine, site_config
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


class Unmeasured:
    """A co-trainer that knows its engine's latencies once it was asked three times."""

    def __init__(self) -> None:
        self.asked = 0

    async def status(self) -> CoTrainerStatus:
        self.asked += 1
        return CoTrainerStatus(latency_known=self.asked > 2)


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


def run(folder: Path, story: Story, cotrainer: Any = MEASURED, **engine: Any) -> None:
    async def main() -> None:
        served = Serves(folder)
        supervisor = Supervisor(site_config(folder, **engine), cotrainer, served)
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


@pytest.mark.parametrize("silent", [GENERATE, "/umbel/inflight"])
def test_an_engine_that_hangs_is_killed_and_started_again(
    tmp_path: Path, machine: ToyMachine, caplog: pytest.LogCaptureFixture, silent: str
) -> None:
    async def story(supervisor: Supervisor, served: Serves) -> None:
        await supervisor.ready()
        machine.gates[silent] = asyncio.Event()
        await until(lambda: len(machine.engines) == 2)
        machine.gates.pop(silent).set()
        await until(lambda: supervisor.starts == 2)
        assert [engine.ended.is_set() for engine in machine.engines] == [True, False]
        assert supervisor.deaths_under_users == 0
        await asyncio.sleep(0.5)
        assert supervisor.starts == 2, "an engine that answers is left alone"

    run(tmp_path, story, hang_timeout_s=0.3)
    (hung,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("engine.hung")]
    assert ("HTTP server" if silent != GENERATE else "computed nothing") in hung


def test_the_request_under_which_an_engine_died_is_refused_by_the_next(
    tmp_path: Path, machine: ToyMachine, caplog: pytest.LogCaptureFixture
) -> None:
    def ask(content: str) -> Coroutine[Any, Any, httpx.Response]:
        body = {"model": "support", "messages": [{"role": "user", "content": content}]}
        return machine.engines[-1].client.ask("POST", "/v1/chat/completions", json=body)

    async def story(supervisor: Supervisor, served: Serves) -> None:
        await supervisor.ready()
        assert (await ask("a monitor's")).status_code == 200
        machine.gates["answer"] = asyncio.Event()
        state = machine.engines[-1].state
        assert state is not None
        open_ones = [asyncio.create_task(ask(content)) for content in ("a monitor's", "the last one")]
        await until(lambda: len(state.in_flight()) == 2)
        machine.kill()
        await until(lambda: supervisor.deaths_under_users == 1)
        machine.gates.pop("answer").set()
        await asyncio.gather(*open_ones)
        await until(lambda: supervisor.starts == 2)
        assert [(await ask(text)).status_code for text in ("a monitor's", "the last one", "another")] == [200, 400, 200]

    run(tmp_path, story)
    (told,) = [record.getMessage() for record in caplog.records if record.getMessage().startswith("engine.suspects")]
    assert "in_flight=2 refused=1" in told
    assert "last one" not in told


def test_an_engine_that_is_too_late_to_be_measured_is_measured_again(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "MEASURE_AGAIN_S", 0.001)
    machine.late[GENERATE] = 1000
    cotrainer = Unmeasured()

    async def story(supervisor: Supervisor, served: Serves) -> None:
        await until(lambda: cotrainer.asked == 3)
        assert machine.calls[GENERATE, ""] >= 2
        assert supervisor.starts == 1

    run(tmp_path, story, cotrainer)


def test_an_engine_that_loads_too_late_while_it_starts_is_ended_before_the_next_one(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(supervisor: Supervisor, served: Serves) -> None:
        await supervisor.ready()
        machine.gates["start"] = asyncio.Event()
        machine.late[LOAD] = 1
        machine.kill()
        await until(lambda: len(machine.engines) == 2 and machine.engines[1].router is not None)
        served.live = V2
        machine.gates["start"].set()
        await until(lambda: supervisor.starts == 2)
        assert [engine.ended.is_set() for engine in machine.engines] == [True, True, False]
        assert (supervisor.loaded, machine.engines[-1].adapters) == ({V2}, {"support-v2"})

    run(tmp_path, story)
