"""The co-trainer of a site's rounds, a toy, and the runs of a daemon over it.

Flower's environment reads this file, too, although it runs no test of this folder: what it lacks is imported late.
"""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.toys.cotrainer import Run, ToyCoTrainer


@pytest.fixture
def cotrainer() -> "ToyCoTrainer":
    from tests.toys.cotrainer import ToyCoTrainer

    return ToyCoTrainer()


@pytest.fixture
def run(tmp_path: Path, cotrainer: "ToyCoTrainer", monkeypatch: pytest.MonkeyPatch) -> "Run":
    from tests.toys.cotrainer import runner

    return runner(tmp_path, cotrainer, monkeypatch)
