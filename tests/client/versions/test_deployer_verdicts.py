"""What a site makes of a version that it was sent: its own policy, its guards, and what it keeps to itself."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from serving.scores import Scores
from tests.toys.deployment import Deployment, quick, run, until
from tests.toys.engine import ToyMachine
from umbel.adapter import AdapterRef
from umbel.messages import ShadowState

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))


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
        assert (report.state, report.verdict.decision) == (ShadowState.JUDGED, decision)
        assert report.verdict.accepted is (decision == "promote")
        assert report.verdict.reasons[0].startswith(reason)
        assert site.deployer.loading.table().adapters["support"] == {
            "live": "support@v1", "previous": None, "shadow": "support@v2",
        }  # fmt: skip

    run(tmp_path, machine, story)


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
        assert await site.deployer.roll_back("support") == "support@v1"
        site.jobs.gate.set()
        report = await site.judged(V3)
        assert report.probe["live"].loss == 1.0
        assert report.verdict is not None
        assert "against live's 1.0000: higher" in report.verdict.reasons[0]

    run(tmp_path, machine, story)


def test_scores_of_single_examples_are_in_no_report_and_no_log(
    tmp_path: Path, machine: ToyMachine, caplog: pytest.LogCaptureFixture
) -> None:
    async def story(site: Deployment) -> None:
        site.jobs.losses = {"base": 3.0}
        real = site.jobs.evaluate

        async def evaluate(folder: Path | None, guard: str | None = None) -> Scores:
            found: Scores = await real(folder, guard)
            found.loss[7], found.loss[8] = found.loss[7] + 0.123456789, found.loss[8] - 0.123456789
            return found

        site.jobs.evaluate = evaluate
        with caplog.at_level("DEBUG"):
            report = await site.judged(site.push(1))
        assert "adapter.judged ref=support@v1 decision=promote" in caplog.text
        async with site.http() as http:
            shown = (await http.get("/adapters/support@v1/shadow")).text
        for text in (shown, report.model_dump_json(), repr(report), repr(await evaluate(None)), caplog.text):
            assert "123456789" not in text
            assert "876543211" not in text

    run(tmp_path, machine, story)
