"""`bench_schedulers`: toy engines with the benchmark's co-trainer in them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from serving.bench.systems import (
    BenchCoTrainer,
    UseSystem,
)
from serving.cotrainer.hooks import Hooks
from tests.toys import scheduler as toy_scheduler
from tests.toys.scheduler import ToyScheduler


@contextmanager
def bench_schedulers(
    run_dir: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], ToyScheduler]]:
    """Give a function that makes toy engines with the benchmark's co-trainer; they are closed at the end."""
    monkeypatch.setattr(toy_scheduler, "Hooks", lambda run_dir: Hooks(run_dir, BenchCoTrainer))
    made: list[ToyScheduler] = []

    def build() -> ToyScheduler:
        made.append(ToyScheduler(run_dir, model))
        return made[-1]

    yield build
    for scheduler in made:
        if bench(scheduler).system.policy == "unpaced":
            scheduler.tell(UseSystem(policy="rest"))
        scheduler.close()


def bench(scheduler: ToyScheduler) -> BenchCoTrainer:
    assert isinstance(scheduler.cotrainer, BenchCoTrainer)
    return scheduler.cotrainer
