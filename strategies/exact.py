"""Exact: the mean of the sites' weight updates themselves, not of their factors."""

import math
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from threadpoolctl import threadpool_limits

from strategies.adapter import Adapter, Factors, same
from strategies.base import LoraStrategy, Mean
from strategies.lowrank import LowRank, align, concat, norm, truncate, wake

NEGLIGIBLE = 1e-12
"""A share of the parent below this is the rounding of a sum of weights to 1."""


class Exact(LoraStrategy):
    """G' = G + Σ p_i (ΔW_i − G_i), at the parent's rank, with the error of that truncation per module.

    G_i is what site i received: G, or its truncation to the site's rank. Taking the mean over what each site *changed*
    keeps what small sites never saw, where a plain mean of truncated updates loses rank round by round (raFLoRA, arXiv
    2602.13486). The mean is that of FlexLoRA (arXiv 2402.11505), without forming a dense matrix. Factors are aligned to
    the parent's, so that they move as little as ΔW does.

    With `server_momentum` β, G' also takes the step β (G − G_before), G_before being the parent of the round before:
    heavy-ball momentum in product space. It begins anew when the ServerApp is started again.
    """

    name = "exact"
    mixed_ranks = True

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self._now: Adapter | None = None
        self._before: Adapter | None = None

    def mean(self, parent: Adapter) -> Mean:
        return ProductMean(
            parent, parent.rank, before=self._version_before(parent), momentum=self.options.server_momentum,
            device=self.options.device,
        )  # fmt: skip

    def _version_before(self, parent: Adapter) -> Adapter | None:
        """The parent of an earlier round, where this one's is another; None in the first, or without momentum."""
        if self.options.server_momentum and (self._now is None or self._now.digest != parent.digest):
            self._now, self._before = parent, self._now
        return self._before


class ProductMean:
    """A running Σ amount · (ΔW_i − G_i), one low-rank sum per module.

    Factors lie side by side until their ranks add up to a bound, and are then recompressed: memory does not grow with
    the number of sites, and what recompression loses goes into the certificate, which is then an upper bound.
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
        self._known[received.digest] = received
        for module, now in update.items():
            # A module that nobody changed must come out as it is: an SVD of ΔW = 0 would zero A as well as B.
            if amount == 0.0 or same(now, received.factors[module]):
                continue
            self._sums[module].append(replace(now, scale=amount * now.scale))
            self._received[module][received.digest] += amount
        full = [name for name, parts in self._sums.items() if sum(part.rank for part in parts) > 2 * self._kept]
        self._for_each(self._recompress, full)

    def finish(self, total: float) -> tuple[Factors, dict[str, float]]:
        combined: dict[str, LowRank] = {}
        certificate: dict[str, float] = {}
        terms = {module: self._terms(module, total) for module in self._parent.factors}
        wide = max(sum(term.rank for term in parts) for parts in terms.values())
        rank = max(self._parent.rank, min(self._rank, wide))

        def settle(module: str) -> None:
            now, error = self._sum(self._parent.factors[module], terms.pop(module), rank)
            if module in self._lost:
                # Errors add up at most (triangle inequality).
                error += self._lost[module] / total / _size_before(now, error)
            combined[module], certificate[module] = now, error

        self._for_each(settle, list(terms))
        return combined, certificate

    def _terms(self, module: str, total: float) -> list[LowRank]:
        """G' of a module as a sum; empty for one that stays what it is."""
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

    def _sum(self, parent: LowRank, terms: list[LowRank], rank: int) -> tuple[LowRank, float]:
        if not terms:
            return _padded(parent, rank), 0.0
        here = parent.to(self._device)
        summed, error = truncate(concat([term.to(self._device) for term in terms]), rank, method="gram")
        summed = wake(summed, here)
        return (align(summed, here) if rank == parent.rank else summed).to("cpu"), float(error)

    def _recompress(self, module: str) -> None:
        whole = concat([part.to(self._device) for part in self._sums[module]])
        kept, error = truncate(whole, min(self._kept, *whole.shape), method="gram")
        self._lost[module] += float(error) * _size_before(kept, float(error))
        self._sums[module] = [kept.to("cpu")]

    def _for_each(self, work: Callable[[str], None], modules: list[str]) -> None:
        """On a CPU, modules side by side, each on one thread: one module's matrices are too small to share."""
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
    """‖ΔW‖_F of what was truncated to `kept`: ‖kept‖² = (1 − error²) ‖ΔW‖²."""
    return float(norm(kept)) / math.sqrt(max(1.0 - error**2, NEGLIGIBLE))


def _padded(update: LowRank, rank: int) -> LowRank:
    """The same ΔW at a larger rank, if that is what the other modules need: an adapter has one rank."""
    return update if update.rank == rank else truncate(update, rank)[0]
