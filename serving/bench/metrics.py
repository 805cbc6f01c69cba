"""`Block`: one run of one system in the benchmark, and the metrics that are computed from it. Pure; times are seconds.

TTFT counts from the moment a request was due, TPOT is (last − first) / (tokens − 1), and a request that failed or was
not answered within the drain has missed its targets.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict

from serving.bench.intervals import CONFIDENCE, Interval, binomial, paired
from serving.bench.load import Outcome
from serving.cotrainer.slo import Slo
from serving.trainer_socket import CoTrainerStatus, PreemptionStats

BUSIEST_CLIENT_CORE = 0.6
"""A block is void if the client's core was busier: HTTP, detokenizer and load may then be what was measured."""


HOOKS, JOBLESS = "hooks", "jobless"
"""Kinds of time beside quanta, in the status of the benchmark's co-trainer."""


class Request(BaseModel):
    """A request as it is saved; null in JSON where `Outcome` has NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: float
    ttft: float | None
    tpot: float | None
    """None for an answer of one token."""
    longest_gap: float
    tokens: int
    version: str
    """Digest of the adapter that answered; empty for the initial one."""
    error: str = ""

    @classmethod
    def of(cls, outcome: Outcome, digests: Mapping[str, str]) -> "Request":
        """Convert an outcome; `digests` is version → digest of its weights."""
        ttft, tpot = outcome.ttft, outcome.tpot
        return cls(
            at=outcome.arrival.at,
            ttft=None if math.isnan(ttft) else ttft,
            tpot=None if math.isnan(tpot) else tpot,
            longest_gap=outcome.longest_gap,
            tokens=outcome.tokens,
            version=digests.get(outcome.version, ""),
            error=outcome.error or ("" if outcome.ok else f"{outcome.tokens} of {outcome.arrival.output} tokens"),
        )

    def met(self, slo: Slo) -> bool:
        """Return whether it was answered within both targets."""
        return (
            not self.error
            and self.ttft is not None
            and self.ttft <= slo.ttft_s
            and (self.tpot is None or self.tpot <= slo.tpot_s)
        )


class Publication(BaseModel):
    """A version on its way to users; seconds after the start of the block."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    digest: str
    trained_at: float
    """Time at which its weights had been written."""
    live_at: float
    """Time at which the alias named it."""
    first_token_at: float | None = None
    """Time of the first token of the first request that it answered."""


class Spent(BaseModel):
    """Seconds of the engine's thread within a block's window."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    quanta_s: float
    hooks_s: float
    """In the co-trainer's hooks, without the quanta: looking at requests, polling, deciding, counting."""
    jobless_s: float
    """Between two rounds, with no job to train."""

    @classmethod
    def between(cls, before: CoTrainerStatus, after: CoTrainerStatus) -> "Spent":
        """Return what was spent from one status of an engine to a later one."""
        spent = {
            kind: stats.seconds - (before.quanta[kind].seconds if kind in before.quanta else 0.0)
            for kind, stats in after.quanta.items()
        }
        hooks, jobless = spent.pop(HOOKS, 0.0), spent.pop(JOBLESS, 0.0)
        return cls(quanta_s=sum(spent.values()), hooks_s=hooks, jobless_s=jobless)


class Block(BaseModel):
    """One run of one system under one load: a line of `blocks.jsonl`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    phase: Literal["capacity", "preset", "stock", "tune", "measure"]
    condition: str
    system: str
    round: int
    window: float
    options: dict[str, float] = {}
    """The system's settings in this run."""
    offered: float = 0.0
    """Requests per second."""
    requests: tuple[Request, ...] = ()
    steps: int = 0
    """Optimizer steps applied within the window."""
    tokens: int = 0
    """Tokens in those steps."""
    versions: tuple[Publication, ...] = ()
    progress: tuple[tuple[float, int], ...] = ()
    """(seconds, steps so far)."""
    preemption: PreemptionStats | None = None
    """Preemptions in this block; None if the system does not train in the engine's own loop."""
    longest_quantum_s: float = 0.0
    cores: tuple[float, float] = (0.0, 0.0)
    """Busy share of the engine's core and of the client's."""
    engine_share: float = 0.0
    """Share of its core that the engine's scheduler has used, training in it included."""
    trainer_share: float = 0.0
    """Share of the engine's core that a trainer in a process of its own has used."""
    spent: Spent | None = None
    """None if no trainer in the engine was measured."""

    @property
    def key(self) -> tuple[str, str, str, int]:
        return self.phase, self.condition, self.system, self.round

    @property
    def void(self) -> bool:
        """Return whether the client's core was too busy for the block to count."""
        return self.cores[1] > BUSIEST_CLIENT_CORE

    @property
    def training_rate(self) -> float:
        """Return the tokens in applied steps per second."""
        return self.tokens / self.window


