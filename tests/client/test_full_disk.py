"""A full disk: what others send is refused before the journal starves, and what could not be done is done later."""

import asyncio
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from client import disk
from client.database import Database
from client.disk import require_room
from client.journal import Journal
from client.rounds import jobs
from client.rounds.journal import RoundJournal
from serving import aliases as alias_file
from tests.toys.cotrainer import Queue, ToyCoTrainer, runner
from tests.toys.deployment import Deployment, quick, run, until
from tests.toys.engine import ToyMachine
from tests.toys.sites.journal import V1, V2, judge, make_live, manifest, order, report
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import NoRoom, NotFound
from umbel.messages import JobState

MB = 1 << 20
Full = Callable[[Journal], AbstractContextManager[None]]


@contextmanager
def no_more_pages(journal: Journal) -> Iterator[None]:
    """SQLite says that the disk is full as soon as a statement needs a page more."""
    database = journal._db
    pages = database.execute("PRAGMA page_count").fetchone()[0]
    database.execute(f"PRAGMA max_page_count = {pages}")
    try:
        yield
    finally:
        database.execute(f"PRAGMA max_page_count = {pages + 1000}")


@contextmanager
def no_longer_files(journal: Journal) -> Iterator[None]:
    """The operating system takes no byte more, which SQLite finds out when it commits."""
    assert isinstance(journal._db, Database)
    log = journal._db.path.with_name(f"{journal._db.path.name}-wal")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("full", [no_more_pages, no_longer_files])
def test_a_promotion_on_a_full_disk_changes_nothing_and_works_once_there_is_room(tmp_path: Path, full: Full) -> None:
    path = tmp_path / "journal.sqlite3"
    journal = Journal(path)
    make_live(journal, V1)
    journal.add(manifest(V2), report(V2))
    judge(journal, V2)
    before = (journal.alias("support", "live"), journal.versions(), journal.history("support"))
    with full(journal), pytest.raises(NoRoom, match=r"journal\.sqlite3: cannot be written .*make room on its disk"):
        journal.make_live(V2, "x" * 40_000)  # pages that are free already have room for less than this
    assert (journal.alias("support", "live"), journal.versions(), journal.history("support")) == before
    assert Journal(path).versions() == before[1]
    journal.make_live(V2, "promoted")
    assert Journal(path).alias("support", "live") == V2
    journal.make_base_live(V2)
    assert Journal(path).alias("support", "live") is None


@pytest.mark.parametrize("full", [no_more_pages, no_longer_files])
def test_rounds_are_not_half_entered_on_a_full_disk(tmp_path: Path, full: Full) -> None:
    journal = Journal(tmp_path / "journal.sqlite3")
    long = order("r1").model_copy(update={"run": "x" * 20_000})
    with full(journal), pytest.raises(NoRoom):
        journal.rounds("support").add(long)
    with pytest.raises(NotFound):
        journal.rounds("support").get("r1")
    assert journal.rounds("support").add(long).state is JobState.QUEUED
    assert (journal.rounds("support").begin_attempt("r1"), journal.rounds("support").begin_attempt("r1")) == (1, 2)


def disk_with(monkeypatch: pytest.MonkeyPatch, free: int, total: int = 100_000 * MB) -> None:
    there = SimpleNamespace(f_bavail=free, f_frsize=1, f_blocks=total)
    monkeypatch.setattr(disk, "os", SimpleNamespace(statvfs=lambda _: there))


def test_the_reserve_is_never_given_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk_with(monkeypatch, 300 * MB)
    require_room(tmp_path, 44 * MB, "example")
    with pytest.raises(NoRoom, match=r"example: not kept; .* 300\.0 MB free, 45\.0 MB are needed, and 256\.0 MB stay"):
        require_room(tmp_path, 45 * MB, "example")
    disk_with(monkeypatch, 300 * MB, total=1000 * MB)
    require_room(tmp_path, 280 * MB, "2 % of a small disk are enough")
    monkeypatch.setattr(disk, "os", os)
    require_room(tmp_path, 0, "on the disk of this test")


