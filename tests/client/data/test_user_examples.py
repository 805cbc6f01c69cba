"""Examples of users: scrubbed before they are written, kept until their release, and gone when they are to be."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from client import disk
from client.data import scrub as scrub_module
from client.data import user_examples
from client.data.examples import parse
from client.data.scrub import pseudonym
from client.data.user_examples import ExampleStore
from serving.user_example import SETTINGS, ConsentSettings
from tests.toys.sites.user_examples import example, scrub
from umbel.errors import ConfigError, Conflict, NoRoom, NotFound
from umbel.site.config import SiteConfig
from umbel.site.sections import ExamplesSection
from umbel.site.template import site_toml

HOUR, DAY = 3600.0, 86400.0


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def store(folder: Path, clock: Clock, **section: Any) -> ExampleStore:
    return ExampleStore(folder, ExamplesSection(enabled=True, **section), clock)


def test_it_is_scrubbed_before_it_is_written_and_only_its_user_can_read_the_files(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock)
    assert kept.add(example(tmp_path), scrub) == 1
    assert kept.all()[0].messages[0]["content"] == "call <PHONE_NUMBER>"
    content = b"".join(file.read_bytes() for file in tmp_path.iterdir())
    assert b"0170 123" not in content
    assert b"eva" not in content
    assert {oct(file.stat().st_mode & 0o777) for file in tmp_path.iterdir()} == {"0o600"}


def test_it_is_trained_on_after_its_quarantine_and_its_release(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock)
    kept.add(example(tmp_path), scrub)
    assert (kept.all()[0].state, kept.release(), kept.export("support").file) == ("quarantine", [], None)
    with pytest.raises(Conflict, match="example 1 is in quarantine for 24 hours"):
        kept.release([1])
    clock.now += 24 * HOUR
    kept.add(example(tmp_path, text="later"), scrub)
    assert ([one.state for one in kept.all()], kept.export("support").file) == (["waiting", "quarantine"], None)
    with pytest.raises(NotFound, match="no example 7"):
        kept.release([7])
    assert kept.release() == [1]
    file = kept.export("support").file
    assert file is not None
    assert [json.loads(line) for line in file.read_text().splitlines()] == [
        {"messages": [{"role": "user", "content": "call <PHONE_NUMBER>"}, {"role": "assistant", "content": "ward 7"}]}
    ]
    assert kept.release() == [], "once"


def test_a_worse_answer_is_scrubbed_and_released_with_the_better_one_as_a_pair(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock, quarantine_hours=0)
    kept.add(example(tmp_path).model_copy(update={"rejected": "ask 0170 123"}), scrub)
    kept.add(example(tmp_path, "ada", "0170 123").model_copy(update={"rejected": "ward 7"}), scrub)
    assert [one.rejected for one in kept.all()] == ["ask <PHONE_NUMBER>", ""], "the same answer is no worse one"
    assert [{"messages", "rejected"} & row.keys() for row in kept.rows(texts=False)] == [set(), set()]
    assert kept.rows(texts=True)[0]["rejected"] == "ask <PHONE_NUMBER>"
    kept.release()
    file = kept.export("support").file
    assert file is not None
    first, second = map(json.loads, file.read_text().splitlines())
    assert first == {
        "messages": [{"role": "user", "content": "call <PHONE_NUMBER>"}],
        "chosen": {"role": "assistant", "content": "ward 7"}, "rejected": "ask <PHONE_NUMBER>",
    }  # fmt: skip
    assert second.keys() == {"messages"}
    assert parse(file.read_bytes().splitlines()[0], "f:1").rejected is not None, "preparation reads it"
    assert kept.forget("eva") == 1
    file = kept.export("support").file
    assert b"ask" not in (tmp_path / user_examples.DATABASE).read_bytes() + (file.read_bytes() if file else b"")


def test_only_what_is_named_is_released(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock, quarantine_hours=0)
    for _ in range(3):
        kept.add(example(tmp_path), scrub)
    assert kept.release([2]) == [2]
    assert [one.state for one in kept.all()] == ["waiting", "released", "waiting"]


def test_auto_release_still_waits_for_the_quarantine(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock, auto_release=True)
    kept.add(example(tmp_path), scrub)
    assert kept.export("support").file is None
    clock.now += 24 * HOUR
    assert kept.export("support").file is not None


def test_one_user_cannot_fill_it(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock, per_user=2)
    for user in ("eva", "eva", "ada"):
        kept.add(example(tmp_path, user), scrub)
    with pytest.raises(Conflict, match="2 examples of this user are kept already"):
        kept.add(example(tmp_path), scrub)
    assert len(kept.all()) == 3
    assert kept.add(example(tmp_path, adapter="triage"), scrub) == 4, "of another adapter it may have as many"
    clock.now += 31 * DAY
    kept.add(example(tmp_path), scrub)


def test_all_users_together_cannot_fill_the_disk_and_room_comes_back(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock, max_mb=1)
    long, added = "🙂" * 15_000, 0
    while kept.used_bytes + 4 * len(long) < (1 << 20) - 4096:
        kept.add(example(tmp_path, f"user-{added}", long), scrub)
        added += 1
    with pytest.raises(Conflict, match=r"examples that are kept take 0\.9 MB; \[examples\]\.max_mb is 1, and room"):
        kept.add(example(tmp_path, "one-more", long), scrub)
    assert added in (15, 16, 17), "60 kB each, as UTF-8"
    assert (tmp_path / user_examples.DATABASE).stat().st_size <= 1 << 20
    assert len(kept.all()) == added
    assert kept.forget("user-0") == 1
    kept.add(example(tmp_path, "another", long), scrub)
    clock.now += 31 * DAY
    kept.add(example(tmp_path, "later", long), scrub)
    assert len(kept.all()) == 1


def test_a_full_disk_keeps_nothing_and_forgetting_works_all_the_same(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock)
    kept.add(example(tmp_path, text="the red door"), scrub)
    pages = kept._db.execute("PRAGMA page_count").fetchone()[0]
    kept._db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(NoRoom, match=r"examples\.sqlite3: cannot be written"):
        kept.add(example(tmp_path, text="x" * 60_000), scrub)
    assert [one.messages[0]["content"] for one in kept.all()] == ["the red door"]
    kept._db.execute(f"PRAGMA max_page_count = {pages + 100}")
    assert kept.add(example(tmp_path, text="x" * 60_000), scrub) == 2
    assert kept.forget("eva") == 2


def test_the_reserve_of_the_journals_disk_is_not_for_examples(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = store(tmp_path, clock)
    monkeypatch.setattr(disk, "RESERVE_SHARE", 2.0)
    monkeypatch.setattr(disk, "RESERVE_BYTES", 1 << 60)
    with pytest.raises(NoRoom, match=r"example: not kept; .* stay in reserve for the journal"):
        kept.add(example(tmp_path), scrub)
    assert kept.all() == []


def test_who_is_forgotten_is_gone_from_every_file(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock, quarantine_hours=0)
    kept.add(example(tmp_path, "eva", "the red door"), scrub)
    kept.add(example(tmp_path, "ada", "the blue door"), scrub)
    kept.release()
    kept.export("support")
    assert kept.forget("eva") == 1
    assert kept.forget("nobody") == 0
    kept.export("support")
    content = b"".join(file.read_bytes() for file in tmp_path.rglob("*.*"))
    assert b"red door" not in content
    assert b"blue door" in content


def test_what_is_over_its_retention_is_deleted_by_whatever_comes_next(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock, quarantine_hours=0)
    kept.add(example(tmp_path, text="the red door"), scrub)
    kept.release()
    kept.export("support")
    clock.now += 30 * DAY + 1
    kept.close()
    store(tmp_path, clock).close()
    assert b"red door" not in (tmp_path / user_examples.DATABASE).read_bytes()
    assert store(tmp_path, clock).export("support").file is None
    assert not (tmp_path / "examples" / "support.jsonl").exists()


def test_each_adapter_is_listed_released_forgotten_and_written_by_itself(tmp_path: Path, clock: Clock) -> None:
    kept = store(tmp_path, clock, quarantine_hours=0)
    for adapter, user in (("support", "eva"), ("triage", "eva"), ("triage", "ada"), ("support", "ada")):
        kept.add(example(tmp_path, user, f"{user} of {adapter}", adapter), scrub)
    assert [one.id for one in kept.all("triage")] == [2, 3]
    assert [row["id"] for row in kept.rows(texts=False, adapter="support")] == [1, 4]
    with pytest.raises(NotFound, match="no example 1 of triage"):
        kept.release([2, 1], "triage")
    assert kept.release(adapter="triage") == [2, 3]
    assert [one.state for one in kept.all()] == ["waiting", "released", "released", "waiting"]
    file = kept.export("triage").file
    assert file == tmp_path / "examples" / "triage.jsonl"
    said = [json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()]
    assert (said, kept.export("support").file) == (["eva of triage", "ada of triage"], None)
    assert kept.forget("eva", "triage") == 1
    assert [one.id for one in kept.all()] == [1, 3, 4]
    assert kept.forget("ada") == 2, "everywhere"
    assert [one.id for one in kept.all()] == [1]


OLD = """
CREATE TABLE examples (
    id INTEGER PRIMARY KEY AUTOINCREMENT, at REAL NOT NULL, user TEXT NOT NULL, version TEXT NOT NULL,
    kind TEXT NOT NULL, messages TEXT NOT NULL, released INTEGER NOT NULL DEFAULT 0);
