"""A round's updates, folded one by one: admit → measure → weigh → add up, in memory that does not grow with the sites.

An update is added to the running mean, and can be forgotten, as soon as nothing that the others may send can make it
too long: once about half of the sites have answered. Before, and under a robust rule until all are there, it waits on
disk; only the sites' Gram matrix is in memory.
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
    """One round's running mean of changes. A strategy of one's own is a class with these two methods."""

    def add(self, update: Factors, received: Adapter, amount: float) -> None:
        """Take in `amount` times what a site changed: its factors, against those it received."""

    def finish(self, total: float) -> tuple[Factors, dict[str, float]]:
        """The new factors: the parent, moved by the sum of amounts · changes / `total`; and module → relative error."""


@dataclass
class _Entry:
    site: str
    staleness: int
    prior: float
    """Its weight before a robust rule speaks, not yet a share."""
    length: float
    """‖Δ‖_F over all modules."""
    received: Adapter
    waiting: Path | None


class RoundFold:
    """`strategies.base.Fold` for every strategy; `admit` raises UmbelError with the reason for a refusal."""

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
        """The sites whose updates take part so far."""
        return tuple(dict.fromkeys(entry.site for entry in self._entries))

    def add(self, update: Update, staleness: int = 0) -> None:
        """Admit an update, or remember why not. `staleness`: how many rounds ago it was asked for."""
        try:
            self._require_new(update.site, staleness)
            admitted = self._admit(update, staleness)
        except UmbelError as refusal:
            self._left_out[update.site] = str(refusal)
            return
        tokens = update.report.num_loss_tokens
        weight = 1 if self._options.robust != "none" else min(tokens, self._options.weight_cap or tokens)
        entry = _Entry(
            update.site, staleness, weight / math.sqrt(1 + staleness),  # FedBuff's (arXiv 2106.06639)
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
        """Decide on those that waited, and emit the new version in the parent's dtype."""
        if not self._entries:
            return Aggregate({}, {}, self._left_out, {})
        self._entries.sort(key=lambda entry: (entry.site, entry.staleness))  # not by who was first
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
        for entry in self._entries:
            if entry.site == site and (entry.staleness == staleness or self._options.robust != "none"):
                raise AdapterError("it has an update in this round already; a site counts once")

    def _take(self, entry: _Entry, waiting: Path, amount: float) -> None:
        """Add an update that waited to the mean, and forget it."""
        self._mean.add(factors_of(peft_dir.decode(waiting.read_bytes())), entry.received, amount)
        waiting.unlink()
        entry.waiting = None

    def _least_bound(self) -> float:
        """How long a change may be for certain: what the bound is at least when all sites have answered."""
        if self._options.robust != "none":
            return -math.inf
        missing = max(0, self._sites - len(self._entries))
        return robust.norm_bound([entry.length for entry in self._entries], self._options.norm_clip, missing)

    def _length(self, admitted: Admitted) -> float:
        """‖Δ‖_F over all modules, one at a time."""
        pairs = ((now, admitted.received.factors[module]) for module, now in admitted.factors.items())
        return math.sqrt(sum(float(norm(self._change(now, before))) ** 2 for now, before in pairs))

    def _change(self, now: LowRank, received: LowRank) -> LowRank:
        return change(self._measured(now), self._measured(received))

    def _weigh(self, scales: list[float]) -> tuple[list[float], float, dict[int, str]]:
        """Each entry's amount, what they are divided by, and those that a robust rule rejects, with its reason."""
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
        for index, entry in enumerate(self._entries):
            if entry.site == self._options.trusted_site:
                return index
        raise AdapterError(f"fltrust: there is no update of the trusted site {self._options.trusted_site!r}")


class _Changes(Mapping[str, LowRank]):
    """What a waiting update changed, read from disk one module at a time."""

    def __init__(self, entry: _Entry, change: Callable[[LowRank, LowRank], LowRank]) -> None:
        assert entry.waiting is not None
        self._path, self._received, self._change = entry.waiting, entry.received.factors, change

    def __getitem__(self, module: str) -> LowRank:
        # Opened each time: a file that stays mapped counts as this process's memory.
        with safe_open(self._path, framework="pt") as file:
            b, a = (file.get_tensor(peft_dir.key(module, factor)) for factor in "BA")
        return self._change(LowRank(b, a), self._received[module])

    def __iter__(self) -> Iterator[str]:
        return iter(self._received)

    def __len__(self) -> int:
        return len(self._received)


def _scale(length: float, bound: float) -> float:
    return min(1.0, bound / length) if length > 0 else 1.0
