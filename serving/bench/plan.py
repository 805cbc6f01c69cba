"""What is run, in which order: the systems and their tuning grids, the loads, the rounds."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from serving.bench.metrics import Block, attainment
from serving.bench.trace import Arrival, Trace
from serving.cotrainer.governor import Slo

Policy = Literal["rest", "slo", "aimd", "slo_steps", "slo_pause", "idle_steps", "stop_the_world", "unpaced"]
"""What decides when the engine trains; `serving.bench.systems` has them."""
Options = dict[str, float]
FEASIBLE = 0.99
"""A*: the part of inference-only's attainment that must be left for a setting to count as feasible."""
STRICT_TTFT, STRICT_TPOT = 3.0, 2.0
"""The strict preset, times inference-only's median at load 0.6."""
SQUARE = (0.2, 1.0, 5.5)
"""Low and high load, and the period in seconds."""
TUNING_SLICE, MEASURED_SLICE = 0.05, 0.30
"""Where in the trace the runs begin, as a fraction of it: tuning sees nothing of what is measured."""
START_S, SEARCH_S, PAUSE_S = 120.0, 24.0, 2.0
"""What starting takes, each look for the capacity, and what lies between two blocks."""
STOCK_S = 3.0
"""A turn beside stock SGLang: short, so that the machine is the same in both turns of a pair."""
MICRO_BATCHES = ({"micro_batch": 1.0}, {"micro_batch": 2.0}, {"micro_batch": 4.0}, {"micro_batch": 8.0})


@dataclass(frozen=True)
class System:
    """A system that is compared."""

    label: str
    policy: Policy
    place: Literal["nowhere", "engine", "separate"]
    """Where its trainer lives."""
    grid: tuple[Options, ...] = ()
    """What it is tuned over, four runs each; empty: it is taken as it is."""


SYSTEMS = {
    "inference": System("B0 inference only", "rest", "nowhere"),
    "training": System("B1 training only", "unpaced", "engine"),
    "separate": System("B2 separate process", "rest", "separate"),
    "partition": System(
        "B3 static partition", "rest", "separate", ({"nice": 5.0}, {"nice": 10.0}, {"nice": 15.0}, {"nice": 19.0})
    ),
    "stop": System(
        "B4 stop-the-world", "stop_the_world", "engine",
        ({"period_s": 1.0, "steps": 1.0}, {"period_s": 2.0, "steps": 1.0}, {"period_s": 2.0, "steps": 4.0},
         {"period_s": 4.0, "steps": 8.0}),
    ),
    "unpaced": System("B5 unpaced colocation", "unpaced", "engine", MICRO_BATCHES),
    "unpaced_equal": System("B5 at equal training tokens", "unpaced", "engine"),
    "idle": System(
        "B7 whole step when idle", "idle_steps", "engine",
        ({"idle_s": 0.0}, {"idle_s": 0.02}, {"idle_s": 0.1}, {"idle_s": 0.5}),
    ),
    "ours": System("umbel", "slo", "engine"),
    "ours_no_predictor": System("umbel without predictor", "aimd", "engine"),
    "ours_whole_step": System("umbel without layer quanta", "slo_steps", "engine"),
    "ours_pause": System("umbel pausing on every prefill", "slo_pause", "engine"),
}  # fmt: skip
SAME_SETTING = {"unpaced_equal": "unpaced"}
"""Whose tuned setting a system takes."""
JOINT = ("separate", "partition", "stop", "unpaced", "idle")
"""Baselines that serve and train."""
CORE = ("inference", "partition", "stop", "unpaced", "idle", "ours")
ABLATIONS = ("ours_no_predictor", "ours_whole_step", "ours_pause")
LOADS = ("0.3", "0.6", "0.8", "1.2")


@dataclass(frozen=True)
class Spec:
    """A block to be run."""

    phase: Literal["stock", "tune", "measure"]
    condition: str
    system: str
    round: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.phase, self.condition, self.system, self.round


