"""Calls that meet each other or a failing engine: what the journal says is what users get, and nothing is left over."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.toys.deployment import Deployment, quick, run, until
from tests.toys.engine import ALIASES, LOAD, UNLOAD, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import EngineError
from umbel.messages import ShadowState

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


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
        assert (await site.deployer.promote(V1, forced=True)).state is ShadowState.LIVE
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
            changed = await site.deployer.roll_back("support")
        else:
            changed = (await site.deployer.promote(V3, forced=True)).ref
        machine.gates["start"].set()
        await site.ready(starts=2)
        await site.quiet()
        assert site.engine.answers("support") == changed

    run(tmp_path, machine, story)


def test_a_shadow_that_is_discarded_while_it_loads_does_not_stay_in_the_engine(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        machine.gates["/generate"] = asyncio.Event()
        site.push(1)
        await until(lambda: machine.calls["/generate", "support-v1"] == 1)
        await site.deployer.discard(V1)
        machine.gates["/generate"].set()
        await site.quiet()
        assert site.engine.adapters == set()
        assert machine.calls[UNLOAD, "support-v1"] == 1

    run(tmp_path, machine, story)


def test_a_push_that_meets_a_promotion_of_the_one_before_is_judged(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        site.push(1)
        await site.judged(V1)
        machine.kill()
        await site.ready(starts=2)
        machine.gates[LOAD] = asyncio.Event()
        promotion: asyncio.Task[Any] = asyncio.create_task(site.deployer.promote(V1, forced=True))
        await until(lambda: machine.calls[LOAD, "support-v1"] == 2)
        site.push(2)
        for _ in range(20):
            await asyncio.sleep(0)
        machine.gates[LOAD].set()
        await promotion
        assert (await site.judged(V2)).state is ShadowState.JUDGED

    run(tmp_path, machine, story)


def test_a_shadow_whose_loss_is_not_a_number_is_judged_and_serving_goes_on(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        site.jobs.losses["support-v2"] = float("nan")
        report = await site.judged(site.push(2))
        assert report.verdict is not None
        assert not report.verdict.accepted
        assert site.after_a_kill()[1] == ["support@v1"]
        assert [v.ref for v in site.journal.versions(Lifecycle.LIVE)] == [V1]

    run(tmp_path, machine, story)