def test_a_round_and_a_version_are_refused_by_name_and_taken_once_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(queue: Queue) -> None:
        disk_with(monkeypatch, 1)
        with pytest.raises(NoRoom, match="round r1: not kept"):
            queue.submit("r1")
        assert not (tmp_path / "rounds" / "support" / "r1").exists()
        disk_with(monkeypatch, 300 * MB)
        queue.submit("r1")
        disk_with(monkeypatch, 1)
        assert queue.submit("r1").state in (JobState.QUEUED, JobState.RUNNING), "the same again needs no room"
        assert (await queue.ended("r1")).state is JobState.DONE

    runner(tmp_path, ToyCoTrainer(), monkeypatch)(story)


def test_a_round_that_meets_a_full_disk_ends_neither_the_daemon_nor_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jobs, "NO_ROOM_S", 0.01)

    async def story(queue: Queue) -> None:
        begin, tries = RoundJournal.begin_attempt, []

        def full_at_first(rounds: RoundJournal, key: str) -> int:
            tries.append(key)
            if len(tries) < 3:
                raise NoRoom("journal.sqlite3: cannot be written")
            return begin(rounds, key)

        monkeypatch.setattr(RoundJournal, "begin_attempt", full_at_first)
        queue.submit("r1")
        assert (await queue.ended("r1")).state is JobState.DONE
        assert caplog.text.count("round.delayed journal.sqlite3: cannot be written") == 2

    runner(tmp_path, ToyCoTrainer(), monkeypatch)(story)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


def test_users_are_answered_as_before_and_a_promotion_and_a_roll_back_work_afterwards(
    tmp_path: Path, machine: ToyMachine
) -> None:
    v1, v2 = (AdapterRef("support", version) for version in (1, 2))

    async def story(site: Deployment) -> None:
        await site.deploy(1)
        site.push(2)
        await site.judged(v2)
        await site.quiet()
        with no_longer_files(site.journal):
            with pytest.raises(NoRoom):
                await site.deployer.promote(v2, forced=True)
            with pytest.raises(NoRoom):
                await site.deployer.roll_back()
            async with site.http(operator=True) as client:
                reply = await client.post(f"/adapters/{v2}/promote?forced=true")
            assert (reply.status_code, reply.json()["error"]["type"]) == (507, "NoRoom")
        assert site.engine.answers("support") == "support@v1"
        assert (await site.deployer.promote(v2, forced=True)).state is Lifecycle.LIVE
        assert site.engine.answers("support") == "support@v2"
        assert await site.deployer.roll_back() == str(v1)
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_a_promotion_whose_table_cannot_be_written_is_told_and_done_by_the_next_call(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(site: Deployment) -> None:
        site.push(1)
        ref = AdapterRef("support", 1)
        await site.judged(ref)
        await site.quiet()
        write = alias_file.replace_durably

        def full(path: Path, content: bytes) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(alias_file, "replace_durably", full)
        with pytest.raises(NoRoom, match=r"aliases\.json: cannot be written \(No space left on device\)"):
            await site.deployer.promote(ref, forced=True)
        monkeypatch.setattr(alias_file, "replace_durably", write)
        assert (await site.deployer.promote(ref, forced=True)).state is Lifecycle.LIVE
        assert site.engine.answers("support") == "support@v1"

    run(tmp_path, machine, story)


def test_a_version_is_judged_once_there_is_room(
    tmp_path: Path, machine: ToyMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def story(site: Deployment) -> None:
        await site.ready()
        move, tries = site.journal.move, []

        def full_at_first(*arguments: object) -> None:
            tries.append(arguments)
            if len(tries) < 3:
                raise NoRoom("journal.sqlite3: cannot be written")
            move(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(site.journal, "move", full_at_first)
        ref = site.push(1)
        await until(lambda: site.deployer.report(ref).verdict is not None)
        assert len(tries) == 3
        await asyncio.sleep(0)

    run(tmp_path, machine, story)