@dataclass(frozen=True)
class Plan:
    """How much of the protocol is run."""

    window: float
    tuning_window: float
    rounds: int
    conditions: dict[str, tuple[str, ...]]
    """Condition → the systems that are measured under it."""
    tuned: tuple[str, ...]
    stock_pairs: int
    bisections: int
    """Runs that the search for the capacity takes."""

    def specs(self) -> Iterator[Spec]:
        for pair in range(self.stock_pairs):
            both = ("stock", "umbel_off") if pair % 2 else ("umbel_off", "stock")
            yield from (Spec("stock", "alone", server, pair) for server in both)
        for system in self.tuned:
            yield from (Spec("tune", "0.6", system, run) for run in range(len(SYSTEMS[system].grid)))
        for number in range(self.rounds):
            yield Spec("measure", "none", "training", number)
            for condition, systems in self.conditions.items():
                yield from (Spec("measure", condition, system, number) for system in interleaved(systems, number))

    def seconds(self) -> float:
        """About how long it takes, starts and pauses included."""
        specs = list(self.specs())
        windows = {"stock": STOCK_S, "tune": self.tuning_window, "measure": self.window}
        return START_S + SEARCH_S * self.bisections + sum(windows[spec.phase] + PAUSE_S for spec in specs)


FULL = Plan(
    window=11.0,
    tuning_window=8.0,
    rounds=4,
    conditions={
        "0.3": CORE,
        "0.6": (*CORE, "separate", "unpaced_equal", *ABLATIONS),
        "0.8": CORE,
        "1.2": CORE,
        "square": CORE,
    },
    tuned=("partition", "stop", "unpaced", "idle"),
    stock_pairs=16,
    bisections=4,
)
SMOKE = Plan(
    window=8.0, tuning_window=8.0, rounds=1, conditions={"0.6": ("inference", "unpaced", "ours")},
    tuned=(), stock_pairs=0, bisections=0,
)  # fmt: skip


def interleaved(systems: tuple[str, ...], number: int) -> tuple[str, ...]:
    """ABBA: every second round backwards, so that what drifts with time hits all alike.

    The system that trains as much as umbel did comes directly after it.
    """
    order = [system for system in (systems if number % 2 == 0 else systems[::-1]) if system != "unpaced_equal"]
    if "unpaced_equal" in systems:
        order.insert(order.index("ours") + 1, "unpaced_equal")
    return tuple(order)


def workload(trace: Trace, spec: Spec, capacity: float, saturation: float, seconds: float) -> tuple[Arrival, ...]:
    """The arrivals of a block: the same for every system of a round, others in each round.

    A load is a part of the capacity; one above 1 is of what the engine answers at all, for that alone is overload.
    """
    slice_of = MEASURED_SLICE + 0.08 * spec.round if spec.phase == "measure" else TUNING_SLICE
    match spec.condition:
        case "none":
            return ()
        case "square":
            low, high, period = SQUARE
            return trace.square(low * capacity, high * capacity, seconds, period, seed=spec.round)
        case "poisson" | "gamma":
            draw = trace.poisson if spec.condition == "poisson" else trace.gamma
            return draw(0.6 * capacity, seconds, seed=spec.round)
        case load:
            rate = float(load) * (saturation if float(load) > 1 else capacity)
            return trace.replay(rate, seconds, slice_of)


def strict(block: Block, quantile: float = 0.99) -> Slo:
    """The strict preset, from a block of inference only."""
    ttft = sorted(request.ttft for request in block.requests if request.ttft is not None)
    tpot = sorted(request.tpot for request in block.requests if request.tpot is not None)
    return Slo(STRICT_TTFT * ttft[len(ttft) // 2], STRICT_TPOT * tpot[len(tpot) // 2], quantile)


def tuned(blocks: list[Block], slo: Slo, reference: float) -> dict[str, Options]:
    """System → its best setting: most training if it keeps `FEASIBLE` of `reference`, else most attainment."""
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
