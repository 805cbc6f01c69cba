"""A version's way to its verdict: by the site's own policy, whatever the engine does meanwhile."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from client.data.prepare import Prepared
from client.heldout_looks import Look
from client.versions.version_files import directory
from serving.scores import Scores
from tests.toys.deployment import Deployment, on, quick, run, until
from tests.toys.engine import GENERATE, LOAD, ToyMachine
from umbel.adapter import AdapterRef, Lifecycle

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))
V1, V2 = (AdapterRef("support", version) for version in (1, 2))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


@pytest.mark.parametrize(
    ("losses", "policy", "decision", "reason"),
    [
        ({"support-v2": 1.9}, {}, "promote", "held-out loss 1.9000 against live's 2.0000: lower"),
        ({"support-v2": 2.0}, {}, "keep", "held-out loss 2.0000 against live's 2.0000: no clear difference"),
        ({"support-v2": 2.0}, {"max_loss_ratio": 1.02}, "promote", "held-out loss 2.0000 against 1.02 × live's 2.0000"),
        ({"support-v2": 2.1}, {}, "reject", "held-out loss 2.1000 against live's 2.0000: higher"),
        ({"support-v2": 1.0}, {"min_examples": 41}, "keep", "held-out: 40 examples are too few to tell"),
    ],
)
def test_a_verdict_is_of_the_sites_own_policy_and_moves_nothing_by_itself(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch,
    losses: dict[str, float], policy: dict[str, Any], decision: str, reason: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("UMBEL_SITE__SHADOW", json.dumps(policy))

    async def story(site: Deployment) -> None:
        site.jobs.losses = {"base": 3.0, "support-v1": 2.0, **losses}
        await site.deploy(1)
        report = await site.judged(site.push(2))
        assert report.verdict is not None
        assert (report.state, report.verdict.decision) == (Lifecycle.JUDGED, decision)
        assert report.verdict.accepted is (decision == "promote")
        assert report.verdict.reasons[0].startswith(reason)
        assert site.table().adapters["support"] == {
            "live": "support@v1", "previous": None, "shadow": "support@v2",
        }  # fmt: skip

    run(tmp_path, machine, story)


def test_verdicts_by_the_same_examples_are_counted_over_restarts(tmp_path: Path, machine: ToyMachine) -> None:
    async def reasons(site: Deployment, version: int) -> str:
        report = await site.judged(site.push(version))
        assert report.verdict is not None
        return report.verdict.reasons[0]

    async def first(site: Deployment) -> None:
        site.jobs.losses = {"support-v1": 0.9}
        assert "look" not in await reasons(site, 1)
        assert site.journal.looks.next("support", "heldout") == Look(2, 1), "it promoted"
        assert (await reasons(site, 2)).endswith("; look 2 at them")

    async def second(site: Deployment) -> None:
        assert site.journal.looks.next("support", "heldout") == Look(3, 2)
        assert (await reasons(site, 3)).endswith("; look 3 at them")
        site.jobs.data.adopt(on("others"))
        assert "look" not in await reasons(site, 4)
        assert site.journal.looks.next("other", "heldout") == Look()

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_a_version_that_is_better_but_broken_on_one_guard_is_rejected_by_its_name(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    guards = [{"name": name, "data": str(tmp_path / name)} for name in ("triage", "letters")]
    monkeypatch.setenv("UMBEL_SITE__SHADOW", json.dumps({"guard": guards}))

    async def story(site: Deployment) -> None:
        site.jobs.losses = {"base": 3.0, "support-v1": 2.0, "support-v2": 1.0, "support-v2 on letters": 1.5}
        first = await site.judged(site.push(1))
        assert first.verdict is not None
        assert first.verdict.accepted, "no worse than the base on either"
        await site.deployer.promote(V1)
        report = await site.judged(site.push(2))
        assert report.verdict is not None
        assert (report.verdict.decision, sorted(report.probe)) == ("reject", ["base", "live", "shadow"])
        assert report.verdict.reasons[0].startswith("guard letters loss 1.5000 against 1.01 × live's 1.0000: higher")
        assert site.engine.answers("support") == "support@v1"
        assert site.jobs.asked == [
            "base", "support-v1", "base on triage", "support-v1 on triage", "base on letters", "support-v1 on letters",
            "support-v2", "support-v2 on triage", "support-v2 on letters",
        ], "each is asked once"  # fmt: skip

    run(tmp_path, machine, story)


def test_a_verdict_is_against_what_answers_when_the_probe_ends(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        site.jobs.losses = {"base": 3.0, "support-v1": 1.0, "support-v2": 2.0, "support-v3": 2.5}
        for version in (1, 2):
            await site.deploy(version)
        site.jobs.gate = asyncio.Event()
        site.push(3)
        await until(lambda: site.jobs.asked[-1] == "support-v3")
        assert await site.deployer.roll_back() == "support@v1"
        site.jobs.gate.set()
        report = await site.judged(V3)
        assert report.probe["live"].loss == 1.0
        assert report.verdict is not None
        assert "against live's 1.0000: higher" in report.verdict.reasons[0]

    run(tmp_path, machine, story)


def test_a_probe_is_on_one_set_of_examples_and_no_verdict_compares_two(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        site.jobs.gate, begun = asyncio.Event(), len(site.jobs.asked)
        site.push(2)
        await until(lambda: len(site.jobs.asked) > begun)
        site.jobs.data.adopt(on("others"))
        site.jobs.gate.set()
        await site.judged(V2)
        assert set(site.jobs.measured_on) == {"heldout"}, "the probe ended with what it began with"
        assert site.journal.looks.next("support", "heldout").number == 3
        begun = len(site.jobs.asked)
        await site.judged(site.push(3))
        assert site.jobs.asked[begun:] == ["base", "support-v1", "support-v3"], "nothing of before is taken over"
        assert set(site.jobs.measured_on[begun:]) == {"others"}
        assert site.journal.looks.next("support", "others").number == 2

    run(tmp_path, machine, story)


def test_scores_of_single_examples_are_in_no_report_and_no_log(
    tmp_path: Path, machine: ToyMachine, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(site: Deployment) -> None:
        site.jobs.losses = {"base": 3.0}
        real = site.jobs.evaluate

        async def evaluate(data: Prepared, folder: Path | None, guard: str | None = None) -> Scores:
            found: Scores = await real(data, folder, guard)
            found.loss[7], found.loss[8] = found.loss[7] + 0.123456789, found.loss[8] - 0.123456789
            return found

        site.jobs.evaluate = evaluate
        with caplog.at_level("DEBUG"):
            report = await site.judged(site.push(1))
        assert "adapter.judged ref=support@v1 decision=promote" in caplog.text
        async with site.http() as http:
            shown = (await http.get("/adapters/support@v1/shadow")).text
        for text in (
            shown,
            report.model_dump_json(),
            repr(report),
            repr(await evaluate(on("heldout"), None)),
            caplog.text,
        ):
            assert "123456789" not in text
            assert "876543211" not in text

    run(tmp_path, machine, story)


def test_a_version_that_was_being_judged_is_judged_after_a_restart(tmp_path: Path, machine: ToyMachine) -> None:
    async def first(site: Deployment) -> None:
        await site.deploy(1)
        site.jobs.gate = asyncio.Event()
        site.push(2)
        await until(lambda: site.deployer.report(V2).state is Lifecycle.PROBING)

    async def second(site: Deployment) -> None:
        assert site.engine.adapters == {"support-v1"}
        site.resume()
        assert (await site.judged(V2)).state is Lifecycle.JUDGED
        await site.deployer.promote(V2, forced=True)
        assert site.engine.answers("support") == "support@v2"

    run(tmp_path, machine, first)
    run(tmp_path, machine, second)


def test_an_engine_that_dies_under_a_probe_costs_time_and_no_version(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        site.jobs.gate, site.jobs.gone = asyncio.Event(), 1
        site.push(2)
        await until(lambda: site.deployer.report(V2).state is Lifecycle.PROBING)
        machine.kill()
        await site.ready(starts=2)
        assert site.engine.answers("support") == "support@v1"
        site.jobs.gate.set()
        report = await site.judged(V2)
        assert (report.state, sorted(report.probe)) == (Lifecycle.JUDGED, ["base", "live", "shadow"])
        assert site.engine.adapters == {"support-v1", "support-v2"}

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
        assert (await site.judged(V2)).state is Lifecycle.JUDGED

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


def test_a_newer_push_supersedes_a_shadow(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        for version in (1, 2):
            site.push(version)
            await site.judged(AdapterRef("support", version))
        await site.quiet()
        old = site.deployer.report(V1)
        assert old.verdict is not None
        assert (old.state, old.verdict.reasons[0]) == (Lifecycle.REJECTED, "superseded by support@v2")
        assert site.table().adapters["support"]["shadow"] == "support@v2"
        assert site.engine.adapters == {"support-v2"}

    run(tmp_path, machine, story)


@pytest.mark.parametrize("path", [LOAD, GENERATE])
def test_what_the_engine_refuses_is_rejected_with_its_reason(tmp_path: Path, machine: ToyMachine, path: str) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        machine.refuse[path] = "no room for it"
        report = await site.judged(site.push(2))
        assert report.verdict is not None
        assert (report.state, "no room for it" in report.verdict.reasons[0]) == (Lifecycle.REJECTED, True)
        await site.quiet()
        assert site.engine.answers("support") == "support@v1"
        assert not directory(site.config, V2).exists()
        assert [v.ref for v in site.journal.versions(Lifecycle.REJECTED)] == [V2]

    run(tmp_path, machine, story)


def test_a_version_that_is_judged_twice_at_a_time_keeps_its_first_verdict(tmp_path: Path, machine: ToyMachine) -> None:
    """This happens when a version is found damaged, forgotten and pushed again while it is being judged."""

    async def story(site: Deployment) -> None:
        await site.ready()
        site.jobs.gate = asyncio.Event()
        site.push(1)
        await until(lambda: site.deployer.report(V1).state is Lifecycle.PROBING)
        site.resume()
        await until(lambda: len(site.jobs.asked) == 2)
        site.jobs.gate.set()
        report = await site.judged(V1)
        await site.quiet()
        await asyncio.sleep(0.05)
        assert (site.deployer.report(V1).state, site.deployer.report(V1)) == (Lifecycle.JUDGED, report)
        events = [event for _, event, _ in site.journal.history("support")]
        assert events.count("judged: keep") == 1

    run(tmp_path, machine, story)
