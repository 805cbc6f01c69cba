"""`RoundFold`: a round's updates, one by one: admit → measure → weigh → add up. Memory does not grow with the sites.

Sites do different numbers of steps in the same time, and a mean of their changes would follow those that do most. So
changes are taken per step, and the mean step is taken as often as the mean site did (FedNova, Wang et al., NeurIPS
2020, arXiv 2007.07481): G' = G + (Σ p_i τ_i) Σ p_i Δ_i / τ_i, with τ_i the steps of site i, p_i = n_i / Σ n, and n_i
the data that it holds. As Σ n_i τ_i and Σ n_i Δ_i / τ_i are sums over sites, so this, too, is folded one by one.

An update is added to the running mean, and forgotten, as soon as no update of another site can make it too long for
`norm_clip`: once about half of the sites have answered. Until then it waits on disk; under a robust rule all updates
wait until the last one is there, and only the sites' Gram matrix is in memory.
"""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from strategies import robust
from strategies.adapter import PUBLISHED, Adapter, Aggregate, Errors, Factors, Update, change, factors_of, tensors_of
from strategies.admission import Admitted
from strategies.lowrank import LowRank, gram, norm
from strategies.options import Options
from umbel import peft_dir
from umbel.errors import AdapterError, UmbelError
from umbel.messages import RoundReport


class Mean(Protocol):
    """The running mean of one round. Your own rule of aggregation is a class with these two methods."""

    def add(self, update: Factors, received: Adapter, amount: float) -> None:
        """Add `amount` times a site's change: its factors in `update` against those that it received."""

    def finish(self, total: float) -> tuple[Factors, dict[str, Errors]]:
        """Return the parent's factors moved by Σ amount · change / `total`, and module → their errors, if known."""


@dataclass
class _Entry:
    """An admitted update."""

    site: str
    staleness: int
    weight: float
    """n_i, less where it is late; not normalised."""
    steps: int
    """τ_i: the optimizer steps that it consists of."""
    length: float
    """‖Δ‖_F over all modules, per step."""
    received: Adapter
    waiting: Path | None
    """File of an update that is not in the mean yet; None once it is."""