@dataclass
class Setting:
    """Load and targets of a run, measured once before any system is compared."""

    saturation: float
    """Requests per second of a full engine."""
    capacity: float
    """The rate at which inference only still keeps its targets."""
    ttft_s: float
    tpot_s: float
    attained: float
    """Attainment of inference only at load 0.6 with these targets."""

    @property
    def slo(self) -> Slo:
        return Slo.usual(self.ttft_s, self.tpot_s)


Quality = Mapping[str, float]
"""Digest of a version → its loss on the held-out set in nats per token; "" is the initial version, the base's equal."""


def attainment(blocks: Sequence[Block], slo: Slo) -> float:
    """Return the share of requests that met both targets; 1 without requests."""
    met = [request.met(slo) for block in blocks for request in block.requests]
    return sum(met) / len(met) if met else 1.0


def attained(blocks: Sequence[Block], slo: Slo) -> Interval:
    """Return the attainment with its exact binomial interval, requests taken as independent; NaN without requests."""
    met = [request.met(slo) for block in blocks for request in block.requests]
    return binomial(sum(met), len(met))


def goodput(block: Block, slo: Slo) -> float:
    """Return G_slo: requests per second that met both targets."""
    return sum(request.met(slo) for request in block.requests) / block.window


def quality_goodput(block: Block, slo: Slo, quality: Quality) -> float:
    """Return G_q: G_slo with each request weighed by 1 / loss of the version that answered it."""
    return sum(1 / quality[r.version] for r in block.requests if r.met(slo)) / block.window


def gain_goodput(block: Block, slo: Slo, quality: Quality) -> float:
    """Return G_dq: G_slo with each request weighed by the gain of its version over the base, in nats.

    Unlike G_q it does not depend on the scale of the loss.
    """
    gains = (max(0.0, quality[""] - quality[r.version]) for r in block.requests if r.met(slo))
    return sum(gains) / block.window


def publish_lags(blocks: Sequence[Block]) -> list[float]:
    """Return the seconds from each version's written weights to its first token for a user."""
    versions = [version for block in blocks for version in block.versions]
    return [v.first_token_at - v.trained_at for v in versions if v.first_token_at is not None]


def values(blocks: Sequence[Block], name: Literal["ttft", "tpot", "longest_gap"]) -> list[float]:
    """Return all latencies of one kind; a failed request is infinitely late, and has no gap."""
    requests = [request for block in blocks for request in block.requests]
    if name == "longest_gap":
        return [request.longest_gap for request in requests if not request.error]
    found = [getattr(request, name) if not request.error else math.inf for request in requests]
    return [value for value in found if value is not None]


def quantile(numbers: Sequence[float], q: float) -> float:
    """Return the smallest number that a share `q` of them does not exceed; NaN if there are none.

    Of fewer than 1 / (1 − q) numbers that is the largest; see `is_largest`.
    """
    ordered = sorted(numbers)
    return ordered[min(len(ordered) - 1, math.ceil(q * len(ordered)) - 1)] if ordered else math.nan


def is_largest(count: int, q: float) -> bool:
    """Return whether the quantile `q` of so few numbers is merely the largest."""
    return math.ceil(q * count) >= count


def pairs(
    ours: Sequence[Block], theirs: Sequence[Block], of: Callable[[Block], float]
) -> dict[int, tuple[float, float]]:
    """Return (ours, theirs) of each common round."""
    other = {block.round: of(block) for block in theirs}
    return {block.round: (of(block), other[block.round]) for block in ours if block.round in other}


def paired_ratio(
    ours: Sequence[Block], theirs: Sequence[Block], of: Callable[[Block], float], confidence: float = CONFIDENCE
) -> Interval:
    """Return ours / theirs over the common rounds, with its interval; NaN if there is none."""
    return paired(list(pairs(ours, theirs, of).values()), confidence)


def read_blocks(out: Path) -> list[Block]:
    """Read the finished blocks of a run; a last line that was cut off is removed, so that it is run again."""
    file = out / "blocks.jsonl"
    if not file.is_file():
        return []
    whole = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    file.write_text("".join(whole))
    return [Block.model_validate_json(line) for line in whole]
