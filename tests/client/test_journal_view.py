"""The journal's view is the same with and without a daemon, and writes nothing."""

from pathlib import Path

import pytest

from client import journal_view
from client.imported.journal import Imported
from client.journal import Journal
from tests.toys.sites.journal import V1, V2, V3, make_live, manifest, order, report
from umbel.adapter import Lifecycle
from umbel.errors import ConfigError
from umbel.messages import JobState, RoundReport, Verdict


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


def busy(path: Path) -> Journal:
    """v2 live, v1 before it, v3 judged; three rounds ended and one is under way."""
    journal = Journal(path)
    make_live(journal, V1)
    make_live(journal, V2)
    make_live(journal, V1, "live again by roll-back")
    make_live(journal, V2, "live again by roll-back")
    journal.add(manifest(V3), report(V3))
    journal.move(V3, report(V3, Lifecycle.PROBING))
    verdict = Verdict(accepted=False, decision="keep", reasons=("too few",))
    journal.report(V3, report(V3, Lifecycle.JUDGED, verdict=verdict), "judged: keep")
    for key, state, tokens in (("a", JobState.DONE, 10), ("b", JobState.DONE, 5), ("c", JobState.FAILED, 1)):
        journal.rounds("support").add(order(key))
        journal.rounds("support").report(RoundReport(key=key, state=state, parent="p", num_loss_tokens=tokens))
    journal.rounds("support").add(order("d"))
    return journal


@pytest.mark.parametrize("closed", [False, True])
def test_it_says_what_the_journal_knows_with_and_without_its_daemon(path: Path, closed: bool) -> None:
    journal = busy(path)
    history = journal.history("support")
    if closed:
        journal.close()
    seen = journal_view.read(path, ["support", "other"])
    assert seen["aliases"]["support"] == {"live": "support@v2", "previous": "support@v1", "shadow": "support@v3"}
    assert seen["aliases"]["other"] == {"live": None, "previous": None, "shadow": None}
    assert set(seen["history"]["support"]) == set(history)
    assert seen["answering"]["support"]["event"] == "live again by roll-back"
    assert seen["answering"]["support"]["since"] == pytest.approx(seen["roll_backs"]["support"][0][0], abs=1.0)
    assert [event[2] for event in seen["roll_backs"]["support"]] == [2, 1]
    assert seen["answering"]["other"] == {"since": None, "event": None}
    assert seen["versions"]["support@v3"]["verdict"]["decision"] == "keep"
    assert seen["open_rounds"] == ["support/d"]
    assert seen["rounds"] == {"done": 2, "failed": 1}
    assert seen["trained_tokens"] == 16
    events = seen["events"]["support"]
    assert (events["promoted"], events["live again by roll-back"], events["judged: keep"]) == (2, 2, 1)


def test_the_base_that_was_taken_back_to_answers_since_then(path: Path) -> None:
    journal = Journal(path)
    make_live(journal, V1)
    journal.make_base_live(V1)
    seen = journal_view.read(path, ["support"])
    assert seen["aliases"]["support"] == {"live": None, "previous": "support@v1", "shadow": None}
    assert seen["answering"]["support"]["event"] == "taken back: the base answers"


def test_events_are_counted_also_beyond_what_is_shown(path: Path) -> None:
    journal = Journal(path)
    make_live(journal, V1)
    for again in range(40):
        make_live(journal, V1 if again % 2 else V2, "live again by roll-back")
    assert len(journal_view.read(path, ["support"])["history"]["support"]) == 10
    assert journal_view.read(path, ["support"])["events"]["support"]["live again by roll-back"] == 40


def test_an_event_of_any_name_is_why_what_answers_does(path: Path) -> None:
    journal = Journal(path)
    make_live(journal, V1, "put there by hand")
    journal.add(manifest(V2), report(V2))
    assert journal_view.read(path, ["support"])["answering"]["support"]["event"] == "put there by hand"


def test_a_damaged_journal_is_named(path: Path) -> None:
    path.write_bytes(b"not a database" * 100)
    with pytest.raises(ConfigError, match=r"journal.sqlite3: cannot be read \(file is not a database\); restore"):
        journal_view.read(path, ["support"])


def test_an_empty_journal_and_a_missing_one(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        journal_view.read(path, ["support"])
    assert not path.exists()
    Journal(path).close()
    seen = journal_view.read(path, ["support"])
    assert (seen["versions"], seen["rounds"], seen["trained_tokens"]) == ({}, {}, 0)


def test_what_is_only_served_is_listed_and_a_journal_from_before_has_none(path: Path) -> None:
    journal = busy(path)
    entry = Imported("legal", "a" * 64, "b" * 64, Path("/srv/legal"), 8, listed=True, since=1.5)
    journal.imported.put(entry)
    shown = {"name": "legal", "digest": "a" * 64, "path": "/srv/legal", "since": 1.5}
    assert journal_view.read(path, ["support"])["served"] == [shown]
    journal._db.execute("DROP TABLE imported")
    assert journal_view.read(path, ["support"])["served"] == []
