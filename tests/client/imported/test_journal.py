"""The journal's entries of adapters that are only served."""

from dataclasses import replace
from pathlib import Path

from client.imported.journal import Imported
from client.journal import Journal

LEGAL = Imported("legal", "a" * 64, "b" * 64, Path("/srv/legal"), 8, listed=True, since=1.5)


def test_a_name_has_one_entry_that_survives_the_daemon(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite3").imported
    journal.put(LEGAL)
    journal.put(replace(LEGAL, name="code", listed=False))
    journal.put(again := replace(LEGAL, digest="c" * 64, path=Path("/srv/other"), since=2.5))
    other = Journal(tmp_path / "journal.sqlite3").imported
    assert [entry.name for entry in other.all()] == ["code", "legal"]
    assert other.find("legal") == again
    assert str(again.ref) == "legal@sha256:cccccccccccccccc"
    other.remove("legal")
    assert (journal.find("legal"), len(journal.all())) == (None, 1)
    other.remove("legal")
