"""A site without [slo] whose users send prompts of 4k tokens: they neither stop training nor are always late.

The engine is measured first as a real one is, with prompts of up to 100 tokens. Everything is counted.
"""

import random
from dataclasses import replace

import pytest

from serving.bench.machines import PRESETS, Machine, calibrated
from serving.bench.trace import Arrival
from serving.bench.virtual import Simulation
from serving.cotrainer.governor import Load, SloGovernor, Waiting
from serving.cotrainer.predictor import Predictor
from serving.cotrainer.slo import Slo, default_slo
from serving.engine import MEASURED_LOADS

LONG = 4096
SECONDS, EVERY_S = 400.0, 10.0


def measured(machine: Machine) -> Predictor:
    """Learn the engine from the requests of `EngineClient.measure`."""
    predictor = calibrated(machine)
    loads = [
        Arrival(10.0 * number, tokens, 12)
        for number, (together, tokens) in enumerate(MEASURED_LOADS)
        for _ in range(together)
    ]
    Simulation(machine, loads, predictor=predictor).run(0.0)
    return predictor


def one_number(slo: Slo, predictor: Predictor) -> Slo:
    """Return the targets with three times what the prompts of the measurement took, whatever the prompt."""
    ttft_s = 3 * (predictor.typical("prefill") + predictor.typical("decode"))
    return replace(slo, ttft_s=ttft_s, ttft_per_token_s=0.0)


class Watched(SloGovernor):
    """Counts how often it was asked while a long prompt waited, and how often there was room for a quantum."""

    asked = allowed = 0

    def budget(self, load: Load, now: float) -> float:
        seconds = super().budget(load, now)
        if any(request.asked_tokens == LONG for request in load.waiting):
            self.asked += 1
            self.allowed += seconds >= self.predictor.longest_quantum()
        return seconds


def mixed() -> list[Arrival]:
    """A short request every second on average, and a long prompt every ten seconds."""
    rng, short = random.Random(0), []
    at = 0.0
    while (at := at + rng.expovariate(1.0)) < SECONDS:
        short.append(Arrival(at, rng.randint(8, 100), 8))
    return sorted([*short, *(Arrival(n * EVERY_S + 5, LONG, 8) for n in range(40))], key=lambda arrival: arrival.at)


@pytest.mark.parametrize("preset", PRESETS)
def test_long_prompts_are_in_time_and_training_goes_on_beside_them(preset: str) -> None:
    """With one number for all prompts each of them would be late, and the gate shut as long as one waits."""
    machine, found = PRESETS[preset], {}
    alone = Simulation(machine, mixed()).run(SECONDS)
    for name in ("per prompt", "one number"):
        predictor = measured(machine)
        slo = default_slo(predictor)
        assert slo is not None
        slo = slo if name == "per prompt" else one_number(slo, predictor)
        governor = Watched(slo, predictor, share_floor=0.0, share_cap=1.0)
        outcome = Simulation(machine, mixed(), governor, predictor).run(SECONDS)
        long = [request for request in outcome.answered if request.arrival.prompt == LONG]
        assert (len(long), governor.asked >= 40) == (40, True)
        found[name] = sum(request.in_time(slo)[0] for request in long), governor.allowed
        if name == "per prompt":
            assert outcome.attainment(slo)[0] >= alone.attainment(slo)[0] - 0.01
            assert outcome.share > 0.4
    in_time, allowed = found["per prompt"]
    assert in_time >= 38
    assert allowed >= 20
    assert found["one number"] == (0, 0)


def test_the_gate_opens_while_a_long_prompt_waits_and_closes_before_it_is_late() -> None:
    """By the pure governor: at its arrival there is room, after half of its target there is none."""
    predictor = measured(PRESETS["cpu"])
    slo = default_slo(predictor)
    assert slo is not None
    decode = Load().decode._replace(requests=1, cached_tokens=10)

    def room(slo: Slo, waited: float, prompt_tokens: int = LONG) -> bool:
        governor = SloGovernor(slo, predictor, share_floor=0.0, share_cap=1.0)
        governor.iterated(decode, 0.01)
        return governor.budget(Load(waiting=(Waiting(0.0, prompt_tokens),)), waited) > 0

    target = slo.first_token_s(LONG)
    assert [room(slo, waited) for waited in (0.0, 0.1 * target, 0.5 * target, target)] == [True, True, False, False]
    assert not room(one_number(slo, predictor), 0.0)
    assert not room(slo, 0.1 * target, prompt_tokens=8)
