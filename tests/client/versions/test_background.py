"""Background tasks of a daemon: known by their names, ended with it, and not silent when they fail."""

import asyncio

import pytest

from client.versions.background import Background


def test_a_task_is_known_by_its_name_until_it_ends() -> None:
    async def story() -> None:
        background, go = Background(), asyncio.Event()

        async def work() -> None:
            await go.wait()

        background.start("retire support@v1", work())
        assert "retire support@v1" in background
        assert "retire support@v2" not in background
        go.set()
        async with asyncio.timeout(5):
            while len(background):
                await asyncio.sleep(0)
        assert "retire support@v1" not in background

    asyncio.run(story())


def test_all_tasks_have_ended_once_it_is_closed() -> None:
    async def story() -> None:
        background, ended = Background(), []

        async def work(name: str) -> None:
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(name)

        for name in ("a", "b"):
            background.start(name, work(name))
        await asyncio.sleep(0)
        await background.close()
        assert sorted(ended) == ["a", "b"]

    asyncio.run(story())


def test_a_task_that_fails_is_logged_and_stops_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def story() -> None:
        background, go = Background(), asyncio.Event()

        async def fail() -> None:
            raise ValueError("no room")

        async def work() -> None:
            await go.wait()

        background.start("judge support@v1", fail())
        background.start("judge support@v2", work())
        async with asyncio.timeout(5):
            while "judge support@v1" in background:
                await asyncio.sleep(0)
        assert "judge support@v2" in background
        await background.close()

    asyncio.run(story())
    assert "judge support@v1 failed" in caplog.text
    assert "no room" in caplog.text
