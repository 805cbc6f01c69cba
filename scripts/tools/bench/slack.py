"""Shows by ablation, in the simulator, what each part of the slack earns: known prompts, targets per prompt, the fit.

The real governor and predictor train beside simulated loads on two machines, whole and with one part taken away. Each
run begins with the measurement of a real start, of prompts up to 100 tokens. All variants get the same requests, and
are judged by the same targets: those of the whole governor, of a site without [slo].
"""

import argparse
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from serving.bench.machines import PRESETS, Machine, calibrated
from serving.bench.trace import Arrival
from serving.bench.virtual import Simulation
from serving.cotrainer import predictor as predictor_module
from serving.cotrainer.governor import Load, SloGovernor, Waiting
from serving.cotrainer.predictor import Batch, Predictor
from serving.cotrainer.slo import Slo, default_slo
from serving.engine import MEASURED_LOADS

LONG = 4096
ROUGH: Mapping[str, Mapping[str, Any]] = {preset: {"hiccup": (0.03, 5.0)} for preset in PRESETS}
"""A rough machine: one iteration or quantum in 33 takes five times as long."""
SHORT = 20
"""In the row "cut short" one duration in so many is a tenth of the true one, as a wrong attribution makes it."""


@dataclass(frozen=True)
class Users:
    """A load: medians of log-normal lengths, and what is special in it."""

    rate: float
    prompt: int
    output: int
    cached: float = 0.0
    """Part of each prompt that is in the cache."""
    long: float = 0.0
    """Share of prompts of 4096 tokens."""

    def arrivals(self, seconds: float, seed: int) -> Iterator[Arrival]:
        """Draw Poisson arrivals."""
        rng, at = random.Random(seed), 0.0
        while (at := at + rng.expovariate(self.rate)) < seconds:
            prompt, output = (1 + int(rng.lognormvariate(math.log(m), 0.5)) for m in (self.prompt, self.output))
            prompt = LONG if rng.random() < self.long else prompt
            yield Arrival(at, prompt, output, cached=int(prompt * self.cached))


CHAT = {"cpu": Users(2.5, 64, 100), "gpu": Users(6, 300, 130)}
CACHED = {"cpu": Users(4, 1000, 20, cached=0.9), "gpu": Users(3, 8000, 60, cached=0.9)}
QUEUED = {"cpu": Users(4.5, 1000, 20, cached=0.9), "gpu": Users(6, 8000, 60, cached=0.9)}
PLACES = {"cpu": {"max_running": 2}, "gpu": {"max_running": 6}}
LONGER = {"cpu": Users(1.5, 64, 100, long=0.03), "gpu": Users(5, 300, 130, long=0.03)}


class WholePrompts(Simulation):
    """Knows nothing of the cache and of earlier chunks: every prompt is still to be computed."""

    def _load(self) -> Load:
        load = super()._load()
        whole = (Waiting(w.arrival, w.prompt_tokens + w.cached_tokens, w.interactive) for w in load.waiting)
        return Load(load.streams, tuple(whole))


class CutShort(Predictor):
    """Is told a tenth of the duration of one iteration in `SHORT`."""

    def __init__(self) -> None:
        super().__init__()
        self._count = count(1)

    def observe(self, batch: Batch, seconds: float) -> None:
        super().observe(batch, seconds if next(self._count) % SHORT else seconds / 10)


@dataclass(frozen=True)
class Variant:
    """The governor, whole or with a part taken away."""

    simulation: type[Simulation] = Simulation
    predictor: type[Predictor] = Predictor
    one_number: bool = False
    """True: every prompt has the same target to the first token, three times what the measurement's prompts took."""
    least_squares: bool = False
    """True: the fit is plain least squares on relative errors, and any ratio counts while iterations are few."""

    def run(self, machine: Machine, arrivals: Sequence[Arrival], seconds: float, seed: int) -> "Result":
        """Train beside the load."""
        kept = predictor_module.REWEIGHTED, predictor_module.OUTLIER
        if self.least_squares:
            predictor_module.REWEIGHTED, predictor_module.OUTLIER = 1, (math.inf, 1.0)
        predictor = start(machine, self.predictor())
        slo = judge = targets(start(machine, Predictor()))
        if self.one_number:
            ttft_s = 3 * (predictor.typical("prefill") + predictor.typical("decode"))
            slo = replace(slo, ttft_s=ttft_s, ttft_per_token_s=0.0)
        governor = SloGovernor(slo, predictor, share_floor=0.0, share_cap=1.0)
        outcome = self.simulation(machine, arrivals, governor, predictor, seed=seed).run(seconds)
        predictor_module.REWEIGHTED, predictor_module.OUTLIER = kept
        counted = governor.met / max(governor.answered, 1)
        return Result(outcome.attainment(judge)[2], counted, 60 * outcome.steps / outcome.seconds)


