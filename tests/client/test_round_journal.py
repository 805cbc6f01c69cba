"""Rounds in a site's journal: found again by their key, never with another order, and counted across kills."""

from pathlib import Path

import pytest

from client.journal import Journal
from tests.toys.sites.journal import order
from umbel.errors import Conflict
from umbel.messages import JobState, RoundOrder, RoundReport, TrainPlan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def journal(path: Path) -> Journal:
    return Journal(path)


def test_a_round_is_found_again_by_its_key_and_only_with_the_same_order(journal: Journal) -> None:
    first = journal.rounds.add("support", order("r1"))
    assert (first.state, first.parent) == (JobState.QUEUED, "p")
    journal.rounds.report(first.model_copy(update={"state": JobState.RUNNING, "steps": 3}))
    assert journal.rounds.add("support", order("r1")).steps == 3
    for changes in ({"parent": "q"}, {"round": 2}, {"plan": TrainPlan(rank=4, steps=2, seconds=1.0)}):
        with pytest.raises(Conflict, match="r1 is already here with another parent or plan"):
            journal.rounds.add("support", order("r1", **changes))
    assert journal.rounds.get("r1")[0] == order("r1")


def test_open_rounds_are_those_that_have_not_ended_oldest_first(journal: Journal) -> None:
    for key, state in (("a", JobState.RUNNING), ("b", JobState.DONE), ("c", JobState.QUEUED), ("d", JobState.FAILED)):
        journal.rounds.report(journal.rounds.add("support", order(key)).model_copy(update={"state": state}))
    assert [open_round.key for open_round in journal.rounds.open()] == ["a", "c"]


def test_attempts_are_counted_across_kills(path: Path, journal: Journal) -> None:
    journal.rounds.add("support", order("r1"))
    assert [
        journal.rounds.begin_attempt("r1"),
        Journal(path).rounds.begin_attempt("r1"),
        journal.rounds.begin_attempt("r1"),
    ] == [1, 2, 3]


def test_excused_attempts_do_not_count_up_to_a_bound_and_across_kills(path: Path, journal: Journal) -> None:
    for key in ("r1", "r2"):
        journal.rounds.add("support", order(key))
    assert journal.rounds.begin_attempt("r1") == 1
    assert [journal.rounds.excuse_attempt("r1", most=1) for _ in range(2)] == [True, False]
    other = Journal(path).rounds
    assert [other.begin_attempt("r1"), other.begin_attempt("r1"), other.begin_attempt("r2")] == [1, 2, 1]
    assert (other.begun("r1"), other.begun("r2")) == (3, 1)


def test_orders_and_reports_of_an_older_release_are_still_read(journal: Journal) -> None:
    """An older journal holds no run, no nonce, no signature."""
    plan = TrainPlan(rank=2, steps=1, seconds=1.0)
    old_order = {"key": "r1", "base": "b", "parent": "p", "round": 1, "plan": plan.model_dump()}
    asked = RoundOrder.model_validate(old_order)
    assert (asked.run, asked.nonce, asked.kin) == ("", "", "")
    journal.rounds.add("support", asked)
    stripped = asked.model_dump_json(exclude={"run", "nonce"})
    report = journal.rounds.get("r1")[1].model_dump_json(exclude={"signature"})
    journal._db.execute("UPDATE rounds SET job = ?, report = ?", (stripped, report))
    assert journal.rounds.open() == [asked]
    assert journal.rounds.find(asked) == RoundReport(key="r1", state=JobState.QUEUED, parent="p")