class RoundFold:
    """The `strategies.rule.Fold` of every strategy; `admit` raises UmbelError with the reason for a refusal."""

    sites: int
    """Number of sites that may answer. It may grow until the first update is there, and decides what can be long."""

    def __init__(
        self, parent: Adapter, spool: Path, sites: int, mean: Mean, admit: Callable[[Update, int], Admitted],
        options: Options, measured: Callable[[LowRank], LowRank],
    ) -> None:  # fmt: skip
        self._parent = parent
        self._spool = spool
        self.sites = sites
        self._mean = mean
        self._admit = admit
        self._options = options
        self._measured = measured
        self._entries: list[_Entry] = []
        self._left_out: dict[str, str] = {}

    @property
    def admitted(self) -> tuple[str, ...]:
        """The sites whose updates take part so far, in order of arrival."""
        return tuple(dict.fromkeys(entry.site for entry in self._entries))

    def add(self, update: Update, staleness: int = 0) -> None:
        """Admit an update, or remember the reason why not. `staleness`: rounds since it was asked for."""
        try:
            self._require_new(update.site, staleness)
            admitted = self._admit(update, staleness)
        except UmbelError as refusal:
            self._left_out[update.site] = str(refusal)
            return
        steps = update.report.steps
        entry = _Entry(
            update.site, staleness, self._weight(update.report, staleness), steps,
            self._length(admitted) / steps, admitted.received, None,
        )  # fmt: skip
        self._entries.append(entry)
        bound = self._least_bound()
        if entry.length <= bound:
            self._mean.add(admitted.factors, admitted.received, entry.weight / steps)
        else:
            entry.waiting = self._spool / f"{len(self._entries)}.safetensors"
            entry.waiting.write_bytes(update.blob)
        for other in self._entries:
            if other.waiting is not None and other.length <= bound:
                self._take(other, other.waiting, other.weight / other.steps)

    def finish(self) -> Aggregate:
        """Weigh and add the updates that waited, and return the new version."""
        if not self._entries:
            return Aggregate({}, {}, self._left_out)
        self._entries.sort(key=lambda entry: (entry.site, entry.staleness))  # the order of arrival must not matter
        bound = robust.norm_bound([entry.length for entry in self._entries], self._options.norm_clip)
        scales = [1.0 if entry.waiting is None else _scale(entry.length, bound) for entry in self._entries]
        try:
            weighed = self._weigh(scales)
        except AdapterError as reason:
            return Aggregate({}, {}, self._left_out | {entry.site: str(reason) for entry in self._entries})
        weights: dict[str, float] = {}
        for index, (entry, weight, scale) in enumerate(zip(self._entries, weighed.weights, scales, strict=True)):
            if entry.waiting is not None and weight:
                self._take(entry, entry.waiting, weight * scale / entry.steps)
            weights[entry.site] = weights.get(entry.site, 0.0) + weight * scale / weighed.total
            if index in weighed.rejected:
                self._left_out[entry.site] = weighed.rejected[index]
        combined, errors = self._mean.finish(weighed.total / weighed.steps)
        return Aggregate(
            tensors_of(combined, PUBLISHED), weights, self._left_out,
            {module: error.of_version for module, error in errors.items()},
            {module: error.of_change for module, error in errors.items()},
        )  # fmt: skip

    def _weight(self, report: RoundReport, staleness: int) -> float:
        """Return n_i of an update, divided by √(1 + staleness) (FedBuff, arXiv 2106.06639); 1 for a robust rule."""
        options = self._options
        if options.robust != "none":
            return 1.0
        held = {"data": report.held_examples, "tokens": report.held_loss_tokens, "equal": 1}[options.weights]
        return min(held, options.weight_cap or held) / math.sqrt(1 + staleness)

    def _require_new(self, site: str, staleness: int) -> None:
        """Raise AdapterError for a second update of one site in one round."""
        for entry in self._entries:
            if entry.site == site and (entry.staleness == staleness or self._options.robust != "none"):
                raise AdapterError("it has an update in this round already; a site counts once")

    def _take(self, entry: _Entry, waiting: Path, amount: float) -> None:
        """Add an update that waited to the mean, and delete its file."""
        self._mean.add(factors_of(peft_dir.decode(waiting.read_bytes())), entry.received, amount)
        waiting.unlink()
        entry.waiting = None

    def _least_bound(self) -> float:
        """Return the smallest bound on ‖Δ‖_F that is possible once all sites have answered."""
        if self._options.robust != "none":
            return -math.inf
        missing = max(0, self.sites - len(self._entries))
        return robust.norm_bound([entry.length for entry in self._entries], self._options.norm_clip, missing)

    def _length(self, admitted: Admitted) -> float:
        """Return ‖Δ‖_F over all modules, computed one module at a time."""
        start = admitted.received.factors
        changes = (self._change(trained, start[module]) for module, trained in admitted.factors.items())
        return math.sqrt(sum(float(norm(one)) ** 2 for one in changes))

    def _change(self, trained: LowRank, received: LowRank) -> LowRank:
        return change(self._measured(trained), self._measured(received))

    def _weigh(self, scales: list[float]) -> "_Weighed":
        """Weigh the entries, whose changes are shortened by `scales`."""
        steps = [entry.steps for entry in self._entries]
        if self._options.robust == "none":
            weights = [entry.weight for entry in self._entries]
            total, most = math.fsum(weights), robust.norm_bound(steps, self._options.norm_clip)
            done = math.fsum(weight * min(count, most) for weight, count in zip(weights, steps, strict=True))
            return _Weighed(weights, total, done / total)
        per_step = torch.tensor(scales, dtype=torch.float64) / torch.tensor(steps, dtype=torch.float64)
        matrix = gram([_Changes(entry, self._change) for entry in self._entries]) * torch.outer(per_step, per_step)
        if self._options.robust == "geometric_median":
            return _Weighed(robust.geometric_median(matrix).tolist(), 1.0, statistics.median(steps))
        if self._options.robust == "multi_krum":
            chosen, rejected = robust.multi_krum(matrix, self._options.byzantine)
            return _Weighed(chosen.tolist(), 1.0, statistics.median(steps), rejected)
        trusted = self._trusted()
        trust, rejected = robust.fltrust(matrix, trusted)
        return _Weighed(trust.tolist(), 1.0, steps[trusted], rejected)

    def _trusted(self) -> int:
        """Return the index of the trusted site's entry; raise AdapterError without one."""
        for index, entry in enumerate(self._entries):
            if entry.site == self._options.trusted_site:
                return index
        raise AdapterError(f"fltrust: there is no update of the trusted site {self._options.trusted_site!r}")


@dataclass(frozen=True)
class _Weighed:
    """What the entries of a round count for."""

    weights: list[float]
    total: float
    """Divisor of the weights."""
    steps: float
    """Σ p_i τ_i: how many of the mean step are taken, with no τ_i above `norm_clip` times their median, as each is a
    site's own count. Under a robust rule no minority decides it: it is the median, for fltrust the trusted site's."""
    rejected: dict[int, str] = field(default_factory=dict)
    """Index → reason of entries that a robust rule rejects."""


class _Changes(Mapping[str, LowRank]):
    """The change in a waiting update: module path → change, each read from disk when it is asked for."""

    def __init__(self, entry: _Entry, change: Callable[[LowRank, LowRank], LowRank]) -> None:
        assert entry.waiting is not None
        self._path, self._received, self._change = entry.waiting, entry.received.factors, change

    def __getitem__(self, module: str) -> LowRank:
        # Opened for each module: a file that stays mapped counts as this process's memory.
        with safe_open(self._path, framework="pt") as file:
            b, a = (file.get_tensor(peft_dir.key(module, factor)) for factor in "BA")
        return self._change(LowRank(b, a), self._received[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self._received)

    def __len__(self) -> int:
        return len(self._received)


def _scale(length: float, bound: float) -> float:
    """Return the factor that shortens a change to the bound; 1 for one within it."""
    return min(1.0, bound / length) if length > 0 else 1.0
