"""A shadow that is watched before its verdict: who meets it, what ends the watch, and what a kill in it leaves."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from client.versions.looks import FIRST_LOOK
from serving.priorities import Priority
from tests.toys.deployment import NOT_JUDGED, Deployment, quick, run, until
from tests.toys.engine import ToyMachine
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import Conflict
from umbel.messages import ShadowReport

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))
USERS = tuple(f"user-{number}" for number in range(40))
LONG = 600.0
"""Seconds that no test waits for."""


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def policy(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    given = {
        "watch_s": LONG,
        "canary_share": 0.5,
        "min_requests": 20,
        "min_users": 5,
        "max_loss_ratio": 1.5,
        **settings,
    }
    monkeypatch.setenv("UMBEL_SITE__SHADOW", json.dumps(given))


async def watched(site: Deployment, version: int) -> AdapterRef:
    ref = site.push(version)
    await until(lambda: site.deployer.report(ref).state is Lifecycle.WATCHING)
    await until(lambda: bool(site.engine.router and site.engine.router.table and _shares(site)))
    return ref


def _shares(site: Deployment) -> dict[str, float]:
    assert site.engine.router is not None
    assert site.engine.router.table is not None
    return {**site.engine.router.table.canary, **site.engine.router.table.mirror}


async def live(site: Deployment, version: int) -> AdapterRef:
    """A version that went through its watch, and was promoted."""
    ref = await watched(site, version)
    await ended(site, ref)
    await site.deployer.promote(ref)
    return ref


async def ended(site: Deployment, ref: AdapterRef) -> ShadowReport:
    """Its report, once users have come until it had one."""
    while site.deployer.report(ref).state in NOT_JUDGED:
        await site.users(*USERS)
        await asyncio.sleep(0.005)
    return site.deployer.report(ref)


def test_a_watched_shadow_answers_its_users_until_enough_is_seen(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(monkeypatch, min_requests=10)

    async def story(site: Deployment) -> None:
        await live(site, 1)
        before = await site.users(*USERS)
        assert set(before) == {"support@v1"}
        await watched(site, 2)
        with pytest.raises(Conflict, match="support@v2 is watching; only a judged shadow"):
            await site.deployer.promote(V2)
        assert site.deployer.report(V2).verdict is None, "the centre goes on asking"
        answered = await site.users(*USERS)
        canary = {user for user, label in zip(USERS, answered, strict=True) if label == "support@v2"}
        assert 10 <= len(canary) <= 30
        report = await site.judged(V2)
        assert report.verdict is not None
        assert (report.state, report.verdict.decision) == (Lifecycle.JUDGED, "promote")
        assert report.verdict.reasons[0].startswith("held-out loss")
        assert any(reason.startswith(f"errors: 0 of {len(canary)} against live's") for reason in report.verdict.reasons)
        assert (await site.users(*USERS)) == before, "and no longer"
        await site.deployer.promote(V2)
        await watched(site, 3)
        again = await site.users(*USERS)
        assert canary == {user for user, label in zip(USERS, again, strict=True) if label == "support@v3"}

    run(tmp_path, machine, story)


def test_the_watch_is_over_after_its_time_though_nobody_came(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(monkeypatch, watch_s=0.02)

    async def story(site: Deployment) -> None:
        report = await site.judged(site.push(1))
        assert report.verdict is not None
        assert (report.verdict.decision, report.watch_s > 0) == ("promote", True)
        assert _shares(site) == {}

    run(tmp_path, machine, story)


@pytest.mark.parametrize(("settings", "decision"), [({}, "promote"), ({"too_few_users": "keep"}, "keep")])
def test_the_operator_says_what_becomes_of_a_version_that_too_few_users_met(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], decision: str
) -> None:
    policy(monkeypatch, watch_s=0.5, min_requests=2, min_users=20, **settings)

    async def story(site: Deployment) -> None:
        await watched(site, 1)
        await site.users(*USERS[:8])
        report = await site.judged(V1)
        assert report.verdict is not None
        assert report.verdict.decision == decision
        assert any(reason.startswith("cannot tell latencies and ratings") for reason in report.verdict.reasons)
        assert report.watch_s >= 0.5, "as long as it may, for more users to come"

    run(tmp_path, machine, story)


def test_a_shadow_that_fails_its_users_is_rejected_long_before_the_watch_is_over(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(monkeypatch, min_requests=1000, canary_share=0.3)

    async def story(site: Deployment) -> None:
        machine.broken.add("support-v1")
        await watched(site, 1)
        report = await ended(site, V1)
        assert report.verdict is not None
        assert (report.verdict.decision, report.state) == ("reject", Lifecycle.JUDGED)
        assert "more, with confidence" in report.verdict.reasons[0]
        assert report.verdict.reasons[0].startswith("errors:")
        shadow = site.engine.router.traffic.report()["support@v1"]  # type: ignore[union-attr]
        assert FIRST_LOOK <= shadow.errors < 500
        assert "error" not in await site.users(*USERS)

    run(tmp_path, machine, story)


def test_errors_that_both_have_are_not_held_against_the_shadow(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(monkeypatch)

    async def story(site: Deployment) -> None:
        machine.broken |= {"support-v1", None}
        await watched(site, 1)
        report = await ended(site, V1)
        assert report.verdict is not None
        assert report.verdict.decision == "promote"

    run(tmp_path, machine, story)


@pytest.mark.parametrize(("says", "decision"), [("the same for all", "promote"), ("", "reject")])
def test_a_mirror_alone_shows_a_shadow_to_no_user(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch, says: str, decision: str
) -> None:
    policy(monkeypatch, canary_share=0.0, mirror_share=1.0, min_requests=10)

    async def story(site: Deployment) -> None:
        machine.says["support-v1"] = says
        await watched(site, 1)
        answered: list[str] = []
        while site.deployer.report(V1).state is Lifecycle.WATCHING:
            answered += await site.users("u")
            await asyncio.sleep(0.005)
        report = await site.judged(V1)
        assert report.verdict is not None
        assert report.verdict.decision == decision
        assert any(reason.startswith("mirror: ") for reason in report.verdict.reasons)
        assert set(answered) == {"base"}
        assert {body["priority"] for version, body in machine.generated if version == "support-v1"} == {Priority.MIRROR}

    run(tmp_path, machine, story)


def test_a_probe_that_rejects_is_not_watched(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(monkeypatch)

    async def story(site: Deployment) -> None:
        site.jobs.losses = {"support-v1": 9.0}
        report = await site.judged(site.push(1))
        assert report.verdict is not None
        assert (report.verdict.decision, report.watch_s) == ("reject", 0.0)

    run(tmp_path, machine, story)


@pytest.mark.parametrize("how", ["discarded", "superseded"])
def test_a_shadow_that_goes_while_it_is_watched_leaves_no_canary(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    policy(monkeypatch)

    async def story(site: Deployment) -> None:
        await watched(site, 1)
        if how == "discarded":
            await site.deployer.discard(V1)
        else:
            await watched(site, 2)
        assert "support@v1" not in await site.users(*USERS)
        assert site.deployer.report(V1).state is Lifecycle.REJECTED
        if how == "discarded":
            assert _shares(site) == {}
            await site.quiet()
            assert site.engine.adapters == set()

    run(tmp_path, machine, story)


def test_a_version_that_begins_to_answer_in_a_watch_is_what_the_shadow_is_measured_by(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(monkeypatch)

    async def story(site: Deployment) -> None:
        for version in (1, 2):
            await live(site, version)
        await watched(site, 3)
        assert await site.deployer.roll_back() == "support@v1"
        site.jobs.losses = {"support-v3": 0.5}
        asked = len(site.jobs.asked)
        report = await ended(site, V3)
        assert "support-v1" in site.jobs.asked[asked:], "it was probed anew"
        assert report.verdict is not None
        assert report.probe["live"].loss == 1.0

    run(tmp_path, machine, story)


def test_an_engine_that_dies_in_a_watch_sends_no_user_to_a_shadow_it_has_not_loaded(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(monkeypatch)

    async def story(site: Deployment) -> None:
        await watched(site, 1)
        machine.gates["/load_lora_adapter"] = asyncio.Event()
        machine.kill()
        await site.ready(starts=2)
        assert site.engine.router is not None
        assert site.engine.router.table is not None
        assert site.engine.router.table.canary == {}
        assert set(await site.users(*USERS)) == {"base"}
        machine.gates.pop("/load_lora_adapter").set()
        report = await ended(site, V1)
        assert report.state is Lifecycle.JUDGED

    run(tmp_path, machine, story)


def test_a_watch_that_a_kill_cut_off_begins_again(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy(monkeypatch)

    async def first(site: Deployment) -> None:
        await live(site, 1)
        await watched(site, 2)

    async def second(site: Deployment) -> None:
        await site.ready()
        assert site.deployer.report(V2).state is Lifecycle.WATCHING
        assert set(await site.users(*USERS)) == {"support@v1"}
        site.resume()
        await until(lambda: bool(_shares(site)))
        assert "support@v2" in await site.users(*USERS)
        assert (await ended(site, V2)).state is Lifecycle.JUDGED

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)
