"""The strategy that docs/strategies.md shows, as it stands there."""

import importlib
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from scripts.tools.repository import REPOSITORY
from strategies import catalogue
from tests.toys.adapters import adapter, moved, update

PAGE = REPOSITORY / "docs" / "strategies.md"


def test_the_page_names_every_strategy() -> None:
    assert set(re.findall(r"^\| `(\w+)`.*strategies/\w+\.py", PAGE.read_text(), re.M)) == set(catalogue.STRATEGIES)


def test_the_pages_own_strategy_runs_and_has_at_most_twenty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    (tmp_path / "own_median.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    strategy = catalogue.find("own_median:FactorMedian")(norm_clip=2.0)
    parent = adapter()
    trained = [moved(parent, seed) for seed in range(3)]
    result = strategy.aggregate(parent, [update(f"site-{i}", parent, one) for i, one in enumerate(trained)])
    for name, array in result.tensors.items():
        assert np.array_equal(array, np.median([one[name] for one in trained], axis=0))
    assert result.weights == pytest.approx({f"site-{i}": 1 / 3 for i in range(3)})
    del sys.modules["own_median"]