"""


def test_examples_of_an_umbel_that_did_not_know_adapters_apart_are_of_the_one_that_answered(
    tmp_path: Path, clock: Clock
) -> None:
    given = [("support@v3", "eva", 1), ("triage-b@v12", "ada", 1), ("support@v4", "eva", 0), ("support@v5", "bo", 0)]
    with closing(sqlite3.connect(tmp_path / user_examples.DATABASE)) as old, old:
        old.execute(OLD)
        for version, user, released in given:
            messages = json.dumps([{"role": "user", "content": version}])
            old.execute(
                "INSERT INTO examples (at, user, version, kind, messages, released) VALUES (?, ?, ?, 'accepted', ?, ?)",
                (clock.now, pseudonym(tmp_path, user), version, messages, released),
            )
        old.execute("DELETE FROM examples WHERE id = 4")
    for _ in range(2):  # once for all
        kept = store(tmp_path, clock, quarantine_hours=0)
        assert [(one.id, one.adapter, one.version, one.state) for one in kept.all()] == [
            (1, "support", "support@v3", "released"), (2, "triage-b", "triage-b@v12", "released"),
            (3, "support", "support@v4", "waiting"),
        ]  # fmt: skip
        kept.close()
    kept = store(tmp_path, clock, quarantine_hours=0)
    assert kept.add(example(tmp_path), scrub) == 5, "no number is given twice"
    for adapter, texts in (("support", ["support@v3"]), ("triage-b", ["triage-b@v12"])):
        file = kept.export(adapter).file
        assert file is not None
        assert [json.loads(line)["messages"][0]["content"] for line in file.read_text().splitlines()] == texts
    assert kept.forget("eva", "support") == 3


def test_a_new_database_has_the_shape_of_one_that_was_brought_up(tmp_path: Path, clock: Clock) -> None:
    shapes = []
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        if name == "old":
            with closing(sqlite3.connect(tmp_path / name / user_examples.DATABASE)) as old, old:
                old.execute(OLD)
        with closing(store(tmp_path / name, clock)) as kept:
            shapes.append(kept._db.execute("PRAGMA table_info(examples)").fetchall())
    assert shapes[0] == shapes[1]
    assert [column[1] for column in shapes[0][-2:]] == ["adapter", "rejected"]


def test_the_tables_of_a_newer_umbel_are_left_as_they_are(tmp_path: Path, clock: Clock) -> None:
    store(tmp_path, clock).add(example(tmp_path), scrub)
    file = tmp_path / user_examples.DATABASE
    with closing(sqlite3.connect(file)) as newer, newer:
        newer.execute(f"PRAGMA user_version = {len(user_examples.SHAPES) + 1}")
    before = file.read_bytes()
    with pytest.raises(ConfigError, match=rf"{file}: its tables have version 3, and this umbel knows 2; install the"):
        store(tmp_path, clock)
    assert file.read_bytes() == before


@pytest.fixture
def site_file(sockets: Path) -> Path:
    (sockets / "site.toml").write_text(site_toml() + "[examples]\nenabled = true\nquarantine_hours = 0\n")
    (sockets / "state").mkdir()
    return sockets / "site.toml"


def test_the_engine_is_told_only_where_it_is_enabled(site_file: Path) -> None:
    config = SiteConfig.load(site_file)
    state = config.site.state_dir
    user_examples.prepare(config)
    told = ConsentSettings.model_validate_json((state / SETTINGS).read_text())
    assert told.models == {"support": "support", "base:support": "support"}
    assert pseudonym(state, "eva") == example(state).user
    assert bytes.fromhex(told.key) == (state / scrub_module.KEY).read_bytes()
    assert (state / SETTINGS).stat().st_mode & 0o077 == 0
    with pytest.raises(NotFound, match="trains no adapter 'triage'"):
        user_examples.keep(config, example(state, adapter="triage"), scrub)
    user_examples.keep(config, example(state), scrub)
    ExampleStore.of(config).release()
    (state / "examples.jsonl").write_text("of all adapters, as an older umbel wrote it")
    file = state / "examples" / "support.jsonl"
    user_examples.prepare(config)
    assert user_examples.export(config, "support").file == file
    assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert not (state / "examples.jsonl").exists()
    (state / "examples" / "gone.jsonl").write_text("of an adapter that the site has no more")
    user_examples.prepare(config)
    assert list((state / "examples").iterdir()) == [], "each adapter's is written when it is prepared"
    off = config.model_copy(update={"examples": ExamplesSection()})
    user_examples.prepare(off)
    assert user_examples.export(off, "support") == user_examples.Released()
    assert not (state / SETTINGS).exists()
    assert list((state / "examples").iterdir()) == [], "nobody trains on it any more"
