"""A promoted version that serves worse than the one before is taken back by the site itself, once; others stay."""

import asyncio
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from client.rollback_windows import Promotion
from tests.toys.deployment import Deployment, quick, run, until
from tests.toys.engine import ALIASES, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import Conflict

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))
USERS = tuple(f"user-{number}" for number in range(20))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    policy(monkeypatch)
    return made


def policy(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> None:
    monkeypatch.setenv(
        "UMBEL_SITE__SHADOW", json.dumps({"rollback_window_s": 600.0, "control_share": 0.3, "min_users": 3, **settings})
    )


async def until_back(site: Deployment, ref: AdapterRef) -> None:
    """Users come until the site has taken a version back."""
    while site.journal.alias("support", "live") == ref:
        await site.users(*USERS)
        await asyncio.sleep(0.005)
    await until(lambda: not site.journal.windows.open())


def test_a_version_that_fails_users_is_taken_back_with_the_reason(
    tmp_path: Path, machine: ToyMachine, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        await site.users(*USERS)
        machine.broken.add("support-v2")
        await site.deploy(2)
        await until_back(site, V2)
        assert (site.engine.answers("support"), site.engine.answers("support@previous")) == ("support@v1", "support@v2")
        assert set(await site.users(*USERS)) == {"support@v1"}
        report = site.deployer.report(V2)
        why = "worse than support@v1, errors: "
        assert (report.state, report.taken_back.startswith(why)) == (Lifecycle.RETIRED, True)
        assert "more, with confidence" in report.taken_back
        events = [(event, version) for _, event, version in site.journal.history("support")]
        assert ("live again by roll-back", 1) in events
        assert (f"rolled back by itself: {report.taken_back}", 2) in events
        assert f"adapter.worse ref=support@v2 {report.taken_back}" in caplog.text
        assert site.after_a_kill()[0].adapters["support"]["live"] == "support@v1"

    run(tmp_path, machine, story)


def test_a_roll_back_that_the_engine_misses_is_tried_again(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        await site.users(*USERS)
        machine.broken.add("support-v2")
        await site.deploy(2)
        machine.refuse[ALIASES] = "out of memory"
        tried = machine.calls[ALIASES, ""]
        while machine.calls[ALIASES, ""] < tried + 3:
            await site.users(*USERS)
            await asyncio.sleep(0.005)
        assert set(await site.users(*USERS)) == {"error", "support@v1"}, "the router has not heard of it"
        machine.refuse.clear()
        await until_back(site, V2)
        assert set(await site.users(*USERS)) == {"support@v1"}

    run(tmp_path, machine, story)


def test_not_twice(tmp_path: Path, machine: ToyMachine) -> None:
    """A roll-back is no promotion: the site does not go back by itself from the version it went back to."""

    async def story(site: Deployment) -> None:
        await site.deploy(1)
        await site.users(*USERS)
        machine.broken.add("support-v2")
        await site.deploy(2)
        await until_back(site, V2)
        machine.broken.add("support-v1")
        for _ in range(5):
            assert set(await site.users(*USERS)) == {"error"}
        await site.quiet()
        assert site.engine.answers("support") == "support@v1"
        with pytest.raises(Conflict, match=r"support@v2 .* went back from it by itself: worse than .*--force"):
            await site.deployer.roll_back()
        assert await site.deployer.roll_back(forced=True) == "support@v2", "an operator may"
        assert site.deployer.report(V2).taken_back == ""
        await site.quiet()

    run(tmp_path, machine, story)


def test_a_first_version_is_taken_back_to_the_base(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.users(*USERS)
        machine.broken.add("support-v1")
        await site.deploy(1)
        await until_back(site, V1)
        assert (site.engine.answers("support"), site.engine.answers("support@previous")) == (None, "support@v1")
        assert site.deployer.report(V1).taken_back.startswith("worse than the base, errors: ")

    run(tmp_path, machine, story)


def test_the_base_answers_again_only_where_it_did_before(tmp_path: Path, machine: ToyMachine) -> None:
    """Version 1 was taken back by hand: what version 2 replaces is the base, not what lies in `previous`."""

    async def story(site: Deployment) -> None:
        await site.deploy(1)
        assert await site.deployer.roll_back() is None
        await site.users(*USERS)
        machine.broken.add("support-v2")
        await site.deploy(2)
        await until_back(site, V2)
        assert site.engine.answers("support") is None
        await site.quiet()
        assert site.engine.adapters == {"support-v2"}

    run(tmp_path, machine, story)


@pytest.mark.parametrize("broken", [set(), {None, "support-v1", "support-v2"}])
def test_a_version_that_serves_as_the_one_before_stays(
    tmp_path: Path, machine: ToyMachine, broken: set[str | None]
) -> None:
    async def story(site: Deployment) -> None:
        machine.broken |= broken
        await site.deploy(1)
        for _ in range(4):
            await site.users(*USERS)
        await site.deploy(2)
        for _ in range(4):
            await site.users(*USERS)
        polls = machine.calls["/umbel/traffic", ""]
        await until(lambda: machine.calls["/umbel/traffic", ""] > polls + 3)
        assert site.engine.answers("support") == "support@v2"
        assert [promotion.ref for promotion in site.journal.windows.open()] == [V2]

    run(tmp_path, machine, story)


def test_bad_ratings_count_too(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        assert site.engine.router is not None
        traffic = site.engine.router.traffic

        await site.deploy(1)
        await site.deploy(2)
        answers = len(machine.generated)
        for _ in range(2):
            await site.users(*USERS)
        for number in range(answers + 1, len(machine.generated) + 1):
            if traffic.rate(f"chat-{number}", "up") == str(V2):
                traffic.rate(f"chat-{number}", "down")
        await until_back(site, V2)
        why = r"worse than support@v1, bad ratings: (\d+) of \1 against support@v1's 0 of \d+: more"
        assert re.match(why, site.deployer.report(V2).taken_back)

    run(tmp_path, machine, story)


def test_a_share_of_the_users_stays_with_what_answered_before(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        first = await site.users(*USERS)
        assert 2 <= first.count("base") <= 10
        assert set(first) == {"base", "support@v1"}
        await site.deploy(2)
        second = await site.users(*USERS)
        assert second == [{"base": "support@v1", "support@v1": "support@v2"}[label] for label in first]
        assert site.after_a_kill()[0].control == {"support": 0.3}
        assert await site.deployer.roll_back() == "support@v1"
        assert set(await site.users(*USERS)) == {"support@v1"}, "an operator's roll-back is for everybody"

    run(tmp_path, machine, story)


def test_of_too_few_users_nothing_is_told_and_the_log_says_so(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    policy(monkeypatch, rollback_window_s=0.05, min_users=20)

    async def story(site: Deployment) -> None:
        await site.deploy(1)
        await site.users(*USERS)
        await until(lambda: not site.journal.windows.open())
        assert "rollback.few_users ref=support@v1: fewer than min_users = 20" in caplog.text

    run(tmp_path, machine, story)


@pytest.mark.parametrize("off", ["no window", "over"])
def test_without_a_window_or_after_it_nothing_is_taken_back(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch, off: str
) -> None:
    policy(monkeypatch, rollback_window_s=0.0 if off == "no window" else 0.001)

    async def story(site: Deployment) -> None:
        await site.deploy(1)
        await site.users(*USERS)
        machine.broken.add("support-v2")
        await site.deploy(2)
        await site.quiet()
        for _ in range(3):
            await site.users(*USERS)
        await site.quiet()
        assert site.engine.answers("support") == "support@v2"
        assert set(await site.users(*USERS)) == {"error"}, "nobody is left with the one before"
        assert site.journal.windows.open() == []
        assert ("/umbel/traffic", "") not in machine.calls or off == "over"

    run(tmp_path, machine, story)


def test_a_window_goes_on_after_a_kill_of_the_daemon(tmp_path: Path, machine: ToyMachine) -> None:
    async def first(site: Deployment) -> None:
        await site.deploy(1)
        await site.users(*USERS)
        await site.deploy(2)
        assert [promotion.ref for promotion in site.journal.windows.open()] == [V2]

    async def second(site: Deployment) -> None:
        await site.ready()
        machine.broken.add("support-v2")
        site.resume()
        await until_back(site, V2)
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_a_window_goes_on_in_the_next_engine(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        await site.users(*USERS)
        await site.deploy(2)
        for _ in range(3):
            await site.users(*USERS)
        machine.kill()
        await site.ready(starts=2)
        machine.broken.add("support-v2")
        await until_back(site, V2)
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_a_window_of_a_version_that_never_became_live_is_closed_after_a_kill(
    tmp_path: Path, machine: ToyMachine
) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        site.push(2)
        await site.judged(V2)
        site.journal.windows.begin(Promotion(V2, V1, time.time()))
        site.resume()
        await until(lambda: not site.journal.windows.open())
        assert [version.ref for version in site.journal.versions(Lifecycle.LIVE)] == [V1]

    run(tmp_path, machine, story)
