"""The ServerApp's loop over a scripted federation, and its setting of malloc."""

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from server import app, loop
from server.registry.round_log import RoundState
from server.rollout import Judgement


class Steps:
    """A scripted federation: one letter per round, which `f`ails, is `i`dle, `a`ccepted, or `r`ejected."""

    def __init__(self, ends: str, *, published: int = 0) -> None:
        self.ends, self.published = ends, published
        self.calls: list[str] = []

    def rounds(self) -> Iterator[int]:
        yield from range(1, len(self.ends) + 1)

    def version_of(self, number: int) -> str | None:
        return f"v{number}" if number == self.published else None

    def train(self, number: int) -> str | None:
        self.calls.append(f"train {number}")
        return None if self.ends[number - 1] in "fi" else f"v{number}"

    def judge(self, number: int, version: str) -> Judgement:
        self.calls.append(f"judge {version}")
        return Judgement(self.ends[number - 1] == "a", {}, {})

    def promote(self, number: int, version: str, judgement: Judgement) -> None:
        self.calls.append(f"promote {version}")

    def discard(self, number: int, version: str, judgement: Judgement) -> None:
        self.calls.append(f"discard {version}")

    def state_of(self, number: int) -> RoundState:
        ends = {"f": RoundState.FAILED, "i": RoundState.IDLE, "a": RoundState.PROMOTED, "r": RoundState.REJECTED}
        return ends[self.ends[number - 1]]


def steps(ends: str, **facts: Any) -> list[str]:
    federation: Any = Steps(ends, **facts)
    loop.run(federation, lambda seconds: federation.calls.append(f"wait {seconds:g}"))
    return federation.calls


def test_a_version_is_promoted_or_discarded_as_it_is_judged_and_a_failed_round_has_none() -> None:
    assert steps("far") == [
        "train 1", "train 2", "judge v2", "promote v2", "train 3", "judge v3", "discard v3",
    ]  # fmt: skip


def test_a_version_that_was_published_before_an_interruption_is_not_trained_again() -> None:
    assert steps("a", published=1) == ["judge v1", "promote v1"]


def test_after_an_idle_round_the_next_one_waits_and_longer_after_each_further_one() -> None:
    waits = [call for call in steps("iiiiiiaifr") if call.startswith("wait")]
    assert waits == ["wait 5", "wait 10", "wait 20", "wait 40", "wait 60", "wait 60", "wait 5"]


def test_large_blocks_go_back_to_the_system_and_without_glibc_nothing_is_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    called: list[tuple[int, int]] = []

    class Library:
        def mallopt(self, option: int, value: int) -> None:
            called.append((option, value))

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    app.return_large_blocks()
    assert called == [(-3, 65536)]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    app.return_large_blocks()
    assert len(called) == 1
