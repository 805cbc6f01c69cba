"""The status of a running site, from its journal, router and co-trainer; SGLang and training are toys."""

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from client import site_status
from client.data.in_use import DataInUse
from client.data.prepare import Prepared
from client.data.summary import DATA, HELD_OUT, Asked, Summary
from client.heldout_looks import Look
from serving.trainer_socket import CoTrainerStatus
from tests.toys.deployment import Deployment, quick, run
from tests.toys.engine import ToyMachine
from umbel.errors import TrainingError
from umbel.messages import Evaluation, JobState, RoundReport


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    machine = ToyMachine()
    quick(monkeypatch, machine)
    return machine


class CoTrainer:
    """Answers as it is told."""

    def __init__(self, answer: CoTrainerStatus | TrainingError) -> None:
        self.answer = answer

    async def status(self, timeout_s: float = 0.0, job: str | None = None) -> CoTrainerStatus:
        if isinstance(self.answer, TrainingError):
            raise self.answer
        return self.answer


PREPARED = Prepared(
    Path("train.npy"), Path("eval.npy"), 80, 12, 900,
    files={DATA: Summary(
        examples=100, refused=0, cut=20, dropped=8, untold=1, repeated=0, groups=100, largest_group=1, unending=0,
        loss_tokens=900, median=20, p95=40, longest=600, padding=0.9,
    )},
    asked={HELD_OUT: Asked(12, 12.0)}, withheld={DATA: 3}, heldout="asked",
)  # fmt: skip
RUNNING = RoundReport(key="l-5-p", state=JobState.RUNNING, parent="p", loss_sum=float("nan"))
KNOWN = CoTrainer(CoTrainerStatus(latency_known=True))


async def asked(site: Deployment, cotrainer: Any, prepared: Prepared = PREPARED) -> dict[str, Any]:
    tenant: Any = SimpleNamespace(
        name="support",
        prepared=prepared,
        share=2.0,
        jobs=SimpleNamespace(running=RUNNING, measured=SimpleNamespace(told="no round yet")),
        fresh=SimpleNamespace(data=DataInUse(prepared)),
    )
    return await site_status.report(site.config, [tenant], {"support": 1.5}, site.supervisor, site.served, cotrainer)


def test_it_says_what_answers_and_why_and_what_is_in_flight(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        site.jobs.losses = {"support-v1": 0.5, "support-v2": 2.0}
        await site.deploy(1)
        await site.judged(site.push(2))
        site.engine.router.in_flight["support@v1"] += 2
        said = await asked(site, KNOWN)
        assert said["engine"]["starts"] == 1
        assert said["engine"]["since"] == site.supervisor.started_at is not None
        assert said["aliases"] == {"support": {"live": "support@v1", "previous": None, "shadow": "support@v2"}}
        assert said["answering"]["support"]["event"] == "promoted"
        assert said["events"]["support"]["judged: promote"] == 1
        assert said["events"]["support"]["judged: reject"] == 1
        assert said["in_flight"] == {"support@v1": 2}
        assert said["training"]["latency_known"] is True
        assert said["training_shares"] == {"support": {"share": 2.0, "worth": 1.5}}
        assert said["running_rounds"]["support"]["loss_sum"] == "NaN"
        assert said["versions"]["support@v2"]["verdict"]["decision"] == "reject"

    run(tmp_path, machine, story)


def test_it_says_what_of_the_prepared_data_will_bite(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        data = json.loads(json.dumps((await asked(site, KNOWN))["data"]["support"]))
        assert {key: data[key] for key in ("train", "held_out", "withheld", "cut", "dropped", "untold")} == {
            "train": 80, "held_out": 12, "withheld": 3, "cut": 20, "dropped": 8, "untold": 1,
        }  # fmt: skip
        assert data["files"]["[training].data"]["longest"] == 600
        cut, few = data["will_bite"]
        assert cut.startswith("12 of 100 examples of [training].data are cut at [training].seq_len")
        assert few.startswith("12 held-out examples are fewer than")

    run(tmp_path, machine, story)


def test_it_says_how_often_the_held_out_examples_were_looked_at(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        site.jobs.losses = {"support-v1": 0.5, "support-v2": 2.0, "support-v3": 2.0}

        async def looks(heldout: str) -> dict[str, Any]:
            prepared = replace(PREPARED, heldout=heldout)
            said = await asked(site, KNOWN, prepared)
            found: dict[str, Any] = said["heldout_looks"]["support"]
            return found

        alpha = (1 - site.config.shadow.confidence) / 2
        first = {"verdicts": 0, "since_promotion": 0, "next_level": Look().level(alpha), "due": False}
        assert await looks(site.jobs.data.current.heldout) == first
        await site.deploy(1)
        assert await looks(site.jobs.data.current.heldout) == {**first, "verdicts": 1}, "it promoted"
        for version in (2, 3):
            await site.judged(site.push(version))
        assert await looks(site.jobs.data.current.heldout) == {
            "verdicts": 3, "since_promotion": 2, "next_level": pytest.approx(first["next_level"] / 9), "due": False,
        }  # fmt: skip
        assert await looks("others") == first

    run(tmp_path, machine, story)


def test_an_engine_that_is_dying_or_gone_leaves_the_rest_true(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        await site.deploy(1)
        site.engine.ended.set()
        said = await asked(site, CoTrainer(TrainingError("no answer")))
        assert said["in_flight"] == {}
        assert said["training"] in (None, {"job": None, "error": "no answer"})
        machine.gates["start"] = asyncio.Event()
        while site.supervisor.engine is not None:
            await asyncio.sleep(0.002)
        said = await asked(site, KNOWN)
        assert said["engine"] == {"ready": False, "starts": 1, "since": None, "url": None}
        assert (said["training"], said["in_flight"]) == (None, {})
        assert said["aliases"]["support"]["live"] == "support@v1"
        machine.gates["start"].set()

    run(tmp_path, machine, story)


def test_a_loss_that_is_no_number_is_still_json(tmp_path: Path, machine: ToyMachine) -> None:
    evaluation = Evaluation(loss_sum=float("nan"), loss_tokens=1, exact=0, examples=1)
    status = CoTrainerStatus(job="evaluate-1", loss_sum=float("nan"), evaluation=evaluation)
    supervisor: Any = SimpleNamespace(engine=object())
    said = asyncio.run(site_status._training(supervisor, CoTrainer(status)))  # type: ignore[arg-type]
    assert said["evaluation"]["loss_sum"] == "NaN"
