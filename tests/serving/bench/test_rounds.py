"""Rounds of a block continue from each other, and each version is published while the next one is trained."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from serving.aliases import AliasTable
from serving.bench import rounds as rounds_module
from serving.bench.rounds import ADAPTER, STEPS, Published, Rounds, publications
from serving.bench.world import World
from serving.run_dir import ALIASES
from serving.trainer_socket import CoTrainerStatus, TrainJob
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import TrainingError
from umbel.messages import JobState


class ToyTrainer:
    """Writes an adapter of its own for each job, which is done at the first look."""

    def __init__(self) -> None:
        self.jobs: list[TrainJob] = []
        self.cancelled: list[str] = []
        self.ends = JobState.DONE

    async def start(self, job: TrainJob) -> CoTrainerStatus:
        self.jobs.append(job)
        Path(job.output).write_text(f"adapter {len(self.jobs)}")  # noqa: ASYNC240
        return CoTrainerStatus(job=job.id, state=JobState.RUNNING)

    async def status(self) -> CoTrainerStatus:
        return CoTrainerStatus(job=self.jobs[-1].id, state=self.ends, steps=self.jobs[-1].plan.steps)

    async def cancel(self, job: str) -> None:
        self.cancelled.append(job)


class ToyEngine:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, AdapterRef | None]] = []

    async def load(self, ref: AdapterRef, directory: Path) -> None:
        assert (directory / peft_dir.WEIGHTS).is_file()
        assert (directory / peft_dir.CONFIG).is_file()
        self.calls.append(("load", ref))

    async def warm(self, ref: AdapterRef) -> None:
        self.calls.append(("warm", ref))

    async def unload(self, ref: AdapterRef) -> None:
        self.calls.append(("unload", ref))

    async def reload_aliases(self) -> None:
        self.calls.append(("aliases", None))


@pytest.fixture
def rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rounds:
    monkeypatch.setattr(rounds_module, "POLL_S", 0.001)
    trainer: Any = ToyTrainer()
    engine: Any = ToyEngine()
    (tmp_path / "adapters").mkdir()
    return Rounds(trainer, engine, tmp_path, World.at(tmp_path / "world"), tmp_path / "adapters")


async def train(rounds: Rounds, steps: float) -> None:
    await rounds.run(steps)
    await rounds.end_window()


def test_each_round_continues_from_the_one_before_until_the_steps_are_done(rounds: Rounds) -> None:
    asyncio.run(train(rounds, 2 * STEPS + 3))
    jobs = rounds.trainer.jobs  # type: ignore[attr-defined]
    assert [job.plan.steps for job in jobs] == [STEPS, STEPS, 3]
    assert [job.plan.seed for job in jobs] == [0, 1, 2], "the same order of data in every block"
    assert jobs[0].parent == str(rounds.world.initial / peft_dir.WEIGHTS)
    assert [Path(job.parent).read_text() for job in jobs[1:]] == ["adapter 1", "adapter 2"]
    assert rounds.steps == 2 * STEPS + 3


def test_a_version_is_loaded_warmed_and_live_before_the_one_before_goes(rounds: Rounds, tmp_path: Path) -> None:
    asyncio.run(train(rounds, 2 * STEPS))
    first, second = (AdapterRef(ADAPTER, number) for number in (1, 2))
    assert rounds.engine.calls == [  # type: ignore[attr-defined]
        ("load", first), ("warm", first), ("aliases", None),
        ("load", second), ("warm", second), ("aliases", None), ("unload", first),
    ]  # fmt: skip
    assert AliasTable.read(tmp_path / ALIASES).adapters == {ADAPTER: {"live": str(second)}}
    kept = {file.stem: peft_dir.digest(file.read_bytes()) for file in rounds.kept.iterdir()}
    assert {version.digest for version in rounds.published} == set(kept)
    assert all(name == digest for name, digest in kept.items())


def test_clearing_leaves_the_initial_version_alone(rounds: Rounds, tmp_path: Path) -> None:
    async def both() -> None:
        await train(rounds, STEPS)
        await rounds.clear()

    asyncio.run(both())
    assert rounds.engine.calls[-1] == ("unload", AdapterRef(ADAPTER, 1))  # type: ignore[attr-defined]
    assert AliasTable.read(tmp_path / ALIASES).adapters == {ADAPTER: {"live": str(AdapterRef(ADAPTER, 0))}}


def test_a_round_that_fails_ends_the_block(rounds: Rounds) -> None:
    rounds.trainer.ends = JobState.FAILED  # type: ignore[attr-defined]
    with pytest.raises(TrainingError, match="round 1 of a block ended failed"):
        asyncio.run(rounds.run())


def test_publications_are_in_seconds_of_the_block() -> None:
    versions = [Published(AdapterRef(ADAPTER, number), f"d{number}", 12.0, 12.5) for number in (1, 2)]
    served, unserved = publications(versions, began=10.0, firsts={"bench@v1": 2.75})
    assert (served.digest, served.trained_at, served.live_at, served.first_token_at) == ("d1", 2.0, 2.5, 2.75)
    assert unserved.first_token_at is None
