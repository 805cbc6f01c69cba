"""Toy schedulers with umbel's hooks on them, for tests of the co-trainer."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.cotrainer import cotrainer
from tests.toys.scheduler import Make, schedulers


@pytest.fixture
def make(sockets: Path, tiny_llama: Path) -> Iterator[Make]:
    with schedulers(sockets, tiny_llama) as build:
        yield build


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no idle hook call end because the machine is slow."""
    monkeypatch.setattr(cotrainer, "HOUSEKEEPING_S", 60.0)
