"""Each batch gets the time of its own iteration: in the loop that waits for each batch, and in SGLang's overlap loop.

The engine is a clock: a batch takes the time that the test says, and whatever the observer reports is held against it.
"""

import random
from collections import deque
from types import SimpleNamespace
from typing import Any

import pytest

from serving.cotrainer.observer import Iteration, Observer

NOBODY = SimpleNamespace(running_batch=None, last_batch=None, waiting_queue=[], chunked_req=None)
LAUNCH_S = 0.001
"""Host time of launching a batch."""


class Loop:
    """SGLang's event loops in their order of calls, on a device of its own time line: as `event_loop_overlap` has it,
    a batch is launched before the result of the one before is processed, unless both are prefills."""

    def __init__(self, overlap: bool) -> None:
        self.overlap = overlap
        self.observer = Observer()
        self.now = 0.0
        self.device_free_at = 0.0
        self.truth: list[float] = []
        """Seconds on the device of each batch that has been processed, and the training that delayed it."""
        self.reported: list[Iteration] = []
        self._queue: deque[tuple[float, float]] = deque()
        self._last: Any = None
        self._quantum_ends: float | None = None
        self._quantum_s = 0.0

    def turn(self, batch: Any = None, seconds: float = 0.0, quantum_s: float = 0.0) -> None:
        """Go once round the loop with a batch of `seconds`, or none; first launch a quantum of `quantum_s`, if any."""
        observer = self.observer
        if self._quantum_ends is not None and self._quantum_ends <= self.now:
            observer.ended(self._quantum_s)
            self._quantum_ends = None
        self.reported += observer.look(NOBODY, self.now)[1]
        if quantum_s and self._quantum_ends is None:
            observer.launched()
            self._quantum_s = quantum_s
            self._quantum_ends = self.device_free_at = max(self.now, self.device_free_at) + quantum_s
        at_once = not self.overlap or (_is_prefill(batch) and _is_prefill(self._last))
        if at_once and self._queue:
            self._process()
        if batch is not None:
            observer.starts(batch)
            self.now += LAUNCH_S
            self.device_free_at = max(self.now, self.device_free_at) + seconds
            self._queue.append((self.device_free_at, seconds))
        due = self._last is not None and not at_once if self.overlap else bool(self._queue)
        if due:
            self._process()
        self._last = batch

    def _process(self) -> None:
        ends, seconds = self._queue.popleft()
        self.now = max(self.now, ends)
        self.truth.append(seconds)
        self.observer.processed(self.now)


def _is_prefill(batch: Any) -> bool:
    return batch is not None and bool(batch.forward_mode.is_extend())


def _batch(kind: str, size: int) -> Any:
    """A batch whose number of requests names it."""
    reqs = [SimpleNamespace(priority=None, origin_input_ids=[1], output_ids=[1]) for _ in range(size)]
    extend = kind == "prefill"
    return SimpleNamespace(
        forward_mode=SimpleNamespace(is_extend=lambda: extend),
        reqs=reqs,
        extend_lens=[1] * size,
        prefix_lens=[0] * size,
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_a_prefills_time_is_not_that_of_the_decode_after_it(overlap: bool) -> None:
    loop = Loop(overlap)
    for kind, seconds in (("prefill", 0.5), ("decode", 0.01), ("decode", 0.02), ("prefill", 0.7), ("decode", 0.03)):
        loop.turn(_batch(kind, 1), seconds)
    loop.turn()
    loop.turn()
    found = [(iteration.batch.regime, round(iteration.seconds, 2)) for iteration in loop.reported]
    assert found == [("prefill", 0.5), ("decode", 0.01), ("decode", 0.02), ("prefill", 0.7), ("decode", 0.03)]
    assert all(iteration.clean for iteration in loop.reported)


@pytest.mark.parametrize("overlap", [False, True])
def test_no_random_loop_gives_a_batch_a_time_that_it_did_not_have(overlap: bool) -> None:
    """Clean means that the reported time is the batch's own, to the host's time for launches."""
    for seed in range(300):
        loop, draw = Loop(overlap), random.Random(seed)
        sizes = []
        for number in range(1, 40):
            if draw.random() < 0.15:
                loop.turn(quantum_s=draw.choice((0.0, 0.05)))
                continue
            sizes.append(number)
            kind = draw.choice(("prefill", "decode", "decode"))
            loop.turn(_batch(kind, number), draw.uniform(0.01, 0.5), draw.choice((0.0, 0.0, 0.0, 0.03, 0.2)))
        for _ in range(3):
            loop.turn()
        assert [iteration.batch.requests for iteration in loop.reported] == sizes, "each once, in order"
        assert len(loop.truth) == len(loop.reported)
        for iteration, seconds in zip(loop.reported, loop.truth, strict=True):
            if iteration.clean:
                assert seconds - 1e-9 <= iteration.seconds <= seconds + 3 * LAUNCH_S
                assert iteration.trained == 0.0
        assert any(iteration.clean for iteration in loop.reported)
        assert not all(iteration.clean for iteration in loop.reported)


def test_a_quantum_that_ends_later_makes_all_iterations_that_it_runs_in_unclean() -> None:
    observer = Observer()
    reported: list[Iteration] = []
    for turn in range(5):
        if turn == 3:
            observer.ended(2.5)
        reported += observer.look(NOBODY, float(turn))[1]
        if turn == 1:
            observer.launched()
        observer.starts(_batch("decode", 1))
        observer.processed(turn + 0.9)
    assert [(it.clean, it.settled, it.trained) for it in reported] == [
        (True, True, 0.0), (False, False, 0.0), (False, True, 2.5), (True, True, 0.0),
    ]  # fmt: skip
