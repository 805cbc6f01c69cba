"""`Exact`: the mean of the sites' weight updates themselves, not of their factors."""

import math
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from threadpoolctl import threadpool_limits

from strategies.adapter import PUBLISHED, Adapter, Errors, Factors, factors_of, same, tensors_of
from strategies.fold import Mean
from strategies.lowrank import LowRank, align, concat, distances, norm, truncate, wake
from strategies.strategy import LoraStrategy

NEGLIGIBLE = 1e-12
"""A share of the parent below this is rounding error in a sum of weights."""


class Exact(LoraStrategy):
    """G' = G + Σ p_i (ΔW_i − G_i), at the parent's rank, with the error of what is published per module.

    G_i is the adapter that site i received: G, or its truncation to the site's rank. The mean is taken over the sites'
    *changes*, so it keeps the part of G that small sites never saw; a plain mean of truncated updates loses rank round
    by round (raFLoRA, arXiv 2602.13486). The mean is FlexLoRA's (arXiv 2402.11505), without forming a dense matrix.
    Factors are aligned to the parent's, so that they move as little as ΔW does.

    With `server_momentum` β, G' also takes the step β (G − G_before), where G_before is the parent of the previous
    round: heavy-ball momentum in product space. It starts from zero when the ServerApp is restarted, and where the
    parent is one of an earlier round again: the versions after it were taken back, and no step leads away from them.
    """

    name = "exact"
    mixed_ranks = True

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._last_parent: Adapter | None = None
        self._parent_before: Adapter | None = None
        self._parents: set[str] = set()
        """Digests of the parents so far."""

    def mean(self, parent: Adapter) -> Mean:
        return ProductMean(
            parent, parent.rank, before=self._version_before(parent), momentum=self.options.server_momentum,
            device=self.options.device,
        )  # fmt: skip

    def _version_before(self, parent: Adapter) -> Adapter | None:
        """Return the last parent that was another than this one.

        None in the first round, without momentum, and where this one was a parent before the last one.
        """
        if self.options.server_momentum and (self._last_parent is None or self._last_parent.digest != parent.digest):
            taken_back = parent.digest in self._parents
            self._last_parent, self._parent_before = parent, None if taken_back else self._last_parent
            self._parents.add(parent.digest)
        return self._parent_before


