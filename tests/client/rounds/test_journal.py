"""Rounds in a site's journal: found again by their key, never with another order, and counted across kills."""

import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from client import journal as journal_module
from client.journal import Journal
from tests.toys.sites.journal import order
from umbel.errors import Conflict, JournalError, NotFound
from umbel.messages import JobState, RoundOrder, RoundReport, TrainPlan


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def journal(path: Path) -> Journal:
    return Journal(path)


def test_a_round_is_found_again_by_its_key_and_only_with_the_same_order(journal: Journal) -> None:
    first = journal.rounds("support").add(order("r1"))
    assert (first.state, first.parent) == (JobState.QUEUED, "p")
    journal.rounds("support").report(first.model_copy(update={"state": JobState.RUNNING, "steps": 3}))
    assert journal.rounds("support").add(order("r1")).steps == 3
    for changes in ({"parent": "q"}, {"round": 2}, {"plan": TrainPlan(rank=4, steps=2, seconds=1.0)}):
        with pytest.raises(Conflict, match="r1 is already here with another parent or plan"):
            journal.rounds("support").add(order("r1", **changes))
    assert journal.rounds("support").get("r1")[0] == order("r1")


def test_open_rounds_are_those_that_have_not_ended_oldest_first(journal: Journal) -> None:
    for key, state in (("a", JobState.RUNNING), ("b", JobState.DONE), ("c", JobState.QUEUED), ("d", JobState.FAILED)):
        journal.rounds("support").report(journal.rounds("support").add(order(key)).model_copy(update={"state": state}))
    assert [open_round.key for open_round in journal.rounds("support").open()] == ["a", "c"]


def test_attempts_are_counted_across_kills(path: Path, journal: Journal) -> None:
    journal.rounds("support").add(order("r1"))
    assert [
        journal.rounds("support").begin_attempt("r1"),
        Journal(path).rounds("support").begin_attempt("r1"),
        journal.rounds("support").begin_attempt("r1"),
    ] == [1, 2, 3]


def test_excused_attempts_do_not_count_up_to_a_bound_and_across_kills(path: Path, journal: Journal) -> None:
    for key in ("r1", "r2"):
        journal.rounds("support").add(order(key))
    assert journal.rounds("support").begin_attempt("r1") == 1
    assert [journal.rounds("support").excuse_attempt("r1", most=1) for _ in range(2)] == [True, False]
    other = Journal(path).rounds("support")
    assert [other.begin_attempt("r1"), other.begin_attempt("r1"), other.begin_attempt("r2")] == [1, 2, 1]
    assert (other.begun("r1"), other.begun("r2")) == (3, 1)


def test_orders_and_reports_of_an_older_release_are_still_read(journal: Journal) -> None:
    """An older journal holds no run, no nonce, no signature."""
    plan = TrainPlan(rank=2, steps=1, seconds=1.0)
    old_order = {"key": "r1", "base": "b", "parent": "p", "round": 1, "plan": plan.model_dump()}
    asked = RoundOrder.model_validate(old_order)
    assert (asked.run, asked.nonce, asked.kin) == ("", "", "")
    journal.rounds("support").add(asked)
    stripped = asked.model_dump_json(exclude={"run", "nonce"})
    report = journal.rounds("support").get("r1")[1].model_dump_json(exclude={"signature"})
    journal._db.execute("UPDATE rounds SET job = ?, report = ?", (stripped, report))
    assert journal.rounds("support").open() == [asked]
    assert journal.rounds("support").find(asked) == RoundReport(key="r1", state=JobState.QUEUED, parent="p")


OLD_RELEASE = """
CREATE TABLE versions (
    adapter TEXT NOT NULL, version INTEGER NOT NULL, digest TEXT NOT NULL, state TEXT NOT NULL,
    manifest TEXT NOT NULL, report TEXT NOT NULL, changed REAL NOT NULL, PRIMARY KEY (adapter, version));
CREATE TABLE aliases (
    adapter TEXT NOT NULL, alias TEXT NOT NULL, version INTEGER NOT NULL, PRIMARY KEY (adapter, alias));
CREATE TABLE history (at REAL NOT NULL, adapter TEXT NOT NULL, event TEXT NOT NULL, version INTEGER);
CREATE TABLE rounds (
    key TEXT PRIMARY KEY, adapter TEXT NOT NULL, state TEXT NOT NULL, job TEXT NOT NULL, report TEXT NOT NULL,
    attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL);
CREATE TABLE excused (key TEXT PRIMARY KEY, attempts INTEGER NOT NULL);
"""
"""A journal's tables as the release before several adapters made them."""


def old_journal(path: Path) -> None:
    """Write the journal of a site with one adapter: a round that ended, and one that was begun twice, once excused."""
    with closing(sqlite3.connect(path)) as database, database:
        database.executescript(OLD_RELEASE)
        for number, (key, state, attempts) in enumerate((("r1", JobState.DONE, 1), ("r2", JobState.RUNNING, 2))):
            report = RoundReport(key=key, state=state, parent="p").model_dump_json()
            database.execute(
                "INSERT INTO rounds VALUES (?, 'support', ?, ?, ?, ?, ?)",
                (key, state, order(key).model_dump_json(), report, attempts, float(number)),
            )
        database.execute("INSERT INTO excused VALUES ('r2', 1)")


def test_the_journal_of_a_site_with_one_adapter_goes_on(path: Path) -> None:
    old_journal(path)
    for _ in range(2):  # opened again, nothing is changed once more
        journal = Journal(path)
        rounds = journal.rounds("support")
        assert (rounds.finished(), rounds.open()) == (["r1"], [order("r2")])
        assert journal.known_rounds() == [("support", "r1"), ("support", "r2")]
        assert rounds.begun("r2") == 2
        journal.close()
    assert Journal(path).rounds("support").begin_attempt("r2") == 2, "three were begun, and one does not count"


def test_a_crash_while_the_journal_is_brought_up_leaves_the_old_one(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old_journal(path)
    with monkeypatch.context() as patch:
        patch.setattr(journal_module, "SHAPES", (*journal_module.SHAPES, "DROP TABLE rounds; NO SUCH STATEMENT"))
        with pytest.raises(JournalError, match="syntax error"):
            Journal(path)
    assert Journal(path).known_rounds() == [("support", "r1"), ("support", "r2")]


def test_a_journal_of_a_later_release_is_not_touched(path: Path) -> None:
    Journal(path).close()
    with closing(sqlite3.connect(path)) as database, database:
        database.execute("PRAGMA user_version = 9")
    before = path.read_bytes()
    with pytest.raises(JournalError, match="a later release of umbel has changed it"):
        Journal(path)
    assert path.read_bytes() == before


def test_the_same_key_for_two_adapters_is_two_rounds(path: Path) -> None:
    journal = Journal(path)
    for adapter, steps in (("support", 1), ("billing", 2)):
        rounds = journal.rounds(adapter)
        rounds.report(rounds.add(order("r1")).model_copy(update={"state": JobState.DONE, "steps": steps}))
        rounds.begin_attempt("r1")
    assert [journal.rounds(adapter).get("r1")[1].steps for adapter in ("support", "billing")] == [1, 2]
    assert journal.rounds("support").begun("r1") == 1
    with pytest.raises(NotFound, match="round r1 of triage is not known"):
        journal.rounds("triage").get("r1")
