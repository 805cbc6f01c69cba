"""Rounds of which a part stays at the site: it is trained along, is never sent, and moves with a round that is done."""

import asyncio
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.rounds.folder import PERSONAL, UPDATE
from client.rounds.measured_round import Trained
from client.rounds.personal import PersonalPart, first, join
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from tests.toys.cotrainer import PARENT, Queue, Run, ToyCoTrainer, order
from tests.toys.deployment import RANK, adapter, until
from tests.toys.engine import site_config
from umbel import peft_dir
from umbel.adapter import Personal
from umbel.errors import AdapterError, NotFound
from umbel.messages import JobState
from umbel.peft_dir import Tensors

B, OWN = Personal(part="B"), Personal(part="adapter", rank=2)
BOTH = pytest.mark.parametrize("personal", [B, OWN], ids=["fedsa", "dual"])
RECEIVED = peft_dir.decode(PARENT)


class Stepping(ToyCoTrainer):
    """Training that adds 1 to every number it starts from."""

    def __init__(self) -> None:
        super().__init__()
        self.orders: list[TrainJob] = []

    async def start(self, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        if isinstance(job, TrainJob):
            self.orders.append(job)
        return await super().start(job)

    def ended(self, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        """End the job now, as the co-trainer would, even if `hold` is not set."""
        return self._ended(self._statuses[job.id], job)

    def _ended(self, status: CoTrainerStatus, job: TrainJob | EvaluateJob) -> CoTrainerStatus:
        status = super()._ended(status, job)
        if isinstance(job, TrainJob) and status.state is JobState.DONE:
            trained = peft_dir.decode(Path(job.output).read_bytes())
            Path(job.output).write_bytes(peft_dir.encode(plus(trained, 1)))
        return status


@pytest.fixture
def cotrainer() -> Stepping:
    return Stepping()


def plus(tensors: Tensors, steps: int) -> Tensors:
    return {name: array + np.float32(steps) for name, array in tensors.items()}


def start_of(job: TrainJob) -> bytes:
    """Return the adapter that a job starts from."""
    return Path(job.parent).read_bytes()


def part(state_dir: Path, personal: Personal, lineage: str = "mine") -> PersonalPart:
    return PersonalPart(site_config(state_dir), "support", lineage, personal)


def kept(state_dir: Path, personal: Personal, lineage: str = "mine") -> bytes | None:
    found = part(state_dir, personal, lineage).read(RECEIVED)
    return None if found is None else peft_dir.encode(found)


def after(personal: Personal, steps: int) -> bytes:
    """The site's part after so many rounds that add 1."""
    own = first(RECEIVED, personal, "0 clinic-a")
    for _ in range(steps):
        own = plus(own, 1)
    return peft_dir.encode(own)


def submit(queue: Queue, number: int, personal: Personal, lineage: str = "mine") -> str:
    key = f"{lineage}-{number}-p"
    queue.submit(key, round=number, plan={"personal": personal})
    return key


@BOTH
def test_a_round_trains_the_join_and_sends_the_shared_part_alone(
    run: Run, tmp_path: Path, cotrainer: Stepping, personal: Personal
) -> None:
    async def story(queue: Queue) -> None:
        key = submit(queue, 1, personal)
        report = await queue.ended(key)
        assert (report.state, report.error, report.rank) == (JobState.DONE, "", RANK), "the shared rank is what counts"
        (asked,) = cotrainer.orders
        assert (asked.plan.rank, asked.plan.personal) == (RANK + personal.rank, None)
        own = first(RECEIVED, personal, "0 clinic-a")
        assert start_of(asked) == peft_dir.encode(join(RECEIVED, own, personal))
        sent = peft_dir.decode(queue.jobs.update(key))
        assert report.update == peft_dir.digest(queue.jobs.update(key))
        for name, array in RECEIVED.items():
            stays = personal is B and "lora_B" in name
            assert np.array_equal(sent[name], array if stays else array + np.float32(1))
        assert sent.keys() == RECEIVED.keys()
        assert kept(tmp_path, personal) == after(personal, 1)
        assert queue.submit(key, round=1, plan={"personal": personal}) == report, "asking again changes nothing"
        assert kept(tmp_path, personal) == after(personal, 1)

    run(story)


@BOTH
def test_the_next_round_goes_on_from_the_part_and_another_registry_begins_its_own(
    run: Run, tmp_path: Path, personal: Personal
) -> None:
    async def one(queue: Queue) -> None:
        await queue.ended(submit(queue, 1, personal))

    async def two(queue: Queue) -> None:
        await queue.ended(submit(queue, 2, personal))
        assert kept(tmp_path, personal) == after(personal, 2)
        await queue.ended(submit(queue, 1, personal, "other"))

    run(one)
    run(two)
    assert kept(tmp_path, personal, "other") == after(personal, 1)
    assert kept(tmp_path, personal) == after(personal, 2)


@BOTH
def test_a_round_that_fails_or_is_cancelled_does_not_move_the_part(
    run: Run, tmp_path: Path, cotrainer: Stepping, personal: Personal
) -> None:
    async def story(queue: Queue) -> None:
        await queue.ended(submit(queue, 1, personal))
        cotrainer.fails_with = "out of memory"
        assert (await queue.ended(submit(queue, 2, personal))).state is JobState.FAILED
        cotrainer.fails_with, cotrainer.value = "", float("nan")
        report = await queue.ended(submit(queue, 3, personal))
        assert (report.state, "holds NaN" in report.error) == (JobState.FAILED, True)
        cotrainer.value, cotrainer.hold = None, asyncio.Event()
        key = submit(queue, 4, personal)
        await until(lambda: cotrainer.started[-1] == key)
        await queue.jobs.cancel(key)
        cotrainer.hold.set()
        assert kept(tmp_path, personal) == after(personal, 1)
        await queue.ended(submit(queue, 5, personal))
        assert kept(tmp_path, personal) == after(personal, 2), "the next one goes on from the last that was done"

    run(story)


@BOTH
def test_a_round_begun_again_after_a_kill_trains_from_the_same_join(
    run: Run, tmp_path: Path, cotrainer: Stepping, personal: Personal
) -> None:
    joins: list[bytes] = []

    async def killed_before_its_end_is_written_down(queue: Queue) -> None:
        await queue.ended(submit(queue, 1, personal))
        cotrainer.hold = asyncio.Event()
        key = submit(queue, 2, personal)
        await until(lambda: cotrainer.started[-1] == key)
        joins.append(start_of(cotrainer.orders[-1]))
        order, status = queue.journal.rounds("support").get(key)[0], cotrainer.ended(cotrainer.orders[-1])
        queue.jobs._conclude(order, Trained.of(status), queue.jobs.data.current)
        assert (tmp_path / "rounds" / "support" / key / PERSONAL).exists()

    async def next_daemon(queue: Queue) -> None:
        assert kept(tmp_path, personal) == after(personal, 1)
        cotrainer.forget()
        cotrainer.hold = None
        assert (await queue.ended("mine-2-p")).state is JobState.DONE
        joins.append(start_of(cotrainer.orders[-1]))
        assert kept(tmp_path, personal) == after(personal, 2), "once, not twice"

    run(killed_before_its_end_is_written_down)
    run(next_daemon)
    assert joins[0] == joins[1]


def test_a_part_is_kept_at_the_next_start_if_a_kill_came_between(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def killed(queue: Queue) -> None:
        monkeypatch.setattr(queue.jobs, "_settle", lambda key: None)
        assert (await queue.ended(submit(queue, 1, OWN))).state is JobState.DONE
        assert kept(tmp_path, OWN) is None

    async def next_daemon(queue: Queue) -> None:
        await until(lambda: kept(tmp_path, OWN) == after(OWN, 1))
        assert not (tmp_path / "rounds" / "support" / "mine-1-p" / PERSONAL).exists()

    run(killed)
    run(next_daemon)


def test_a_round_cancelled_after_a_kill_leaves_nothing_behind(run: Run, tmp_path: Path, cotrainer: Stepping) -> None:
    async def killed(queue: Queue) -> None:
        cotrainer.hold = asyncio.Event()
        key = submit(queue, 1, OWN)
        await until(lambda: cotrainer.started[-1:] == [key])
        order, status = queue.journal.rounds("support").get(key)[0], cotrainer.ended(cotrainer.orders[-1])
        queue.jobs._conclude(order, Trained.of(status), queue.jobs.data.current)

    async def cancelling(queue: Queue) -> None:
        cotrainer.forget()
        await queue.jobs.cancel("mine-1-p")

    async def third(queue: Queue) -> None:
        await until(lambda: not (tmp_path / "rounds" / "support" / "mine-1-p" / PERSONAL).exists())
        assert kept(tmp_path, OWN) is None

    run(killed)
    run(cancelling)
    run(third)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"plan": {"personal": Personal(part="adapter", rank=3)}}, "joined to one of rank 5, over .*max_lora_rank = 4"),
        ({"plan": {"personal": OWN}, "key": "damaged-1-p"}, "this site's own part is damaged"),
    ],
)
def test_a_round_that_cannot_be_joined_is_refused_and_nothing_is_stored(
    run: Run, tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    part(tmp_path, OWN, "damaged").keep(RECEIVED, b"half a file")

    async def story(queue: Queue) -> None:
        asked = order(**{"key": "mine-1-p", **changes})
        with pytest.raises(AdapterError, match=reason):
            queue.jobs.submit(asked, PARENT)
        with pytest.raises(NotFound):
            queue.jobs.report(asked.key)
        assert not (tmp_path / "rounds").exists()

    run(story)


def test_a_round_of_which_nothing_stays_has_no_more_files_than_before(run: Run, tmp_path: Path) -> None:
    async def story(queue: Queue) -> None:
        queue.submit("mine-1-p", adapter(1))
        await queue.ended("mine-1-p")
        names = {file.name for file in (tmp_path / "rounds" / "support" / "mine-1-p").iterdir()}
        assert names == {"parent.safetensors", UPDATE}
        assert not (tmp_path / "personal").exists()

    run(story)
