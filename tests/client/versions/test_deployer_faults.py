"""Engines and daemons that die, and calls that meet: what answers users is always what the journal says."""

import asyncio
from pathlib import Path

import pytest

from client.versions.version_files import directory
from tests.toys.deployment import Deployment, adapter, quick, run, until
from tests.toys.engine import LOAD, ToyMachine
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import AdapterError
from umbel.messages import ShadowState

V1, V2 = (AdapterRef("support", version) for version in (1, 2))


class Killed(BaseException):
    """The daemon ends at this line."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def test_a_daemon_killed_between_journal_and_alias_file_serves_what_the_journal_says(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first(site: Deployment) -> None:
        await site.deploy(1)
        site.push(2)
        await site.judged(V2)

        async def killed(*_: object) -> None:
            raise Killed

        monkeypatch.setattr(site.deployer.loading, "publish_table", killed)
        with pytest.raises(Killed):
            await site.deployer.promote(V2, forced=True)
        assert site.engine.answers("support") == "support@v1"

    async def second(site: Deployment) -> None:
        assert site.engine.answers("support") == "support@v2"
        assert site.engine.answers("support@previous") == "support@v1"
        assert (await site.deployer.promote(V2, forced=True)).state is ShadowState.LIVE, "the centre asks again"

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_files_of_a_push_that_a_kill_cut_off_are_not_in_the_way_of_the_next(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def first(site: Deployment) -> None:
        def killed(*_: object) -> None:
            raise Killed

        monkeypatch.setattr(site.journal, "add", killed)
        with pytest.raises(Killed):
            site.push(1)
        assert directory(site.config, V1).exists()
        assert site.after_a_kill()[1] == []

    async def second(site: Deployment) -> None:
        peft_dir.write_durably(directory(site.config, V1) / peft_dir.WEIGHTS, b"half a file")
        await site.deploy(1)
        assert peft_dir.read(directory(site.config, V1))[0] == adapter(1)
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_a_version_that_was_being_judged_is_judged_after_a_restart(tmp_path: Path, machine: ToyMachine) -> None:
    async def first(site: Deployment) -> None:
        await site.deploy(1)
        site.jobs.gate = asyncio.Event()
        site.push(2)
        await until(lambda: site.deployer.report(V2).state is ShadowState.PROBING)

    async def second(site: Deployment) -> None:
        assert site.engine.adapters == {"support-v1"}
        site.deployer.resume()
        assert (await site.judged(V2)).state is ShadowState.JUDGED
        await site.deployer.promote(V2, forced=True)
        assert site.engine.answers("support") == "support@v2"

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_files_that_nobody_can_ask_for_are_removed_after_a_restart(tmp_path: Path, machine: ToyMachine) -> None:
    async def first(site: Deployment) -> None:
        for version in (1, 2, 3):
            await site.deploy(version)
        site.push(4)
        await site.judged(AdapterRef("support", 4))
        await site.deployer.discard(AdapterRef("support", 4))

    async def second(site: Deployment) -> None:
        for version in (1, 4):
            (tmp_path / "adapters" / f"support-v{version}").mkdir(exist_ok=True)
        site.deployer.resume()
        assert sorted(folder.name for folder in (tmp_path / "adapters").iterdir()) == ["support-v2", "support-v3"]

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_a_damaged_live_version_is_not_served(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        weights = directory(site.config, V1) / peft_dir.WEIGHTS
        weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
        with pytest.raises(AdapterError, match="damaged"):
            site.deployer.loading.serving()

    run(tmp_path, machine, story)


def test_an_engine_that_dies_under_a_probe_costs_time_and_no_version(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        site.jobs.gate, site.jobs.gone = asyncio.Event(), 1
        site.push(2)
        await until(lambda: site.deployer.report(V2).state is ShadowState.PROBING)
        machine.kill()
        await site.ready(starts=2)
        assert site.engine.answers("support") == "support@v1"
        site.jobs.gate.set()
        report = await site.judged(V2)
        assert (report.state, sorted(report.probe)) == (ShadowState.JUDGED, ["base", "live", "shadow"])
        assert site.engine.adapters == {"support-v1", "support-v2"}

    run(tmp_path, machine, story)


def test_an_engine_that_dies_under_a_load_is_loaded_again(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        machine.gates[LOAD] = asyncio.Event()
        site.push(1)
        await until(lambda: machine.calls[LOAD, "support-v1"] == 1)
        machine.kill()
        machine.gates.pop(LOAD).set()
        assert (await site.judged(V1)).state is ShadowState.JUDGED
        assert (site.supervisor.starts, site.engine.adapters) == (2, {"support-v1"})

    run(tmp_path, machine, story)


def test_a_judged_shadow_is_loaded_into_the_engine_that_is_there_now(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        site.push(1)
        await site.judged(V1)
        machine.kill()
        await site.ready(starts=2)
        assert site.engine.adapters == set()
        await site.deployer.promote(V1, forced=True)
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_a_version_in_use_is_unloaded_only_after_its_last_request(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        assert site.engine.router is not None
        site.engine.router.in_flight["support@v1"] += 1
        for version in (2, 3):
            await site.deploy(version)
        await until(lambda: machine.calls["/umbel/inflight", ""] > 3)
        assert "support-v1" in site.engine.adapters
        assert directory(site.config, V1).exists()
        site.engine.router.in_flight["support@v1"] -= 1
        await site.quiet()
        assert site.engine.adapters == {"support-v2", "support-v3"}
        assert not directory(site.config, V1).exists()

    run(tmp_path, machine, story)
