"""Data that changes while the site serves: taken up by what begins next, refused by name, forgotten for good."""

import asyncio
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from client.data import fresh as fresh_module
from client.data.fresh import REST, REST_OF_A_ROUND, FreshData
from client.data.prepare import prepare_in_child
from client.data.watched import HALF_WRITTEN_S, STORE_S, Watched
from tests.toys.deployment import until
from tests.toys.sites.fresh_data import LINES, DataOfASite, line
from tests.toys.sites.training_data import SECRET


@pytest.fixture
def site(tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> DataOfASite:
    monkeypatch.setattr(fresh_module, "LOOK_S", 0.01)
    return DataOfASite(tmp_path, tiny_llama, monkeypatch)


def test_new_lines_are_in_use_without_a_restart_and_the_files_of_before_are_gone(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        before = fresh.data.current
        for number in range(10):
            site.append(line(f"new {number}"))
        await fresh.look()
        after = fresh.data.current
        assert after.train_examples + after.eval_examples == LINES + 10
        assert after.train_examples > before.train_examples
        assert "new 3" in site.written()
        assert site.folders() == {after.folder.name}
        await fresh.look()
        assert site.prepared == ["support"] * 2, "once for each change"

    asyncio.run(main())


def test_what_was_prepared_at_the_start_is_not_prepared_again(site: DataOfASite) -> None:
    async def main() -> None:
        site.give("the blue door")
        fresh = await FreshData.begin(site.config, "support")
        await fresh.look()
        await fresh.settle()
        assert (site.prepared, fresh.data.refused) == (["support"], "")

    asyncio.run(main())


def test_a_file_that_was_only_touched_stays_in_use(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        before = fresh.data.current
        os.utime(site.file, ns=(1, 1))
        await fresh.look()
        assert fresh.data.current == before
        assert before.train.exists()
        await fresh.look()
        assert len(site.prepared) == 2

    asyncio.run(main())


@pytest.mark.parametrize("half", ['{"prompt": "ha', '{"prompt": "half", "completion": "gr\u00fc'])
def test_half_a_line_is_waited_for(site: DataOfASite, half: str) -> None:
    async def main() -> None:
        fresh = await site.begin()
        with site.file.open("ab") as opened:
            opened.write(half.encode()[:-1])
        for _ in range(3):
            await fresh.look()
            site.now += HALF_WRITTEN_S / 4
        assert (len(site.prepared), fresh.data.refused) == (1, "")
        site.file.write_bytes(site.file.read_bytes().rpartition(b"\n")[0] + b"\n" + line("whole").encode())
        await fresh.look()
        assert fresh.data.current.train_examples + fresh.data.current.eval_examples == LINES + 1

    asyncio.run(main())


def test_half_a_line_that_stays_is_refused_by_name(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        site.append('{"prompt": "ha')
        await fresh.look()
        site.now += HALF_WRITTEN_S
        await fresh.look()
        assert f"support.jsonl:{LINES + 1}: not JSON" in fresh.data.refused
        site.append('lf", "completion": "whole"}')
        await fresh.look()
        assert fresh.data.refused == ""
        assert fresh.data.current.train_examples + fresh.data.current.eval_examples == LINES + 1, "it needs no line end"

    asyncio.run(main())


def test_a_bad_line_is_refused_once_by_name_and_the_data_of_before_stays(
    site: DataOfASite, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        fresh = await site.begin()
        before, good = fresh.data.current, site.file.read_text()
        site.append(line(SECRET, ""))
        for _ in range(3):
            await fresh.look()
        assert f"support.jsonl:{LINES + 1}: completion: the answer is empty" in fresh.data.refused
        assert (fresh.data.current, before.train.exists()) == (before, True)
        assert len(site.prepared) == 2, "it is not read again as it is"
        site.append(line(SECRET, ""))
        await fresh.look()
        assert len(site.prepared) == 3
        assert [one.levelname for one in caplog.records if "data.refused" in one.message] == ["WARNING"], "once"
        site.file.write_text(good + line("mended"))
        await fresh.look()
        assert (fresh.data.refused, "mended" in site.written()) == ("", True)
        assert SECRET not in caplog.text

    with caplog.at_level("DEBUG"):
        asyncio.run(main())


def test_a_file_that_is_away_for_a_moment_is_refused_and_then_as_before(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        before = fresh.data.current
        away = site.file.rename(site.file.with_suffix(".away"))
        await fresh.look()
        assert "support.jsonl: cannot be read" in fresh.data.refused
        assert fresh.data.current == before
        away.rename(site.file)
        await fresh.look()
        assert (fresh.data.refused, fresh.data.current, len(site.prepared)) == ("", before, 2)

    asyncio.run(main())


@pytest.mark.parametrize("how", ["renamed over it", "cut and written anew"])
def test_another_file_in_its_place_is_taken_up(site: DataOfASite, how: str) -> None:
    async def main() -> None:
        fresh = await site.begin()
        content = site.file.read_text().replace("support", "another")
        target = site.file if how.startswith("cut") else site.file.with_suffix(".new")
        target.write_text(content)
        if target != site.file:
            target.replace(site.file)
        await fresh.look()
        assert "another 3" in site.written()
        assert "support 3" not in site.written()

    asyncio.run(main())


def test_a_file_that_grows_all_the_time_costs_at_most_a_tenth_of_it(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        site.takes_s = 5.0
        while site.now < 1000:
            site.now += 2
            site.append(line(f"at {site.now}"))
            await fresh.look()
        spent = site.takes_s * (len(site.prepared) - 1)
        assert 0.8 * 1000 / (REST + 1) <= spent <= 1000 / REST

    asyncio.run(main())


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
        assert 0.8 * 1000 / (REST_OF_A_ROUND + 1) <= spent <= 1000 / (REST_OF_A_ROUND + 1) + site.takes_s

    asyncio.run(main())


def test_what_was_read_while_it_was_written_is_no_mistake_unless_it_stays_one(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        site.append("{half a line\n")
        site.meanwhile = lambda: site.append(line("more"))
        await fresh.look()
        assert (fresh.data.refused, len(site.prepared)) == ("", 2)
        site.meanwhile = lambda: site.append(line("still more"))
        await fresh.look()
        assert f"support.jsonl:{LINES + 1}: not JSON" in fresh.data.refused

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
        site.takes_s = 5.0
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


def test_another_tokenizer_than_the_engine_has_is_refused(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    site = DataOfASite(tmp_path, model, monkeypatch)

    async def main() -> None:
        fresh = await site.begin()
        settings = (model / "tokenizer_config.json").read_text()
        (model / "tokenizer_config.json").write_text(settings + "\n")
        site.append(line("new"))
        await fresh.look()
        assert "not those that the engine was started with; restart `umbel serve`" in fresh.data.refused
        (model / "tokenizer_config.json").write_text(settings)
        site.append(line("newer"))
        await fresh.look()
        assert (fresh.data.refused, "newer" in site.written()) == ("", True)

    asyncio.run(main())


def test_the_loop_prepares_in_a_child(site: DataOfASite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fresh_module, "prepare_in_child", prepare_in_child)

    async def main() -> None:
        fresh = await FreshData.begin(site.config, "support")
        before = fresh.data.current
        site.append(line("by the child"))
        keeping = asyncio.create_task(fresh.keep_up())
        async with asyncio.timeout(300):  # a busy machine starts a process slowly
            while fresh.data.current == before:
                await asyncio.sleep(0.05)
        keeping.cancel()
        with suppress(asyncio.CancelledError):
            await keeping
        assert "by the child" in site.written()
        assert site.folders() == {fresh.data.current.folder.name}

    asyncio.run(main())
