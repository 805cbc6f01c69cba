"""Restoring the federation's live version at a site: done where the site allows it, never against its own verdict."""

import asyncio
from pathlib import Path

import pytest

from client.versions.version_files import directory
from tests.toys.deployment import Deployment, quick, run, until
from tests.toys.engine import LOAD, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import AdapterError, Conflict, EngineError
from umbel.messages import Restored

V1, V2, V3, V4 = (AdapterRef("support", version) for version in (1, 2, 3, 4))
FALLING = {"base": 5.0, "support-v1": 4.0, "support-v2": 3.0, "support-v3": 2.0, "support-v4": 1.0}
"""Losses with which every version is better than all before it."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def refused(site: Deployment) -> list[AdapterRef]:
    return site.journal.refused("support")


def test_what_was_live_before_is_live_again_whatever_is_asked_how_often(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            await site.deploy(version)
        for ref in (V1, V1, V2, V2):
            assert await site.deployer.restore(ref) == Restored(live=str(ref), state=Lifecycle.LIVE)
            assert site.engine.answers("support") == str(ref) == site.after_a_kill()[0].adapters["support"]["live"]
        for _ in range(2):
            assert await site.deployer.restore(None) == Restored(live=None, state=None)
            assert site.engine.answers("support") is None
        await site.quiet()
        assert (site.engine.adapters, directory(site.config, V1).exists()) == ({"support-v2"}, False), "v2 is previous"
        assert refused(site) == [], "following the federation is no word of the site's own"
        with pytest.raises(AdapterError, match="billing@v1 is no version of support"):
            await site.deployer.restore(AdapterRef("billing", 1))

    run(tmp_path, machine, story)


def test_a_version_whose_files_are_gone_is_sent_again_and_not_judged_again(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2, 3):
            await site.deploy(version)
        await site.quiet()
        missing = Restored(live="support@v3", state=None)
        assert await site.deployer.restore(V1) == missing
        assert await site.deployer.restore(V4) == missing, "never heard of"
        asked = list(site.jobs.asked)
        site.push(1)
        assert site.deployer.report(V1).state is Lifecycle.RETIRED
        assert (await site.deployer.restore(V1)).state is Lifecycle.LIVE
        await site.quiet()
        assert (site.engine.answers("support"), site.engine.adapters) == ("support@v1", {"support-v1", "support-v3"})
        assert (site.jobs.asked, machine.calls[LOAD, "support-v1"]) == (asked, 2)

    run(tmp_path, machine, story)


def test_a_version_that_is_just_being_unloaded_is_not_taken_back_in_the_middle(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            await site.deploy(version)
        await site.quiet()
        machine.gates["/umbel/in_flight"] = gate = asyncio.Event()
        await site.deploy(3)
        with pytest.raises(EngineError, match="just being unloaded; ask again"):
            await site.deployer.restore(V1)
        assert site.push(1) == V1, "its files are not touched while they are being removed"
        gate.set()
        await site.quiet()
        assert (await site.deployer.restore(V1)).state is None
        assert site.engine.adapters == {"support-v2", "support-v3"}

    run(tmp_path, machine, story)


def test_a_shadow_is_promoted_once_this_site_is_in_favour_and_not_before(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        site.jobs.losses, site.jobs.gate = FALLING, asyncio.Event()
        site.push(1)
        await until(lambda: site.deployer.report(V1).state is Lifecycle.PROBING)
        assert await site.deployer.restore(V1) == Restored(live=None, state=Lifecycle.PROBING)
        site.jobs.gate.set()
        await site.judged(V1)
        assert await site.deployer.restore(V1) == Restored(live="support@v1", state=Lifecycle.LIVE)
        site.jobs.losses = {**FALLING, "support-v2": 9.0}
        await site.judged(site.push(2))
        for order in (site.deployer.restore(V2), site.deployer.promote(V2)):
            with pytest.raises(Conflict, match="support@v2: this site's own verdict is reject: held-out loss 9"):
                await order
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_a_site_that_went_back_by_itself_says_so_and_is_not_brought_there_again(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            await site.deploy(version)
        await site.deployer.roll_back()
        assert refused(site) == [V2]
        with pytest.raises(Conflict, match="this site went back from it; support@v1 stays"):
            await site.deployer.restore(V2)
        await site.deployer.roll_back()
        assert refused(site) == [], "rolling back twice takes it back"
        await site.deployer.roll_back()
        await site.judged(site.push(3))
        await site.deployer.discard(V3)
        assert refused(site) == [V3, V2]
        with pytest.raises(Conflict, match="was rejected here"):
            await site.deployer.restore(V3)
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_a_first_version_that_was_taken_back_is_refused_too(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        await site.deployer.roll_back()
        assert refused(site) == [V1]
        with pytest.raises(Conflict, match="went back from it; the base stays"):
            await site.deployer.restore(V1)
        await site.deploy(2)
        assert await site.deployer.roll_back() is None, "before v2 the base answered, not v1"

    run(tmp_path, machine, story)


def test_only_the_newest_refusals_are_told_and_all_are_kept(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        for version in range(1, 24):
            await site.judged(site.push(version))
            await site.deployer.discard(AdapterRef("support", version))
        assert [ref.version for ref in refused(site)] == list(range(23, 3, -1))
        assert len(site.journal.refused("support", limit=-1)) == 23
        assert {version.state for version in site.journal.versions()} == {Lifecycle.REJECTED}
        with pytest.raises(Conflict, match="was rejected here"):
            await site.deployer.restore(V1)

    run(tmp_path, machine, story)
