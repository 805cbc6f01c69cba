"""A toy scheduler on which jobs take turns after each step.

Flower's environment reads this file, too, although it runs no test of this folder: what it lacks is imported late.
"""

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.toys.scheduler import Make, ToyScheduler


@pytest.fixture
def scheduler(make: "Make", monkeypatch: pytest.MonkeyPatch) -> "ToyScheduler":
    """A busy engine that runs one quantum per iteration, each of which is said to take a second: a turn is a step."""
    monkeypatch.setattr("serving.cotrainer.jobs.turns.SWAP_PART", 1e9)
    scheduler = make()
    scheduler.grants.per_iteration = 1
    return scheduler
