"""Fair turns by counting: whatever comes and goes, shares are kept within the proven bound, and nobody starves."""

from collections import defaultdict
from dataclasses import dataclass, field
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.cotrainer.jobs.turns import LEAST_TURN_S, SWAP_PART, Turns

SHORTEST_S, LONGEST_S = LEAST_TURN_S

SHARES = st.sampled_from([0.25, 1.0, 2.0, 5.0])
TRAINING = st.tuples(st.just("arrive"), SHARES)
EVALUATION = st.tuples(st.just("arrive"), st.none())
QUANTUM = st.tuples(st.just("quantum"), st.tuples(st.sampled_from([0.01, 0.1, 1.0]), st.booleans()))
"""Seconds, and whether a boundary follows."""
STEPS = st.tuples(st.just("steps"), st.tuples(st.integers(1, 60), st.floats(0.05, 0.6)))
"""Steps of one quantum each, and the seconds of each."""
END = st.tuples(st.just("end"), st.integers(0, 9))
"""One of those that are there ends, or is cancelled."""
SWAP = st.tuples(st.just("swap"), st.floats(0.0, 0.5))
EVENTS = st.lists(st.one_of(STEPS, TRAINING, QUANTUM, STEPS, EVALUATION, END, SWAP), max_size=60)


@dataclass
class Engine:
    """Runs jobs as the co-trainer does, and notes what each has had."""

    turns: Turns = field(default_factory=Turns)
    shares: dict[str, float | None] = field(default_factory=dict)
    had: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    longest: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Longest time between two boundaries of a job."""
    least_s: float = SHORTEST_S
    holder: str | None = None
    came: int = 0
    since_boundary: float = 0.0
    boundary: bool = True

    def arrive(self, share: float | None) -> None:
        name = f"job-{self.came}"
        self.came += 1
        self.shares[name] = share
        self.turns.join(name, share)
        self.choose()

    def end(self, number: int) -> None:
        if self.shares:
            name = list(self.shares)[number % len(self.shares)]
            del self.shares[name]
            self.turns.leave(name)
            self.choose()

    def swap(self, seconds: float) -> None:
        self.turns.swapped(seconds)
        self.least_s = max(self.least_s, self.turns.least_s)

    def quantum(self, what: tuple[float, bool]) -> None:
        """Run one; an evaluation ends where a training job would have a boundary."""
        if self.holder is None:
            return
        seconds, boundary = what
        self.turns.ran(self.holder, seconds)
        self.had[self.holder] += seconds
        self.since_boundary += seconds
        self.longest[self.holder] = max(self.longest[self.holder], self.since_boundary)
        self.boundary = boundary
        if boundary and self.shares[self.holder] is None:
            self.end(list(self.shares).index(self.holder))
        self.choose()

    def steps(self, what: tuple[int, float]) -> None:
        count, seconds = what
        for _ in range(count):
            self.quantum((seconds, True))

    def choose(self) -> None:
        if self.holder in self.shares and not self.boundary:
            return
        self.holder, self.since_boundary, self.boundary = self.turns.choose(), 0.0, False
        assert (self.holder in self.shares) == bool(self.shares), "whoever is there gets the turn"

    def longest_turn(self, job: str) -> float:
        return self.least_s + self.longest[job]


@settings(max_examples=400)
@given(EVENTS)
def test_shares_are_kept_within_one_turn_of_each_whatever_comes_and_goes(events: list[tuple[str, object]]) -> None:
    engine = Engine()
    apart: dict[tuple[str, str], list[float]] = defaultdict(list)
    """Two jobs that are both there → difference of what they have had for their share, at each moment."""
    for name, value in events:
        getattr(engine, name)(value)
        training = {job: share for job, share in engine.shares.items() if share is not None}
        for (one, share), (other, others) in combinations(training.items(), 2):
            apart[one, other].append(engine.had[one] / share - engine.had[other] / others)
            bound = engine.longest_turn(one) / share + engine.longest_turn(other) / others
            assert max(apart[one, other]) - min(apart[one, other]) <= bound + 1e-9


@given(EVENTS)
def test_an_evaluation_goes_first_in_its_order_and_is_not_interrupted(events: list[tuple[str, object]]) -> None:
    engine = Engine()
    for name, value in events:
        before = engine.holder
        getattr(engine, name)(value)
        waiting = [job for job, share in engine.shares.items() if share is None]
        if before in waiting:
            assert engine.holder == before
        elif engine.holder != before and waiting:
            assert engine.holder == waiting[0]


@pytest.mark.parametrize("share", [0.5, 1.0, 2.0])
def test_a_job_does_not_starve_while_others_come_and_go(share: float) -> None:
    """Two short jobs are always there; each ends after its first turn, and the next one comes."""
    engine = Engine()
    engine.arrive(share)
    engine.quantum((SHORTEST_S, True))
    for _ in range(2):
        engine.arrive(1.0)
    held = 0
    for _ in range(120):
        assert engine.holder is not None
        if engine.holder == "job-0":
            held += 1
            engine.quantum((SHORTEST_S, True))
        else:
            engine.quantum((SHORTEST_S, False))
            engine.end(list(engine.shares).index(engine.holder))
            engine.arrive(1.0)
    fair = 120 * share / (share + 2)
    assert held >= fair / 2


def test_a_turn_lasts_until_the_swap_before_it_is_a_small_part() -> None:
    turns = Turns()
    turns.join("a", 1.0)
    turns.join("b", 1.0)
    turns.swapped(0.1)
    assert turns.choose() == "a"
    turns.ran("a", 0.1 / SWAP_PART - 0.01)
    assert turns.choose() == "a"
    turns.ran("a", 0.01)
    assert turns.choose() == "b"
    turns.swapped(0.0)
    turns.ran("b", SHORTEST_S - 0.01)
    assert turns.choose() == "b", "a turn has a least length of its own"
    turns.ran("b", 0.01)
    assert turns.choose() == "b", "it is behind by 4 s"
    turns.swapped(1000.0)
    turns.ran("b", LONGEST_S)
    assert turns.choose() == "a", "however slow a swap was"


def test_a_newcomer_makes_up_for_nothing_that_it_missed() -> None:
    turns = Turns()
    turns.join("old", 1.0)
    for _ in range(100):
        assert turns.choose() == "old"
        turns.ran("old", 1.0)
    turns.join("new", 1.0)
    had = {"old": 0, "new": 0}
    for _ in range(100):
        chosen = turns.choose()
        assert chosen is not None
        turns.ran(chosen, 1.0)
        had[chosen] += 1
    assert abs(had["old"] - had["new"]) <= 1


def test_a_quantum_of_a_job_that_has_left_counts_for_nobody() -> None:
    turns = Turns()
    for name in "abc":
        turns.join(name, 1.0)
    assert turns.choose() == "a"
    turns.leave("a")
    assert turns.choose() == "b"
    turns.ran("b", 0.1)
    turns.ran("a", 10.0)
    assert (turns.choose(), turns.jobs) == ("b", ["b", "c"])
