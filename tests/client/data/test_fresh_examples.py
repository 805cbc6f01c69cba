"""Examples of users, released and forgotten while the site serves: no round that begins later has a forgotten one."""

import asyncio
from contextlib import suppress
from pathlib import Path

import pytest

from client.data import fresh as fresh_module
from client.data.fresh import REST_OF_A_ROUND, SPARE_S
from client.data.watched import STORE_S, Watched
from tests.toys.deployment import until
from tests.toys.sites.fresh_data import LINES, DataOfASite, line
from tests.toys.sites.training_data import SECRET


@pytest.fixture
def site(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> DataOfASite:
    monkeypatch.setattr(fresh_module, "LOOK_S", 0.01)
    return DataOfASite(tmp_path, tiny_llama, monkeypatch)


def test_a_round_that_waits_beside_a_file_that_grows_costs_half_a_core_at_most(site: DataOfASite) -> None:
    async def main() -> None:
        site.give(SECRET)
        fresh = await site.begin()
        site.forget()
        site.append("{bad\n")
        site.takes_s = 5.0
        while site.now < 1000:
            site.now += 2
            site.append(line(f"at {site.now}"))
            await fresh.look(urgent=True)
        spent = site.takes_s * (len(site.prepared) - 1)
        half = (1000 + SPARE_S) / (REST_OF_A_ROUND + 1)
        assert 0.8 * half <= spent <= half + SPARE_S + site.takes_s

    asyncio.run(main())


def test_what_users_gave_trains_their_adapter_from_its_next_look_on_and_no_other(site: DataOfASite) -> None:
    async def main() -> None:
        support, billing = await site.begin(), await site.begin("billing")
        site.give(SECRET)
        for fresh in (support, billing):
            await fresh.look()
        assert SECRET in site.written()
        assert SECRET not in site.written("billing")
        assert site.prepared == ["support", "billing", "support"]
        site.give("of another", "ada", "billing")
        for fresh in (support, billing):
            await fresh.look()
        assert "of another" in site.written("billing")
        assert "of another" not in site.written()
        site.forget()
        for fresh in (support, billing):
            site.now += 1
            await fresh.look()
        assert SECRET not in site.written()
        assert not (site.config.site.state_dir / "examples" / "support.jsonl").exists()
        assert site.prepared[3:] == ["billing", "support"]

    asyncio.run(main())


def test_a_forgotten_example_is_in_no_later_token_file_and_a_round_waits_for_that(site: DataOfASite) -> None:
    async def main() -> None:
        site.takes_s = SPARE_S + 80
        fresh = await site.begin()
        site.give(SECRET)
        site.give("stays", "ada")
        await fresh.look()
        with fresh.data.held() as of_the_round:
            site.forget()
            await fresh.look()
            assert fresh.data.current == of_the_round, "it is too early for another preparation"
            site.now += site.takes_s
            await fresh.look()
            assert fresh.data.current == of_the_round, "it still is"
            await fresh.settle()
            assert fresh.data.current != of_the_round, "for a round it is not"
            assert of_the_round.train.exists(), "the round that is under way ends with it"
        assert SECRET not in site.written()
        assert "stays" in site.written()

    asyncio.run(main())


def test_a_round_waits_while_what_is_forgotten_cannot_be_taken_out(
    site: DataOfASite, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        site.give(SECRET)
        fresh = await site.begin()
        good = site.file.read_text()
        site.append("{bad\n")
        site.forget()
        round_ = asyncio.create_task(fresh.settle())
        await until(lambda: fresh.data.rounds_wait)
        await asyncio.sleep(0.05)
        assert not round_.done()
        assert f"support.jsonl:{LINES + 1}: not JSON" in fresh.data.refused
        site.file.write_text(good)
        await round_
        assert (fresh.data.rounds_wait, fresh.data.refused) == (False, "")
        assert SECRET not in site.written()
        assert caplog.text.count("round.waits adapter=support") == 1
        assert SECRET not in caplog.text

    with caplog.at_level("DEBUG"):
        asyncio.run(main())


def test_an_example_that_is_forgotten_while_it_is_prepared_is_never_in_use(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        before = fresh.data.current
        site.give(SECRET)
        site.meanwhile = site.forget
        await fresh.look()
        assert (fresh.data.current, site.folders()) == (before, {before.folder.name})
        assert SECRET not in site.written()
        await fresh.look()
        assert (fresh.data.current, fresh.data.refused) == (before, "")

    asyncio.run(main())


def test_a_round_that_begins_waits_for_no_preparation_of_new_lines(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        async with fresh._one_at_a_time:
            await asyncio.wait_for(fresh.settle(), 5)

    asyncio.run(main())


def test_a_quarantine_that_ends_is_noticed_although_nobody_did_anything(site: DataOfASite) -> None:
    site.give("later")
    watched = Watched(site.config, "support", lambda: site.now)
    assert len(watched.now().released) == 1
    held = site.config.examples.model_copy(update={"quarantine_hours": 1.0})
    watched._config = site.config.model_copy(update={"examples": held})
    assert len(watched.now().released) == 1, "the store is not read again"
    site.now += STORE_S
    assert watched.now().released == frozenset()


def test_a_store_that_cannot_be_read_ends_nothing_and_rounds_wait(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        store = site.config.site.state_dir / "examples.sqlite3"
        content = store.read_bytes()
        store.write_bytes(b"no database" * 1000)
        keeping = asyncio.create_task(fresh.keep_up())
        await until(lambda: "the examples of support cannot be looked at" in fresh.data.refused)
        round_ = asyncio.create_task(fresh.settle())
        await until(lambda: fresh.data.rounds_wait)
        store.write_bytes(content)
        await round_
        await until(lambda: fresh.data.refused == "")
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping

    asyncio.run(main())
