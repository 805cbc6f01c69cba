"""The simulated engine can be calculated by hand."""

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


def test_quanta_take_turns_with_iterations() -> None:
    """Two quanta fit before each decode; before a prefill of one that waits there is one, as in the co-trainer."""
    simulation = Simulation(MACHINE, [Arrival(0.0, 30, 4)], Always())
    [answer] = simulation.run(0.0).answered
    assert (answer.ttft, answer.tpot) == (pytest.approx(0.004 + 0.040), pytest.approx(0.011 + 2 * 0.004))
    assert simulation.outcome.trained_s == pytest.approx(7 * 0.004)


def test_an_overlapped_quantum_delays_by_a_part() -> None:
    [answer] = Simulation(replace(MACHINE, overlap=0.25), [Arrival(0.0, 30, 4)], Always()).run(0.0).answered
    assert answer.tpot == pytest.approx(0.011 + 0.25 * 2 * 0.004)


def test_a_request_waits_for_the_quantum_that_it_meets() -> None:
    outcome = Simulation(MACHINE, [Arrival(0.0105, 30, 1)], Always()).run(0.0)
    assert outcome.preemption_s == [pytest.approx(0.012 - 0.0105)]
    assert outcome.preemptions == 1


def test_an_idle_hour_is_training() -> None:
    outcome = Simulation(MACHINE, [], Always()).run(60.0)
    assert outcome.share == pytest.approx(1.0)
    assert outcome.steps == pytest.approx(60.0 / 0.008, abs=1)