class ProductMean:
    """The `Mean` of `exact`, `flora` and `dual`: Σ amount · (ΔW_i − G_i), one low-rank sum per module.

    Factors lie side by side until their ranks add up to a bound, and are then recompressed: memory does not grow with
    the number of sites. The error of recompression is added to the certificate, which is then an upper bound.
    """

    def __init__(
        self, parent: Adapter, rank: int, *, before: Adapter | None = None, momentum: float = 0.0, device: str = "cpu"
    ) -> None:
        self._parent, self._rank, self._device = parent, rank, device
        self._step: dict[str, float] = {}
        self._known = {parent.digest: parent}
        if before is not None and momentum:
            self._step = {parent.digest: momentum, before.digest: -momentum}
            self._known[before.digest] = before
        self._kept = max(4 * parent.rank, rank)
        self._sums: defaultdict[str, list[LowRank]] = defaultdict(list)
        self._received: defaultdict[str, defaultdict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._lost: defaultdict[str, float] = defaultdict(float)

    def add(self, update: Factors, received: Adapter, amount: float) -> None:
        """Add `amount` times the change of one site."""
        self._known[received.digest] = received
        for module, trained in update.items():
            # A module that nobody changed must stay as it is: an SVD of ΔW = 0 would set A to zero as well as B.
            if amount == 0.0 or same(trained, received.factors[module]):
                continue
            self._sums[module].append(replace(trained, scale=amount * trained.scale))
            self._received[module][received.digest] += amount
        full = [name for name, parts in self._sums.items() if sum(part.rank for part in parts) > 2 * self._kept]
        self._for_each(self._recompress, full)

    def finish(self, total: float) -> tuple[Factors, dict[str, Errors]]:
        """Return G' at one rank for all modules, as it is published, and module → its errors."""
        combined: dict[str, LowRank] = {}
        errors: dict[str, Errors] = {}
        terms = {module: self._terms(module, total) for module in self._parent.factors}
        wide = max(sum(term.rank for term in parts) for parts in terms.values())
        rank = max(self._parent.rank, min(self._rank, wide))

        def settle(module: str) -> None:
            parent, parts = self._parent.factors[module], terms.pop(module)
            if not parts:
                combined[module], errors[module] = _padded(parent, rank), Errors(0.0, 0.0)
                return
            here, exact = parent.to(self._device), concat([part.to(self._device, torch.float64) for part in parts])
            published = _rounded(module, self._sum(here, exact, rank))
            error, size, changed = distances(published.to(self._device), exact, here)
            # What recompression lost adds to it at most (triangle inequality).
            errors[module] = Errors.of(error + self._lost[module] / total, size, changed)
            combined[module] = published

        self._for_each(settle, list(terms))
        return combined, errors

    def _terms(self, module: str, total: float) -> list[LowRank]:
        """Return G' of a module as the terms of a sum; none for a module that nobody changed."""
        shares = defaultdict(float, {self._parent.digest: 1.0})
        for digest, amount in self._received[module].items():
            shares[digest] -= amount / total
        for digest, amount in self._step.items():
            shares[digest] += amount
        if not self._sums[module] and not self._step:
            return []
        parts = [replace(part, scale=part.scale / total) for part in self._sums.pop(module, [])]
        for digest, share in shares.items():
            if abs(share) > NEGLIGIBLE:
                before = self._known[digest].factors[module]
                parts.append(replace(before, scale=share * before.scale))
        return parts

    def _sum(self, parent: LowRank, exact: LowRank, rank: int) -> LowRank:
        """Truncate a sum to `rank` and align it to the parent."""
        summed, _ = truncate(exact.to(self._device, torch.float32), rank, method="gram")
        summed = wake(summed, parent)
        return (align(summed, parent) if rank == parent.rank else summed).to("cpu")

    def _recompress(self, module: str) -> None:
        """Replace a module's parts by their best approximation, and remember the Frobenius norm of the loss."""
        whole = concat([part.to(self._device) for part in self._sums[module]])
        kept, error = truncate(whole, min(self._kept, *whole.shape), method="gram")
        self._lost[module] += float(error) * _size_before(kept, float(error))
        self._sums[module] = [kept.to("cpu")]

    def _for_each(self, work: Callable[[str], None], modules: list[str]) -> None:
        """Work on each module; on a CPU side by side, one thread each: a module's matrices are too small to share."""
        threads = torch.get_num_threads()
        if not self._device.startswith("cpu") or threads == 1 or len(modules) < 2:
            for module in modules:
                work(module)
            return
        torch.set_num_threads(1)
        try:
            with threadpool_limits(1), ThreadPoolExecutor(threads) as pool:
                for _ in pool.map(work, modules):
                    pass
        finally:
            torch.set_num_threads(threads)


def _size_before(kept: LowRank, error: float) -> float:
    """Return ‖ΔW‖_F before a truncation to `kept`, by ‖kept‖² = (1 − error²) ‖ΔW‖²."""
    return float(norm(kept)) / math.sqrt(max(1.0 - error**2, NEGLIGIBLE))


def _padded(update: LowRank, rank: int) -> LowRank:
    """Return the same ΔW, to the bit, at the rank of the other modules: an adapter has one rank."""
    more = rank - update.rank
    pad = torch.nn.functional.pad
    return LowRank(pad(update.B, (0, more)), pad(update.A, (0, 0, 0, more)), update.scale)


def _rounded(module: str, update: LowRank) -> LowRank:
    """Return an update as it will be read from the version's file."""
    return factors_of(tensors_of({module: update}, PUBLISHED))[module]
