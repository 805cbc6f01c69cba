"""Calls that the engine answers too late: it lives, and may have done them. Nothing is taken for gone before it is."""

import asyncio
from pathlib import Path

import httpx
import pytest

from client.versions.version_files import directory
from tests.toys.deployment import Deployment, quick, run, until
from tests.toys.engine import ALIASES, GENERATE, LOAD, UNLOAD, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import EngineError, NoAnswer

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))
IN_FLIGHT = "/umbel/inflight"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


async def three(site: Deployment) -> None:
    """Deploy three versions, so that the first is retired."""
    for version in (1, 2, 3):
        await site.deploy(version)


@pytest.mark.parametrize("path", [UNLOAD, IN_FLIGHT])
def test_a_version_whose_unload_is_not_answered_keeps_its_files_and_is_unloaded_later(
    tmp_path: Path, machine: ToyMachine, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(site: Deployment) -> None:
        machine.gates[path] = asyncio.Event()
        await three(site)
        await until(lambda: machine.calls[path, "support-v1" if path == UNLOAD else ""] == 1)
        machine.late[path] = 3
        machine.gates[path].set()
        await until(lambda: caplog.text.count("adapter.unload_delayed ref=support@v1") == 1)
        assert V1 in site.supervisor.loaded
        assert directory(site.config, V1).is_dir()
        with pytest.raises(EngineError, match="is just being unloaded"):
            await site.deployer.restore(V1)
        await site.quiet()
        assert machine.calls[path, "support-v1" if path == UNLOAD else ""] == 4
        assert caplog.text.count("adapter.unload_delayed ref=support@v1") == 3
        assert site.engine.adapters == {"support-v2", "support-v3"}
        assert (V1 in site.supervisor.loaded, directory(site.config, V1).exists()) == (False, False)
        assert site.supervisor.starts == 1

    run(tmp_path, machine, story)


def test_a_version_that_the_engine_refuses_to_unload_is_asked_for_again(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        machine.refuse[UNLOAD] = "busy"
        await three(site)
        await until(lambda: machine.calls[UNLOAD, "support-v1"] == 3)
        assert directory(site.config, V1).is_dir()
        del machine.refuse[UNLOAD]
        await site.quiet()
        assert not directory(site.config, V1).exists()

    run(tmp_path, machine, story)


def test_an_engine_that_dies_while_it_is_asked_to_unload_is_gone_with_what_it_held(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        machine.gates[UNLOAD] = asyncio.Event()
        await three(site)
        await until(lambda: machine.calls[UNLOAD, "support-v1"] == 1)
        machine.kill()
        machine.gates[UNLOAD].set()
        await site.quiet()
        await site.ready(starts=2)
        assert machine.calls[UNLOAD, "support-v1"] == 1
        assert site.engine.adapters == {"support-v2", "support-v3"}
        assert not directory(site.config, V1).exists()

    run(tmp_path, machine, story)


def test_a_connection_that_breaks_while_the_engine_lives_is_no_death(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        real, broken = site.engine.client.unload, [V1, V1]

        async def unload(ref: AdapterRef) -> None:
            if ref in broken:
                broken.remove(ref)
                raise httpx.ReadError("Connection reset by peer")
            await real(ref)

        monkeypatch.setattr(site.engine.client, "unload", unload)
        await three(site)
        await until(lambda: len(broken) == 1)
        assert directory(site.config, V1).is_dir()
        await site.quiet()
        assert (broken, site.engine.adapters) == ([], {"support-v2", "support-v3"})

    run(tmp_path, machine, story)


def test_an_unload_that_a_restart_cuts_off_is_finished_by_the_next_start(tmp_path: Path, machine: ToyMachine) -> None:
    async def first(site: Deployment) -> None:
        machine.late[UNLOAD] = 1000
        await three(site)
        await until(lambda: machine.calls[UNLOAD, "support-v1"] == 2)
        assert directory(site.config, V1).is_dir()

    async def second(site: Deployment) -> None:
        machine.late.clear()
        site.resume()
        await site.ready()
        assert not directory(site.config, V1).exists()
        assert site.engine.adapters == {"support-v2", "support-v3"}

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


@pytest.mark.parametrize("path", [LOAD, GENERATE])
def test_a_candidate_whose_load_is_not_answered_is_asked_for_again_and_judged(
    tmp_path: Path, machine: ToyMachine, path: str
) -> None:
    async def story(site: Deployment) -> None:
        machine.late[path] = 2
        report = await site.judged(site.push(1))
        assert report.state is Lifecycle.JUDGED
        assert machine.calls[path, "support-v1"] == 3
        assert site.engine.adapters == {"support-v1"}
        assert site.supervisor.loaded == {V1}

    run(tmp_path, machine, story)


@pytest.mark.parametrize("path", [LOAD, GENERATE])
def test_a_version_that_is_discarded_after_a_load_without_an_answer_does_not_stay_in_the_engine(
    tmp_path: Path, machine: ToyMachine, path: str
) -> None:
    async def story(site: Deployment) -> None:
        machine.late[path] = 1
        site.push(1)
        await until(lambda: machine.late[path] == 0)
        assert site.engine.adapters == {"support-v1"}, "SGLang has loaded it all the same"
        await site.deployer.discard(V1)
        await site.quiet()
        assert (site.engine.adapters, site.supervisor.loaded) == (set(), set())
        assert machine.calls[UNLOAD, "support-v1"] >= 1
        assert not directory(site.config, V1).exists()

    run(tmp_path, machine, story)


def test_a_version_that_cannot_be_warmed_is_unloaded(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        machine.refuse[GENERATE] = "out of memory"
        assert (await site.judged(site.push(1))).state is Lifecycle.REJECTED
        await site.quiet()
        assert (machine.calls[UNLOAD, "support-v1"], site.engine.adapters) == (1, set())

    run(tmp_path, machine, story)


def test_a_promotion_whose_load_is_not_answered_changes_nothing_and_can_be_asked_for_again(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        await site.judged(site.push(1))
        machine.kill()
        await site.ready(starts=2)
        machine.late[LOAD] = 1
        async with site.http(operator=True) as http:
            late = await http.post("/adapters/support@v1/promote?forced=true")
            assert (late.status_code, late.json()["error"]["type"]) == (503, "NoAnswer")
            assert site.journal.alias("support", "live") is None
            assert (await http.post("/adapters/support@v1/promote?forced=true")).status_code == 200
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_a_router_that_does_not_answer_is_told_again_and_nothing_is_unloaded_before(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            await site.deploy(version)
        await site.judged(site.push(3))
        real, silent = site.engine.client.reload_aliases, [1, 1, 1]

        async def reload_aliases() -> None:
            if silent:
                silent.pop()
                raise NoAnswer("no answer within 60 s")
            await real()

        monkeypatch.setattr(site.engine.client, "reload_aliases", reload_aliases)
        await site.deployer.promote(V3, forced=True)
        assert site.journal.alias("support", "live") == V3
        assert site.engine.answers("support") == "support@v2", "the router has the old table still"
        assert site.engine.answers("support@v1") == "support@v1", "by which users can ask for what was dropped"
        await site.quiet()
        assert silent == []
        assert site.engine.answers("support") == "support@v3"
        assert site.engine.adapters == {"support-v2", "support-v3"}
        assert machine.calls[ALIASES, ""] >= 1

    run(tmp_path, machine, story)
