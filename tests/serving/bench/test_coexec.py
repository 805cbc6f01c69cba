"""`umbel bench coexec` says what it cannot run before it makes or starts anything."""

from pathlib import Path
from typing import Any

import pytest

from serving.bench import coexec
from serving.bench.coexec import Order
from serving.bench.plan import FULL
from serving.bench.processes import testbed
from umbel.errors import ConfigError


def nothing() -> Any:
    pytest.fail("nothing is made before it is known that the run can begin")


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testbed, "require_machine", lambda with_priorities: None)
    (tmp_path / "blocks.jsonl").write_text("")
    with pytest.raises(ConfigError, match="go on with --resume"):
        coexec.run(tmp_path, Order(smoke=True), nothing, print)


def test_a_machine_that_is_too_small_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    with pytest.raises(ConfigError, match="cores 0 and 1"):
        coexec.run(tmp_path / "out", Order(smoke=True), nothing, print)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fact", "value"), [("load", "gamma:4"), ("trace", "other.csv"), ("site", "clinic-a")])
def test_a_run_does_not_go_on_as_another_one(tmp_path: Path, fact: str, value: str) -> None:
    facts = {"smoke": False, "trace": "azure.csv", "load": "trace", "site": None, "machine": {}}
    coexec._require_same(tmp_path / "run.json", facts)
    coexec._require_same(tmp_path / "run.json", {**facts, "machine": {"cpu": "another"}})
    with pytest.raises(ConfigError, match=f"was begun with another {fact}"):
        coexec._require_same(tmp_path / "run.json", {**facts, fact: value})


def test_blocks_may_be_longer() -> None:
    assert Order().plan == FULL
    assert (Order(window=60.0).plan.window, Order(window=60.0).plan.tuning_window) == (60.0, 60.0)