class Result(NamedTuple):
    """Shares in time, by the judge's targets and by the variant's own, and optimizer steps per minute."""

    in_time: float
    counted: float
    steps: float


WHOLE, CUT_SHORT = Variant(), Variant(predictor=CutShort)
PARTS: tuple[tuple[str, Mapping[str, Users], Mapping[str, Mapping[str, Any]], Variant, Variant], ...] = (
    ("what is cached", CACHED, {}, WHOLE, Variant(simulation=WholePrompts)),
    ("what is cached, queues", QUEUED, PLACES, WHOLE, Variant(simulation=WholePrompts)),
    ("a target per prompt", LONGER, {}, WHOLE, Variant(one_number=True)),
    ("the robust fit", CHAT, {}, WHOLE, Variant(least_squares=True)),
    ("the robust fit, rough", CHAT, ROUGH, WHOLE, Variant(least_squares=True)),
    ("the robust fit, cut short", CHAT, {}, CUT_SHORT, replace(CUT_SHORT, least_squares=True)),
)
"""Name of a part, its load, changes of the machine, and the governor with the part and without."""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=200.0, help="of each simulated run")
    parser.add_argument("--seeds", type=int, default=6, help="runs per row; differences are of the same seeds")
    options = parser.parse_args()
    print("machine  part                       alone    in time           by its own count  steps/min, with → without")
    for preset, machine in PRESETS.items():
        for name, users, changes, whole, without in PARTS:
            measured = replace(machine, **changes.get(preset, {}))
            alone, results = [], []
            for seed in range(options.seeds):
                arrivals = tuple(users[preset].arrivals(options.seconds, seed))
                outcome = Simulation(measured, arrivals, seed=seed).run(options.seconds)
                alone.append(outcome.attainment(targets(start(measured, Predictor())))[2])
                results.append([each.run(measured, arrivals, options.seconds, seed) for each in (whole, without)])
            print(f"{preset:8} {name:26} {line(alone, np.array(results))}", flush=True)


def start(machine: Machine, predictor: Predictor) -> Predictor:
    """Let a predictor learn what a real engine is measured with at its start."""
    known = calibrated(machine)
    for quantum in machine.quanta:
        predictor.seed_quantum(quantum.kind, quantum.tokens, known.quantum_high(quantum))
    loads = (Arrival(30.0 * n, tokens, 12) for n, (many, tokens) in enumerate(MEASURED_LOADS) for _ in range(many))
    Simulation(machine, tuple(loads), predictor=predictor).run(0.0)
    return predictor


def targets(predictor: Predictor) -> Slo:
    """Return the default targets."""
    slo = default_slo(predictor)
    assert slo is not None
    return slo


def line(alone: Sequence[float], results: npt.NDArray[np.float64]) -> str:
    """Return the cells of a row; `results` is (runs, with and without, fields of `Result`)."""
    whole, without = (Result(*values) for values in results.mean(axis=0))
    steps = results[:, 1, 2] - results[:, 0, 2]
    error = float(steps.std(ddof=1)) / math.sqrt(len(steps))
    return (
        f"{np.mean(alone):6.2%}   {whole.in_time:6.2%} → {without.in_time:6.2%}   "
        f"{whole.counted:6.2%} → {without.counted:6.2%}   "
        f"{whole.steps:6.1f} → {without.steps:6.1f} ({without.steps - whole.steps:+.1f} ± {error:.1f})"
    )


if __name__ == "__main__":
    main()
