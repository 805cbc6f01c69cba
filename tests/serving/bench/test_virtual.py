"""The simulated engine can be calculated by hand."""

import math
from dataclasses import replace

import pytest

from serving.bench.machines import Machine, TimedQuantum
from serving.bench.trace import Arrival
from serving.bench.virtual import Simulation
from serving.cotrainer.governor import Load
from serving.cotrainer.predictor import Batch
from serving.cotrainer.slo import Slo

MACHINE = Machine(
    decode=(0.010, 0.001, 0.0), prefill=(0.010, 0.001, 0.0), quanta=(TimedQuantum("mlp", 64, 0.004),) * 2,
    noise=0.0, hiccup=(0.0, 1.0), turn_s=0.0, max_running=2, chunk_tokens=50,
)  # fmt: skip


class Always:
    """A governor that never says no."""

    slo: Slo | None = None

    def budget(self, load: Load, now: float) -> float:
        return 0.009

    def wait(self, now: float) -> float:
        return 0.0

    def ran(self, seconds: float, now: float) -> None: ...

    def iterated(self, batch: Batch, seconds: float) -> None: ...

    def finished(self, request: object, now: float) -> None: ...


class Until(Always):
    """One that says no from a time on."""

    def __init__(self, end: float) -> None:
        self._end = end

    def budget(self, load: Load, now: float) -> float:
        return 0.009 if now < self._end else 0.0

    def wait(self, now: float) -> float:
        return 0.0 if now < self._end else math.inf


class Noting(Always):
    """One that notes when quanta were found to have ended, and allows longer ones."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def budget(self, load: Load, now: float) -> float:
        return 0.1

    def ran(self, seconds: float, now: float) -> None:
        self.ended.append(now)


def test_one_request_alone() -> None:
    """30 prompt tokens, then two decodes of one request."""
    [answer] = Simulation(MACHINE, [Arrival(1.0, 30, 3)]).run(2.0).answered
    assert (answer.ttft, answer.tpot) == (pytest.approx(0.040), pytest.approx(0.011))


def test_prompts_wait_for_each_other_and_for_room() -> None:
    """Two are prefilled at once, in chunks of 50 tokens; the third waits until one of them has been answered."""
    arrivals = [Arrival(0.0, 30, 2), Arrival(0.0, 40, 2), Arrival(0.0, 10, 1)]
    first, second, third = Simulation(MACHINE, arrivals).run(0.0).answered
    assert (first.ttft, second.ttft) == (pytest.approx(0.060), pytest.approx(0.090))
    assert third.ttft == pytest.approx(0.090 + 0.012 + 0.020)


def test_quanta_drain_fairly_with_iterations() -> None:
    """Two quanta fit before each decode; before a prefill of one that waits there is one, as in the co-trainer."""
    simulation = Simulation(MACHINE, [Arrival(0.0, 30, 4)], Always())
    [answer] = simulation.run(0.0).answered
    assert (answer.ttft, answer.tpot) == (pytest.approx(0.004 + 0.040), pytest.approx(0.011 + 2 * 0.004))
    assert simulation.outcome.trained_s == pytest.approx(7 * 0.004)


LAGGING = replace(MACHINE, launch_s=0.001, lag_s=0.002, overlap=0.25)
"""Each quantum: 1 ms of the host, then 2 ms later 4 ms of the device, a quarter of which an iteration feels."""


def test_an_overlapped_quantum_delays_by_its_launch_and_a_part() -> None:
    """It ends within the iteration, and the next one is launched before the next iteration."""
    simulation = Simulation(LAGGING, [Arrival(0.0, 30, 4)], Always())
    [answer] = simulation.run(0.0).answered
    assert (answer.ttft, answer.tpot) == (pytest.approx(0.001 + 0.041), pytest.approx(0.001 + 0.011 + 0.25 * 0.004))
    assert simulation.outcome.trained_s == pytest.approx(4 * 0.005)


def test_nothing_is_launched_behind_a_quantum_that_outlasts_its_iteration() -> None:
    """Quanta of 20 ms beside decodes of 11: each delays two of them, and is counted after the second.

    The prefill feels half of 20 ms. A decode takes 1 ms for the launch, 2 before the device begins and 18 for the other
    9 beside it; the next one feels half of the 2 ms that are left.
    """
    machine = replace(LAGGING, quanta=(TimedQuantum("mlp", 64, 0.020),), overlap=0.5)
    governor = Noting()
    [answer] = Simulation(machine, [Arrival(0.0, 30, 5)], governor).run(0.0).answered
    assert answer.ttft == pytest.approx(0.001 + 0.040 + 0.5 * 0.020)
    pair = (0.001 + 0.002 + 0.018) + (0.011 + 0.5 * 0.002)
    assert answer.tpot == pytest.approx(2 * pair / 4)
    assert governor.ended == [pytest.approx(answer.ttft + number * pair) for number in range(3)]


def test_an_iteration_is_delayed_until_the_device_is_free_where_both_drain_fairly() -> None:
    machine = replace(LAGGING, overlap=1.0)
    [answer] = Simulation(machine, [Arrival(0.0, 30, 2)], Always()).run(0.0).answered
    assert answer.ttft == pytest.approx(0.001 + 0.040 + 0.004)


def test_a_request_does_not_wait_for_the_end_of_a_quantum_on_a_device() -> None:
    """It comes 1.5 ms after a launch: its prefill begins at once, beside the 4 ms that are still to run."""
    outcome = Simulation(LAGGING, [Arrival(0.0155, 30, 1)], Always()).run(0.0)
    assert outcome.preemption_s == [pytest.approx(0.021 - 0.0155)]
    assert outcome.answered[0].ttft == pytest.approx(0.040 + 0.25 * 0.004)
    assert (outcome.most_met, outcome.preemptions) == (1, 0)


def test_what_is_cached_is_not_computed() -> None:
    """20 of 30 prompt tokens are in the cache: 10 are computed, each with the cached ones before it."""
    machine = replace(MACHINE, prefill=(0.010, 0.001, 1e-5))
    [answer] = Simulation(machine, [Arrival(0.0, 30, 1, cached=20)]).run(0.0).answered
    assert answer.ttft == pytest.approx(0.010 + 10 * 0.001 + 10 * (5 + 20) * 1e-5)


@pytest.mark.parametrize("machine", [MACHINE, LAGGING], ids=["at once", "lagging"])
def test_only_iterations_free_of_training_are_learnt_and_what_they_are_is_counted(machine: Machine) -> None:
    """Training only beside the first request: the second's iterations are the engine's own, each as it was."""
    outcome = Simulation(machine, [Arrival(0.0, 30, 4), Arrival(1.0, 30, 4)], Until(0.5)).run(0.0)
    assert (outcome.learnt, outcome.misbooked) == (4, 0)


def test_a_request_waits_for_the_quantum_that_it_meets() -> None:
    outcome = Simulation(MACHINE, [Arrival(0.0105, 30, 1)], Always()).run(0.0)
    assert outcome.preemption_s == [pytest.approx(0.012 - 0.0105)]
    assert outcome.preemptions == 1


def test_an_idle_hour_is_training() -> None:
    outcome = Simulation(MACHINE, [], Always()).run(60.0)
    assert outcome.share == pytest.approx(1.0)
    assert outcome.steps == pytest.approx(60.0 / 0.008, abs=1)
