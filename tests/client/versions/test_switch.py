"""Changes of what answers users: each is made once, survives a kill, and is made good when the router missed it."""

import asyncio
from pathlib import Path

import pytest

from client.versions.loading import Loading
from client.versions.version_files import directory
from tests.toys.deployment import Deployment, quick, run, until
from tests.toys.engine import ALIASES, LOAD, UNLOAD, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import Conflict, EngineError, NoRoom, NotFound

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))


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

        with monkeypatch.context() as patch:
            patch.setattr(Loading, "publish_table", killed)
            with pytest.raises(Killed):
                await site.deployer.promote(V2, forced=True)
        assert site.engine.answers("support") == "support@v1"

    async def second(site: Deployment) -> None:
        assert site.engine.answers("support") == "support@v2"
        assert site.engine.answers("support@previous") == "support@v1"
        assert (await site.deployer.promote(V2, forced=True)).state is Lifecycle.LIVE, "the centre asks again"

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_a_promotion_that_the_router_did_not_take_is_made_good_when_it_is_asked_again(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        site.push(1)
        await site.judged(V1)
        machine.refuse[ALIASES] = "busy"
        with pytest.raises(EngineError, match="alias table"):
            await site.deployer.promote(V1, forced=True)
        del machine.refuse[ALIASES]
        assert (await site.deployer.promote(V1, forced=True)).state is Lifecycle.LIVE
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


@pytest.mark.parametrize("roll_back", [False, True])
def test_a_promotion_while_the_engine_starts_is_served_once_it_is_there(
    tmp_path: Path, machine: ToyMachine, roll_back: bool
) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            await site.deploy(version)
        site.push(3)
        await site.judged(V3)
        machine.gates["start"] = asyncio.Event()
        machine.kill()
        await until(lambda: len(machine.engines) == 2 and site.engine.router is not None)
        if roll_back:
            changed = await site.deployer.roll_back()
        else:
            changed = (await site.deployer.promote(V3, forced=True)).ref
        machine.gates["start"].set()
        await site.ready(starts=2)
        await site.quiet()
        assert site.engine.answers("support") == changed

    run(tmp_path, machine, story)


def test_a_discarded_shadow_is_gone_for_good_and_discarding_it_twice_is_no_change(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        site.push(2)
        await site.judged(V2)
        first = await site.deployer.discard(V2, "no quorum")
        assert first.verdict is not None
        assert (first.verdict.accepted, first.verdict.reasons[0]) == (False, "no quorum")
        assert await site.deployer.discard(V2, "another reason") == first
        await site.quiet()
        assert (site.engine.adapters, directory(site.config, V2).exists()) == ({"support-v1"}, False)
        assert machine.calls[UNLOAD, "support-v2"] == 1
        with pytest.raises(Conflict, match="rejected"):
            await site.deployer.promote(V2)
        assert site.push(2) == V2
        assert site.deployer.report(V2) == first, "pushed again, it is what it was"
        assert machine.calls[LOAD, "support-v2"] == 1
        assert site.engine.answers("support") == "support@v1"
        assert site.after_a_kill()[1] == ["support@v1"]

    run(tmp_path, machine, story)


def test_the_first_version_can_be_taken_back(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        assert await site.deployer.roll_back() is None
        assert (site.engine.answers("support"), site.engine.answers("support@previous")) == (None, "support@v1")
        assert site.after_a_kill()[0].adapters["support"]["live"] is None
        assert await site.deployer.roll_back() == "support@v1"
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_what_the_base_replaces_stays_until_the_router_has_been_told(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            await site.deploy(version)
        machine.gates[ALIASES] = asyncio.Event()
        told = machine.calls[ALIASES, ""]
        async with site.http() as http:
            asked = asyncio.create_task(http.post("/adapters/support/restore"))
            await until(lambda: machine.calls[ALIASES, ""] > told)
            for _ in range(1000):  # all that can happen meanwhile
                await asyncio.sleep(0)
            assert site.engine.answers("support@v1") == "support@v1", "users may still ask for it"
            machine.gates[ALIASES].set()
            assert (await asked).json() == {"live": None, "state": None}
        await site.quiet()
        assert site.engine.adapters == {"support-v2"}

    run(tmp_path, machine, story)


def test_rolling_back_twice_comes_back(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        with pytest.raises(NotFound, match="nothing to roll back to"):
            await site.deployer.roll_back()
        for version in (1, 2, 3):
            await site.deploy(version)
        for live, previous in (("support@v2", "support@v3"), ("support@v3", "support@v2")):
            assert await site.deployer.roll_back() == live
            assert (site.engine.answers("support"), site.engine.answers("support@previous")) == (live, previous)
            assert site.after_a_kill()[0].adapters["support"]["live"] == live
        await site.quiet()
        assert site.engine.adapters == {"support-v3", "support-v2"}
        assert site.journal.history("support", limit=1)[0][1] == "live again by roll-back"

    run(tmp_path, machine, story)


def test_a_roll_back_of_one_version_goes_back_once_however_often_it_is_asked(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            await site.deploy(version)
        async with site.http() as http:
            for _ in range(3):
                reply = await http.post("/adapters/support/rollback", params={"instead_of": "support@v2"})
                assert reply.json() == {"live": "support@v1"}
            reply = await http.post("/adapters/support/restore", params={"ref": "support@v1"})
            assert reply.json() == {"live": "support@v1", "state": "live"}
            assert (await http.post("/adapters/support/restore")).json() == {"live": None, "state": None}
            reply = await http.post("/adapters/support/rollback", params={"instead_of": "support@v1"})
            assert reply.json() == {"live": None}
        assert site.engine.answers("support") is None

    run(tmp_path, machine, story)


def test_a_discard_that_the_router_missed_is_told_by_the_next_one(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(change: object) -> None:
        raise NoRoom("aliases.json: cannot be written")

    async def story(site: Deployment) -> None:
        await site.ready()
        await site.judged(site.push(1))
        router = site.engine.router
        with monkeypatch.context() as patch:
            patch.setattr(site.loading, "publish_table", full)
            with pytest.raises(NoRoom):
                await site.deployer.discard(V1)
        assert router.table.shadow("support") == V1
        await site.deployer.discard(V1)
        assert router.table.shadow("support") is None

    run(tmp_path, machine, story)
