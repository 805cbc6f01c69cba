"""The pauses of Flower's SuperNode: short while a conversation goes on, Flower's own when nobody asks."""

import inspect
import time

from flwr.supernode import start_client_internal

from client.flower.node import IDLE_S, REPLY_S, SHORTEST_S, Pauses
from tests.toys.grid import Clock


def test_flowers_loop_sleeps_as_it_is_expected_to() -> None:
    source = inspect.getsource(start_client_internal)
    assert vars(start_client_internal)["time"] is time
    assert [line.strip() for line in source.splitlines() if "time.sleep" in line] == [
        f"time.sleep({IDLE_S:g})", "time.sleep(0.5)", "time.sleep(0.5)",
    ]  # fmt: skip


def test_the_next_message_is_found_after_a_quarter_more_than_the_time_since_the_last_answer() -> None:
    clock, slept = Clock(), []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        clock.sleep(seconds)

    pauses = Pauses(clock, sleep)
    pauses.sleep(0.5)
    assert slept == [REPLY_S]
    since = clock()
    while clock() - since < 20:
        before = clock()
        pauses.sleep(IDLE_S)
        assert clock() - before <= max(SHORTEST_S, min(IDLE_S, (before - since) / 4)) + 1e-6
    assert slept[-1] == IDLE_S
    assert len(slept) < 25, "a site that nobody asks looks as rarely as Flower's own"
    pauses.sleep(0.5)
    pauses.sleep(IDLE_S)
    assert slept[-2:] == [REPLY_S, SHORTEST_S], "after the next answer it looks soon again"


def test_all_else_of_the_module_is_as_it_was() -> None:
    assert Pauses().monotonic is time.monotonic
