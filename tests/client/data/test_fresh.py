"""Files of examples that change while the site serves: taken up by what begins next, or refused by name."""

import asyncio
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest

from client.data import fresh as fresh_module
from client.data.fresh import REST, SPARE_S, FreshData
from client.data.prepare import prepare_in_child
from client.data.watched import HALF_WRITTEN_S
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


def test_a_file_that_grows_all_the_time_costs_a_tenth_of_it_in_the_long_run(site: DataOfASite) -> None:
    async def main() -> None:
        fresh = await site.begin()
        site.takes_s = 5.0
        while site.now < 1000:
            site.now += 2
            site.append(line(f"at {site.now}"))
            await fresh.look()
        spent = site.takes_s * (len(site.prepared) - 1)
        assert spent - 0.8 * 1000 / (REST + 1) >= SPARE_S
        assert spent <= SPARE_S + 1000 / REST + site.takes_s

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
