"""A site that dies at any fault point comes back with the last live version, clean, and goes on as if it had not."""

import asyncio
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.journal import Journal
from client.versions.version_files import directory, verify
from serving.aliases import AliasTable
from tests.toys.fault_points import SITE, V1, V2, V3, Ends
from tests.toys.rehearsal import Rehearsals
from tests.toys.site_life import STEPS, Life, live_on, state
from umbel import peft_dir
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import JournalError
from umbel.faults import Point

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rehearsals() -> Iterator[Rehearsals]:
    with Rehearsals("tests.toys.site_life") as ready:
        yield ready


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The final state of a site that never died."""
    folder = tmp_path_factory.mktemp("undisturbed")

    async def story() -> dict[str, object]:
        async with Life.of(folder) as site:
            await live_on(site, folder / "done")
            whole(site, (V2, V3))
            return state(site)

    return asyncio.run(story())


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


IN_LIFE = [die_at for die_at in SITE if die_at != Point.DAMAGE_FORGOTTEN]  # which has a test of its own, below


@pytest.mark.parametrize("die_at", IN_LIFE)
def test_a_site_that_dies_at_any_point_comes_back_whole_and_goes_on(
    home: Path, rehearsals: Rehearsals, undisturbed: dict[str, object], die_at: str
) -> None:
    done = home.parent / "done"
    assert rehearsals.run(die_at, home, done) == -signal.SIGKILL, f"{die_at} was never reached"

    async def story() -> None:
        async with Life.of(home) as site:
            await site.quiet()
            whole(site, SITE[die_at])
            await live_on(site, done)
            assert state(site) == undisturbed
            whole(site, (V2, V3))

    asyncio.run(story())
    assert done.read_text() == str(len(STEPS))


@pytest.mark.parametrize("die_at", [die_at for die_at in IN_LIFE if ":" not in die_at and die_at != Point.SWEPT])
def test_an_engine_that_dies_at_any_point_costs_time_and_nothing_else(
    home: Path, rehearsals: Rehearsals, undisturbed: dict[str, object], die_at: str
) -> None:
    done = home.parent / "done"
    assert rehearsals.run(f"{die_at}@engine", home, done) == 0
    assert done.read_text() == str(len(STEPS))

    async def story() -> None:
        async with Life.of(home) as site:
            whole(site, (V2, V3))
            assert state(site) == undisturbed

    asyncio.run(story())


def whole(site: Life, ends: Ends) -> None:
    """Users are answered by what the journal says, of which every byte is right, and nothing else lies about."""
    home, table = site.config.site.state_dir, site.table()
    live, previous = (site.journal.alias("support", alias) for alias in ("live", "previous"))
    assert (live and str(live), previous and str(previous)) == ends
    assert site.engine.answers("support") == ends[0]
    assert AliasTable.read(home / "aliases.json") == table
    served = [version for version in site.journal.versions() if version.ref in (live, previous)]
    assert [verify(site.config, version) for version in served] == [directory(site.config, v.ref) for v in served]
    kept = {live, previous} - {None}
    kept |= {v.ref for v in site.journal.versions() if v.state is Lifecycle.CANDIDATE or v.state.is_shadow}
    adapters = {path.name for path in (home / "adapters").glob("*")}
    assert adapters == {ref.engine_name for ref in kept if ref}
    only_served = site.journal.imported.all()
    assert {path.name for path in (home / "served").glob("*")} == {f"{e.name}-{e.ref.digest}" for e in only_served}
    assert [site.engine.answers(entry.name) for entry in only_served] == [str(entry.ref) for entry in only_served]
    assert all(site.served.verified(entry.ref) for entry in only_served)
    rounds = {(path.parent.name, path.name) for path in (home / "rounds").glob("*/*")}
    assert rounds == set(site.journal.known_rounds())
    assert not list(home.rglob("*.tmp"))


# Damage

REF1, REF2, REF3 = (AdapterRef("support", version) for version in (1, 2, 3))


def spoil(home: Path, ref: AdapterRef, file: str = peft_dir.WEIGHTS) -> None:
    path = home / "adapters" / ref.engine_name / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


async def lived(home: Path, versions: int) -> None:
    async with Life.of(home) as site:
        for version in range(1, versions + 1):
            await site.deploy(version)
        await site.quiet()


FALLS_BACK: list[tuple[tuple[AdapterRef, ...], Ends]] = [
    ((REF3,), (V2, None)),
    ((REF2,), (V3, None)),
    ((REF2, REF3), (None, None)),
]


@pytest.mark.parametrize(("damaged", "ends"), FALLS_BACK, ids=["live", "previous", "both"])
@pytest.mark.parametrize("die_at", ["", Point.DAMAGE_FORGOTTEN])
def test_damaged_versions_are_not_served_and_can_be_pushed_again(
    home: Path, rehearsals: Rehearsals, damaged: tuple[AdapterRef, ...], ends: Ends, die_at: str
) -> None:
    asyncio.run(lived(home, 3))
    for ref in damaged:
        spoil(home, ref)
    if die_at:
        assert rehearsals.run(die_at, home, home.parent / "done") == -signal.SIGKILL

    async def story() -> None:
        async with Life.of(home) as site:
            whole(site, ends)
            events = [event for _, event, _ in site.journal.history("support", limit=100)]
            assert events.count("forgotten: its files are damaged") == len(damaged)
            told = [line for line in site.served.recovered if "is damaged and was forgotten" in line]
            assert len(told) == len(damaged) - bool(die_at), "what the dead daemon forgot stands in the history"
            if damaged == (REF3,) and not die_at:
                assert f"{V3} is damaged and was forgotten; {V2} answers users instead" in told[0]
            for ref in damaged:
                assert site.deployer.report(site.push(ref.version)).state is Lifecycle.CANDIDATE
            await site.judged(REF3)
            if site.live() != V3:
                await site.deployer.promote(REF3)
            await site.quiet()
            assert site.engine.answers("support") == V3

    asyncio.run(story())


def exchange(home: Path) -> None:
    """The files of another version, as a restored backup may bring them: whole, and not what was promoted."""
    for name in (peft_dir.WEIGHTS, peft_dir.CONFIG, peft_dir.MANIFEST):
        (home / "adapters" / "support-v2" / name).write_bytes((home / "adapters" / "support-v1" / name).read_bytes())


def lose(home: Path) -> None:
    (home / "adapters" / "support-v2" / peft_dir.MANIFEST).unlink()


def other_rank(home: Path) -> None:
    path = home / "adapters" / "support-v2" / peft_dir.CONFIG
    path.write_text(path.read_text().replace('"r": 2', '"r": 1'))


@pytest.mark.parametrize("harm", [exchange, lose, other_rank], ids=lambda harm: harm.__name__)
def test_whatever_is_wrong_with_the_files_of_the_live_version_the_one_before_answers(
    home: Path, harm: Callable[[Path], None]
) -> None:
    asyncio.run(lived(home, 2))
    harm(home)

    async def story() -> None:
        async with Life.of(home) as site:
            whole(site, (V1, None))

    asyncio.run(story())


def test_damage_that_comes_while_a_site_runs_is_found_at_the_next_start_of_its_engine(home: Path) -> None:
    async def story() -> None:
        async with Life.of(home) as site:
            await site.deploy(1)
            await site.deploy(2)
            spoil(home, REF2)
            site.machine.kill()
            await site.ready(starts=2)
            assert site.engine.answers("support") == V1
            assert site.engine.answers("support@v1") == V1
            await site.deploy(2)
            assert site.engine.answers("support") == V2

    asyncio.run(story())


def test_what_no_entry_stands_for_is_removed_and_named(home: Path) -> None:
    asyncio.run(lived(home, 1))
    for name in ("adapters/.support-v9.77.tmp", "adapters/support-v9", "rounds/never-entered", "adapters/support-v1"):
        (home / name).mkdir(parents=True, exist_ok=True)
        (home / name / "x").write_text("x")
    for name in (".aliases.json.77.tmp", "rounds/evaluate-3.npy", "personal/support/.x.safetensors.77.tmp"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("x")

    async def story() -> None:
        async with Life.of(home) as site:
            whole(site, (V1, None))
            assert len(site.served.recovered) == 6, site.served.recovered
            assert "removed rounds/never-entered, which nothing needs" in site.served.recovered
            assert (home / "personal" / "support").is_dir()

    asyncio.run(story())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def overwrite(path: Path) -> None:
    path.write_bytes(b"no database at all" * 1000)


def garble(path: Path) -> None:
    """One byte within the text of a manifest: SQLite itself sees nothing wrong."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"target_modules"', b'"target_mudules"'))


@pytest.mark.parametrize("harm", [truncate, overwrite, garble], ids=lambda harm: harm.__name__)
def test_a_damaged_journal_is_refused_with_the_way_out_which_works(home: Path, harm: Callable[[Path], None]) -> None:
    asyncio.run(lived(home, 2))
    harm(home / "journal.sqlite3")
    with pytest.raises(
        JournalError, match=r"journal\.sqlite3: damaged .* move journal\.sqlite3\*, adapters/ and round"
    ):
        Journal(home / "journal.sqlite3")
    for path in [*home.glob("journal.sqlite3*"), home / "adapters", home / "rounds"]:
        path.rename(home.parent / path.name)

    async def story() -> None:
        async with Life.of(home) as site:
            whole(site, (None, None))
            await site.deploy(2)
            whole(site, (V2, None))

    asyncio.run(story())
