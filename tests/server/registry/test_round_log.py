"""The round log: runs keep their rounds, and a new run takes over what a killed one left."""

from pathlib import Path

from server.registry.round_log import RoundState
from tests.toys.registry import begun


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
