"""`RoundFold`: a round's updates, one by one: admit → measure → weigh → add up. Memory does not grow with the sites.

An update is added to the running mean, and forgotten, as soon as no update of another site can make it too long for
`norm_clip`: once about half of the sites have answered. Until then it waits on disk; under a robust rule all updates
wait until the last one is there, and only the sites' Gram matrix is in memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from strategies import robust
from strategies.adapter import Adapter, Aggregate, Factors, Update, change, factors_of, tensors_of
from strategies.admission import Admitted
from strategies.lowrank import LowRank, gram, norm
from strategies.options import Options
from umbel import peft_dir
from umbel.errors import AdapterError, UmbelError


class Mean(Protocol):
    """The running mean of one round. Your own rule of aggregation is a class with these two methods."""

    def add(self, update: Factors, received: Adapter, amount: float) -> None:
        """Add `amount` times a site's change: its factors in `update` against those that it received."""

    def finish(self, total: float) -> tuple[Factors, dict[str, float]]:
        """Return the parent's factors moved by Σ amount · change / `total`, and module → relative error, if known."""


@dataclass
class _Entry:
    """An admitted update."""

    site: str
    staleness: int
    prior: float
    """Weight before a robust rule is applied; not normalised."""
    length: float
    """‖Δ‖_F over all modules."""
    received: Adapter
    waiting: Path | None
    """File of an update that is not in the mean yet; None once it is."""


class RoundFold:
    """The `strategies.strategy.Fold` of every strategy; `admit` raises UmbelError with the reason for a refusal."""

    def __init__(
        self, parent: Adapter, spool: Path, sites: int, mean: Mean, admit: Callable[[Update, int], Admitted],
        options: Options, measured: Callable[[LowRank], LowRank],
    ) -> None:  # fmt: skip
        self._parent = parent
        self._spool = spool
        self._sites = sites
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
        tokens = update.report.num_loss_tokens
        weight = 1 if self._options.robust != "none" else min(tokens, self._options.weight_cap or tokens)
        entry = _Entry(
            update.site, staleness, weight / math.sqrt(1 + staleness),  # FedBuff (arXiv 2106.06639)
            self._length(admitted), admitted.received, None,
        )  # fmt: skip
        self._entries.append(entry)
        bound = self._least_bound()
        if entry.length <= bound:
            self._mean.add(admitted.factors, admitted.received, entry.prior)
        else:
            entry.waiting = self._spool / f"{len(self._entries)}.safetensors"
            entry.waiting.write_bytes(update.blob)
        for other in self._entries:
            if other.waiting is not None and other.length <= bound:
                self._take(other, other.waiting, other.prior)

    def finish(self) -> Aggregate:
        """Weigh and add the updates that waited, and return the new version in the parent's dtype."""
        if not self._entries:
            return Aggregate({}, {}, self._left_out, {})
        self._entries.sort(key=lambda entry: (entry.site, entry.staleness))  # the order of arrival must not matter
        bound = robust.norm_bound([entry.length for entry in self._entries], self._options.norm_clip)
        scales = [1.0 if entry.waiting is None else _scale(entry.length, bound) for entry in self._entries]
        try:
            amounts, total, rejected = self._weigh(scales)
        except AdapterError as reason:
            unweighed = {entry.site: str(reason) for entry in self._entries}
            return Aggregate({}, {}, self._left_out | unweighed, {})
        for entry, amount, scale in zip(self._entries, amounts, scales, strict=True):
            if entry.waiting is not None and amount:
                self._take(entry, entry.waiting, amount * scale)
        weights: dict[str, float] = {}
        for index, (entry, amount, scale) in enumerate(zip(self._entries, amounts, scales, strict=True)):
            weights[entry.site] = weights.get(entry.site, 0.0) + amount * scale / total
            if index in rejected:
                self._left_out[entry.site] = rejected[index]
        combined, certificate = self._mean.finish(total)
        return Aggregate(tensors_of(combined, self._parent.dtype), weights, self._left_out, certificate)

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
        missing = max(0, self._sites - len(self._entries))
        return robust.norm_bound([entry.length for entry in self._entries], self._options.norm_clip, missing)

    def _length(self, admitted: Admitted) -> float:
        """Return ‖Δ‖_F over all modules, computed one module at a time."""
        start = admitted.received.factors
        changes = (self._change(trained, start[module]) for module, trained in admitted.factors.items())
        return math.sqrt(sum(float(norm(one)) ** 2 for one in changes))

    def _change(self, trained: LowRank, received: LowRank) -> LowRank:
        return change(self._measured(trained), self._measured(received))

    def _weigh(self, scales: list[float]) -> tuple[list[float], float, dict[int, str]]:
        """Return each entry's amount, their divisor, and index → reason of entries that a robust rule rejects."""
        prior = torch.tensor([entry.prior for entry in self._entries], dtype=torch.float64)
        if self._options.robust == "none":
            return prior.tolist(), float(prior.sum()), {}
        short = torch.tensor(scales, dtype=torch.float64)
        matrix = gram([_Changes(entry, self._change) for entry in self._entries]) * short[:, None] * short[None, :]
        rejected: dict[int, str] = {}
        if self._options.robust == "geometric_median":
            weights = robust.geometric_median(matrix, prior)
        elif self._options.robust == "multi_krum":
            weights, rejected = robust.multi_krum(matrix, prior, self._options.byzantine)
        else:
            weights, rejected = robust.fltrust(matrix, prior, self._trusted())
        return weights.tolist(), 1.0, rejected

    def _trusted(self) -> int:
        """Return the index of the trusted site's entry; raise AdapterError without one."""
        for index, entry in enumerate(self._entries):
            if entry.site == self._options.trusted_site:
                return index
        raise AdapterError(f"fltrust: there is no update of the trusted site {self._options.trusted_site!r}")


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
