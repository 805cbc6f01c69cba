"""SGLang's log: only its newest part is kept, and the engine goes on writing into it."""

import asyncio
import os
from pathlib import Path

import pytest

from serving import engine_log


def test_a_long_log_is_moved_and_the_engine_goes_on_in_an_empty_one(tmp_path: Path) -> None:
    log, previous = tmp_path / "engine.log", tmp_path / "engine.log.1"
    engine_log.bound(log, 100)
    assert not log.exists()
    with log.open("ab", buffering=0) as engine:
        engine.write(b"x" * 100)
        engine_log.bound(log, 100)
        assert (log.stat().st_size, previous.exists()) == (100, False)
        engine.write(b"y" * 60)
        engine_log.bound(log, 100)
        assert (log.read_bytes(), previous.read_bytes()) == (b"", b"x" * 40 + b"y" * 60)
        engine.write(b"z" * 101)
        engine_log.bound(log, 100)
        engine.write(b"last")
    assert (log.read_bytes(), previous.read_bytes()) == (b"last", b"z" * 100)
    assert sorted(os.listdir(tmp_path)) == ["engine.log", "engine.log.1"]


def test_a_log_that_cannot_be_copied_is_emptied_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"x" * 101)
    (tmp_path / "engine.log.1" / "in the way").mkdir(parents=True)
    engine_log.bound(log, 100)
    assert log.read_bytes() == b""
    assert "engine.log_lost" in caplog.text


def test_it_is_kept_bounded_whatever_happens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def bound(log: Path) -> None:
        tries.append(log)
        if len(tries) == 1:
            raise PermissionError(13, "no")

    monkeypatch.setattr(engine_log, "LOOK_S", 0.0)
    monkeypatch.setattr(engine_log, "bound", bound)

    async def main() -> None:
        task = asyncio.create_task(engine_log.keep_bounded(tmp_path / "engine.log"))
        async with asyncio.timeout(30):
            while len(tries) < 3:
                await asyncio.sleep(0.01)
        task.cancel()

    asyncio.run(main())


def test_its_end_is_read_without_the_rest(tmp_path: Path) -> None:
    log = tmp_path / "engine.log"
    log.write_bytes(b"\xff" * engine_log.TAIL_BYTES + b"".join(b"\nline %d" % number for number in range(100)))
    assert engine_log.tail(log).splitlines() == [f"line {number}" for number in range(85, 100)]
