"""Toy schedulers with umbel's hooks on them, for tests of the co-trainer.

Flower's environment reads this file, too, although it runs no test of this folder: what it lacks is imported late.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.toys.scheduler import Make


@pytest.fixture
def make(sockets: Path, tiny_llama: Path) -> Iterator["Make"]:
    from tests.toys.scheduler import schedulers

    with schedulers(sockets, tiny_llama) as build:
        yield build


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no idle hook call end because the machine is slow."""
    monkeypatch.setattr("serving.cotrainer.cotrainer.HOUSEKEEPING_S", 60.0)
