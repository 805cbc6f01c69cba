"""`Plan`: the blocks of a benchmark run in their order: systems and tuning grids, loads, rounds."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from serving.bench.metrics import Block, attained, attainment
from serving.bench.trace import AS_TRACED, Arrival, ArrivalProcess, Trace
from serving.cotrainer.slo import Slo

Policy = Literal["rest", "slo", "aimd", "slo_steps", "slo_pause", "slo_long", "idle_steps", "stop_the_world", "unpaced"]
"""Rule by which the engine trains; `serving.bench.systems` implements them."""
Options = dict[str, float]
"""Settings of a system, by name."""
FEASIBLE = 0.99
"""A setting is feasible if it keeps this part of the attainment of inference only (A*)."""
STRICT_TTFT, STRICT_TPOT = 3.0, 2.0
"""Strict targets, as multiples of the medians of inference only at load 0.6."""
SQUARE = (0.2, 1.0, 5.5)
"""Low and high load, and the period in seconds."""
TUNING_SLICE, MEASURED_SLICE, NEXT_SLICE = 0.05, 0.30, 0.025
"""Start of the tuning runs and of the first round in the trace, and from round to round, as fractions of it."""
MOST_ROUNDS = 28
"""Rounds with a slice of the trace of their own: no measured request is seen in tuning, or in two rounds."""
START_S, SEARCH_S, PAUSE_S = 120.0, 24.0, 2.0
"""Estimated times of the start, of each step of the search for the capacity, and between two blocks."""
STOCK_S = 3.0
"""Length of a turn in a pair with stock SGLang: short, so that the machine is the same in both."""
MICRO_BATCHES = ({"micro_batch": 1.0}, {"micro_batch": 2.0}, {"micro_batch": 4.0}, {"micro_batch": 8.0})


@dataclass(frozen=True)
class System:
    """One of the compared systems."""

    label: str
    policy: Policy
    place: Literal["nowhere", "engine", "separate"]
    """Process of its trainer."""
    grid: tuple[Options, ...] = ()
    """Settings that are tried in tuning; empty: it is not tuned."""


SYSTEMS = {
    "inference": System("B0 inference only", "rest", "nowhere"),
    "training": System("B1 training only", "unpaced", "engine"),
    "separate": System("B2 separate process", "rest", "separate"),
    "partition": System(
        "B3 nice partition", "rest", "separate", ({"nice": 5.0}, {"nice": 10.0}, {"nice": 15.0}, {"nice": 19.0})
    ),
    "hard": System(
        "B6 hard partition", "rest", "separate", ({"share": 0.1}, {"share": 0.2}, {"share": 0.3}, {"share": 0.5})
    ),
    "stop": System(
        "B4 stop-the-world", "stop_the_world", "engine",
        ({"period_s": 1.0, "steps": 1.0}, {"period_s": 2.0, "steps": 1.0}, {"period_s": 2.0, "steps": 4.0},
         {"period_s": 4.0, "steps": 8.0}),
    ),
    "unpaced": System("B5 unpaced colocation", "unpaced", "engine", MICRO_BATCHES),
    "unpaced_equal": System("B5 at most umbel's tokens", "unpaced", "engine"),
    "idle": System(
        "B7 whole step when idle", "idle_steps", "engine",
        ({"idle_s": 0.0}, {"idle_s": 0.02}, {"idle_s": 0.1}, {"idle_s": 0.5}),
    ),
    "ours": System("umbel", "slo", "engine"),
    "ours_no_predictor": System("umbel without predictor", "aimd", "engine"),
    "ours_whole_step": System("umbel without layer quanta", "slo_steps", "engine"),
    "ours_pause": System("umbel pausing on every prefill", "slo_pause", "engine"),
    "ours_long": System("umbel with an idle engine's longer quanta", "slo_long", "engine"),
}  # fmt: skip
SAME_SETTING = {"unpaced_equal": "unpaced"}
"""System → the system whose tuned setting it takes."""
USUAL_SHARE = 0.3
"""Share of the hard partition in a run that tunes nothing."""
JOINT = ("separate", "partition", "hard", "stop", "unpaced", "idle")
"""Baselines that serve and train."""
CORE = ("inference", "partition", "hard", "stop", "unpaced", "idle", "ours")
"""Systems of the plots."""
PARTITIONS = ("inference", "partition", "hard", "ours")
"""Systems of every condition with time to train in; the other baselines never came near them, and run at 0.6 alone."""
ABLATIONS = ("ours_no_predictor", "ours_whole_step", "ours_pause", "ours_long")
STEADY = ("0.3", "0.6", "0.8")
"""Loads at which an attainment is claimed, of umbel relative to inference only."""
CLAIMED = ("inference", "ours")
"""Systems of that claim: they alone run in the rounds that only it needs."""


@dataclass(frozen=True)
class Spec:
    """A block that is to be run."""

    phase: Literal["stock", "tune", "measure"]
    condition: str
    system: str
    round: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.phase, self.condition, self.system, self.round


@dataclass(frozen=True)
class Plan:
    """Extent of a run. Windows are seconds."""

    window: float
    tuning_window: float
    rounds: int
    """Rounds of every system."""
    attained_requests: int
    """Requests at each load of `STEADY`, for which further rounds of `CLAIMED` are run."""
    conditions: dict[str, tuple[str, ...]]
    """Condition → the systems that are measured under it."""
    tuned: tuple[str, ...]
    """Systems that are tuned."""
    stock_pairs: int
    """Pairs of turns, umbel without training and stock SGLang."""
    bisections: int
    """Steps of the search for the capacity; 0: no search."""

    def specs(self, capacity: float) -> Iterator[Spec]:
        """Yield every block in its order; `capacity` is in requests per second."""
        for pair in range(self.stock_pairs):
            both = ("stock", "umbel_off") if pair % 2 else ("umbel_off", "stock")
            yield from (Spec("stock", "alone", server, pair) for server in both)
        for system in self.tuned:
            yield from (Spec("tune", "0.6", system, run) for run in range(len(SYSTEMS[system].grid)))
        for number in range(self.rounds):
            yield Spec("measure", "none", "training", number)
            for condition, systems in self.conditions.items():
                yield from (Spec("measure", condition, system, number) for system in interleaved(systems, number))
        for number in range(self.rounds, MOST_ROUNDS):
            for condition in STEADY:
                if number < self.rounds_for(float(condition) * capacity):
                    yield from (Spec("measure", condition, system, number) for system in interleaved(CLAIMED, number))

    def in_engine(self) -> "Plan":
        """Return the plan without trainers in a process of their own, which share nothing but a core with an engine."""
        return replace(
            self,
            conditions={name: tuple(filter(_in_engine, systems)) for name, systems in self.conditions.items()},
            tuned=tuple(filter(_in_engine, self.tuned)),
        )

    def rounds_for(self, rate: float) -> int:
        """Return the rounds in which `attained_requests` come at `rate` per second."""
        return min(MOST_ROUNDS, math.ceil(self.attained_requests / max(1, round(rate * self.window))))

    def seconds(self, capacity: float = 0.0) -> float:
        """Return an estimate of the whole run, starts and pauses included; without a capacity the most it can be."""
        specs = list(self.specs(capacity))
        windows = {"stock": STOCK_S, "tune": self.tuning_window, "measure": self.window}
        return START_S + SEARCH_S * self.bisections + sum(windows[spec.phase] + PAUSE_S for spec in specs)


def _in_engine(system: str) -> bool:
    return SYSTEMS[system].place != "separate"


FULL = Plan(
    window=11.0,
    tuning_window=8.0,
    rounds=6,
    attained_requests=400,  # 368 without one that is late show 0.99
    conditions={
        "0.3": PARTITIONS,
        "0.6": (*CORE, "separate", "unpaced_equal", *ABLATIONS),
        "0.8": PARTITIONS,
        "1.2": CLAIMED,
        "square": PARTITIONS,
    },
    tuned=("partition", "hard", "stop", "unpaced", "idle"),
    stock_pairs=16,
    bisections=4,
)
SMOKE = Plan(
    window=8.0, tuning_window=8.0, rounds=1, attained_requests=0,
    conditions={"0.6": ("inference", "partition", "hard", "unpaced", "ours")}, tuned=(), stock_pairs=0, bisections=0,
)  # fmt: skip


def interleaved(systems: tuple[str, ...], number: int) -> tuple[str, ...]:
    """Return the systems in the order of a round: every second one backwards (ABBA), so that a drift hits all alike.

    `unpaced_equal`, which trains as much as umbel did, comes directly after umbel.
    """
    order = [system for system in (systems if number % 2 == 0 else systems[::-1]) if system != "unpaced_equal"]
    if "unpaced_equal" in systems:
        order.insert(order.index("ours") + 1, "unpaced_equal")
    return tuple(order)


def workload(
    trace: Trace, spec: Spec, capacity: float, saturation: float, seconds: float, process: ArrivalProcess = AS_TRACED
) -> tuple[Arrival, ...]:
    """Return the arrivals of a block: the same for every system of a round, others in each round.

    A load is a part of the capacity; a load above 1 is a multiple of the saturated rate, as only that is overload.
    """
    slice_of = MEASURED_SLICE + NEXT_SLICE * spec.round if spec.phase == "measure" else TUNING_SLICE
    match spec.condition:
        case "none":
            return ()
        case "square":
            low, high, period = SQUARE
            return trace.square(low * capacity, high * capacity, seconds, period, seed=spec.round)
        case load:
            rate = float(load) * (saturation if float(load) > 1 else capacity)
            return trace.replay(rate, seconds, slice_of, process)


def strict(block: Block) -> Slo:
    """Return strict targets, from a block of inference only."""
    ttft = sorted(request.ttft for request in block.requests if request.ttft is not None)
    tpot = sorted(request.tpot for request in block.requests if request.tpot is not None)
    return Slo.usual(STRICT_TTFT * ttft[len(ttft) // 2], STRICT_TPOT * tpot[len(tpot) // 2])


def tuned(blocks: list[Block], slo: Slo, reference: float) -> dict[str, Options]:
    """Return each system's best setting: most training among the feasible ones, else the highest attainment.

    `reference` is the attainment of inference only.
    """
    best: dict[str, tuple[bool, float, Options]] = {}
    for block in blocks:
        if block.phase != "tune":
            continue
        attained = attainment([block], slo)
        feasible = attained >= FEASIBLE * reference
        score = (feasible, block.training_rate if feasible else attained, block.options)
        if block.system not in best or score[:2] > best[block.system][:2]:
            best[block.system] = score
    return {system: score[2] for system, score in best.items()}


def not_told_apart(blocks: list[Block], slo: Slo, system: str, taken: Options) -> list[Options]:
    """Return the other settings of a system whose attainment in tuning does not differ clearly from the taken one's.

    Their exact intervals overlap. Training is not asked: one run each says nothing of its noise.
    """
    runs = [(b.options, attained([b], slo)) for b in blocks if (b.phase, b.system) == ("tune", system)]
    chosen = next(share for options, share in runs if options == taken)
    return [
        options for options, share in runs if options != taken and share.high >= chosen.low and share.low <= chosen.high
    ]
