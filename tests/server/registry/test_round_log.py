"""The round log: runs keep their rounds, and a new run takes over what a killed one left."""

import resource
from pathlib import Path

import pytest

from server.registry.index import INDEX, explained
from server.registry.round_log import RoundState, transaction
from tests.toys.registry import begun
from umbel.errors import RegistryError


def test_runs_keep_their_first_round_and_a_new_run_goes_on_after_them(tmp_path: Path) -> None:
    rounds = begun(tmp_path).rounds
    assert rounds.begin_run("one", "support", "plan") == 1
    rounds.record("support", 1, "one", RoundState.FAILED, reasons={"*": "x"})
    rounds.record("support", 2, "one", RoundState.TRAINING)
    assert rounds.begin_run("one", "support", "plan") == 1
    assert rounds.begin_run("two", "support", "another plan") == 3
    closed = rounds.find("support", 2)
    assert closed.state is RoundState.FAILED
    assert "run one ended" in closed.reasons["*"]


def test_a_new_run_with_the_same_plan_takes_over_the_round_in_training(tmp_path: Path) -> None:
    rounds = begun(tmp_path).rounds
    rounds.begin_run("one", "support", "plan")
    rounds.record("support", 1, "one", RoundState.TRAINING)
    assert rounds.begin_run("two", "support", "plan") == 1
    assert rounds.find("support", 1).state is RoundState.TRAINING


def test_a_full_disk_is_said_and_the_log_goes_on_once_there_is_room(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    rounds, database = registry.rounds, registry.index.database
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, ((tmp_path / f"{INDEX}-wal").stat().st_size, hard))
    try:
        with pytest.raises(RegistryError, match=r"cannot be written .*; make room on its disk"), explained(tmp_path):
            rounds.begin_run("one", "support", "plan")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not database.in_transaction
    with transaction(database):
        rounds.record("support", 1, "one", RoundState.TRAINING)
    assert rounds.begin_run("one", "support", "plan") == 2
