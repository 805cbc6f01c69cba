"""The site's memory: every change is whole, survives a kill, and nothing is used twice."""

import sqlite3
from pathlib import Path

import pytest

from client.journal import LIVE_AGAIN, ROLLED_BACK, Journal
from tests.toys.sites.journal import V1, V2, V3, judge, make_live, manifest, order, report
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import AdapterError, Conflict, NotFound
from umbel.messages import Evaluation


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def journal(path: Path) -> Journal:
    return Journal(path)


def aliases(journal: Journal) -> tuple[AdapterRef | None, AdapterRef | None]:
    return journal.alias("support", "live"), journal.alias("support", "previous")


def test_what_was_entered_is_there_after_a_kill(path: Path, journal: Journal) -> None:
    """A second journal over the same file, while the first was never closed."""
    probe = {"shadow": Evaluation(loss_sum=1.5, loss_tokens=2, exact=1, examples=3)}
    make_live(journal, V1)
    journal.add(manifest(V2), report(V2))
    judge(journal, V2, probe=probe)
    journal.rounds("support").add(order("r1"))
    other = Journal(path)
    assert other.versions() == journal.versions()
    assert [(v.ref, v.state) for v in other.versions()] == [(V1, Lifecycle.LIVE), (V2, Lifecycle.JUDGED)]
    assert other.get(V2).report.probe == probe
    assert aliases(other) == (V1, None)
    assert other.rounds("support").open() == [order("r1")]


def test_a_version_is_entered_once_and_never_with_other_weights(journal: Journal) -> None:
    journal.add(manifest(V1), report(V1))
    journal.move(V1, report(V1, Lifecycle.PROBING))
    journal.add(manifest(V1), report(V1))
    assert journal.get(V1).state is Lifecycle.PROBING, "entering it again is no change"
    with pytest.raises(Conflict, match="support@v1 is already here with other weights"):
        journal.add(manifest(V1, digest="f" * 64), report(V1))
    assert journal.get(V1).manifest == manifest(V1)


def test_what_is_not_known_is_not_found(journal: Journal) -> None:
    assert journal.find(V1) is None
    for ask in (lambda: journal.get(V1), lambda: journal.move(V1, report(V1, Lifecycle.PROBING))):
        with pytest.raises(NotFound, match="push it as a shadow first"):
            ask()
    with pytest.raises(NotFound, match="submit it again"):
        journal.rounds("support").get("r1")
    assert aliases(journal) == (None, None)


def test_a_move_that_its_life_does_not_allow_changes_nothing(journal: Journal) -> None:
    journal.add(manifest(V1), report(V1))
    with pytest.raises(AdapterError, match="candidate version cannot become live"):
        journal.make_live(V1, "promoted")
    assert (journal.get(V1).state, aliases(journal)) == (Lifecycle.CANDIDATE, (None, None))
    assert [event for _, event, _ in journal.history("support")] == ["candidate"]


def test_promotions_and_roll_backs_keep_live_and_previous(journal: Journal) -> None:
    seen = []
    for ref in (V1, V2, V3, V2, V3):
        make_live(journal, ref, "promoted" if journal.find(ref) is None else "rolled back")
        seen.append(aliases(journal))
        assert [v.ref for v in journal.versions(Lifecycle.LIVE)] == [ref], "exactly one is live"
    assert seen == [(V1, None), (V2, V1), (V3, V2), (V2, V3), (V3, V2)]


@pytest.mark.parametrize("statement", range(1, 12))
def test_a_kill_within_a_promotion_leaves_the_state_before_it(
    path: Path, journal: Journal, statement: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is gone at the n-th statement that writes: nothing of the promotion is there."""
    make_live(journal, V1)
    journal.add(manifest(V2), report(V2))
    judge(journal, V2)
    before = (aliases(journal), journal.versions(), journal.history("support"))
    dying = Dying(journal._db, statement)
    monkeypatch.setattr(journal, "_db", dying)
    try:
        journal.make_live(V2, "promoted")
    except sqlite3.OperationalError:
        journal = Journal(path)
        assert (aliases(journal), journal.versions(), journal.history("support")) == before
    else:
        assert dying.left > 0, "all statements went through"
        assert aliases(Journal(path)) == (V2, V1)


class Dying:
    """A connection that breaks, for good, at its n-th statement that changes something."""

    def __init__(self, database: sqlite3.Connection, statements: int) -> None:
        self.database, self.left = database, statements

    def execute(self, sql: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        if sql.split()[0] in ("INSERT", "UPDATE", "COMMIT"):
            self.left -= 1
            if self.left <= 0:
                self.database.close()
        if sql == "ROLLBACK" and self.left <= 0:
            raise sqlite3.OperationalError("killed")
        try:
            return self.database.execute(sql, values)
        except sqlite3.ProgrammingError as error:
            raise sqlite3.OperationalError("killed") from error


def test_history_is_newest_first_and_limited(journal: Journal) -> None:
    for ref in (V1, V2):
        make_live(journal, ref)
    events = [(event, version) for _, event, version in journal.history("support", limit=3)]
    assert events == [("promoted", 2), ("live", 2), ("retired", 1)]
    assert journal.history("other") == []


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_probe_that_brought_no_number_can_be_read_back(journal: Journal, loss: float) -> None:
    """An adapter of finite but huge weights gives such a loss; unreadable, it would stop `umbel serve` for good."""
    journal.add(manifest(V1), report(V1))
    probe = {"shadow": Evaluation(loss_sum=loss, loss_tokens=2, exact=0, examples=3)}
    judge(journal, V1, probe=probe)
    assert journal.versions()[0].ref == V1


def test_where_the_base_answered_nothing_is_previous(journal: Journal) -> None:
    make_live(journal, V1)
    journal.make_base_live(V1)
    assert aliases(journal) == (None, V1)
    make_live(journal, V2)
    assert aliases(journal) == (V2, None)


def test_what_the_site_went_back_from_does_not_answer_again_by_a_damage(journal: Journal) -> None:
    for ref in (V1, V2):
        make_live(journal, ref)
    journal.make_live(V1, LIVE_AGAIN, left=ROLLED_BACK)
    assert aliases(journal) == (V1, V2)
    journal.forget(V1, "forgotten: its files are damaged")
    assert aliases(journal) == (None, V2), "the base"


def test_a_version_has_one_state_and_the_file_repeats_it_for_its_readers(path: Path, journal: Journal) -> None:
    journal.add(manifest(V1), report(V1))
    for state in (Lifecycle.PROBING, Lifecycle.WATCHING, Lifecycle.PROBING, Lifecycle.JUDGED):
        journal.report(V1, report(V1, state))
        assert journal.get(V1).state is journal.get(V1).report.state is state
        with sqlite3.connect(path) as reader:
            assert reader.execute("SELECT state FROM versions").fetchall() == [(state,)]
    with pytest.raises(AdapterError, match="a judged version cannot become probing"):
        journal.report(V1, report(V1, Lifecycle.PROBING))
    assert journal.get(V1).state is Lifecycle.JUDGED
