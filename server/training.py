"""`Training`: trains a round at the sites, each at the rank it can hold, and folds updates in as they arrive."""

import shutil
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from server import dialogues
from server.config import RunConfig
from server.dialogues import Dialogue, Sites, Skipped
from server.orders import Orders
from server.registry import run_lock
from server.registry.registry import AdapterRegistry
from strategies.adapter import Adapter, Aggregate
from strategies.rule import MAX_EARLIER_PARENTS, Fold, Rule
from umbel.adapter import AdapterManifest
from umbel.base.origin import kin_of
from umbel.messages import Hello, RoundOrder, RoundReport

OnReport = Callable[[str, RoundReport, int], None]
"""Called for each site that trained or skipped the round, with site, report and staleness."""


@dataclass(frozen=True)
class _Given:
    """A round that a site was given to train, and the version it trains from (perhaps at a smaller rank)."""

    order: RoundOrder
    version: AdapterManifest


@dataclass
class RoundResult:
    """The result of a round's training."""

    aggregate: Aggregate
    admitted: int = 0
    """Sites whose updates passed every check; a robust rule may still have left some of them out."""
    parents: tuple[str, ...] = ()
    """Digests of the versions that the sites in the aggregate trained from; this round's parent is the first."""
    left_out: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Site → why nothing was worth training there."""
    reports: dict[str, RoundReport] = field(default_factory=dict)
    """Site → report, for each site whose update came."""
    staleness: dict[str, int] = field(default_factory=dict)
    """Site → number of versions promoted since the one it trained from, for each site whose update came."""
    kinds: dict[str, str] = field(default_factory=dict)
    """Site → kind of base that it trained on, "nf4" or the dtype, for each site whose update came."""
    folding_s: float = 0.0
    """Seconds spent on folding updates in."""

    @property
    def sites(self) -> list[str]:
        """Sites with a share in the aggregate, in order of their names."""
        return sorted(site for site, weight in self.aggregate.weights.items() if weight)

    @property
    def took_part(self) -> int:
        """Count the sites that carried the order out: their updates were admitted, or nothing was worth training."""
        return self.admitted + len(self.skipped)

    @property
    def metrics(self) -> dict[str, float]:
        """Loss per token (nats) and tokens of the sites in the aggregate, for its manifest."""
        reports = [self.reports[site] for site in self.sites]
        tokens = sum(report.num_loss_tokens for report in reports)
        loss = sum(report.loss_sum for report in reports)
        return {"train-loss": loss / tokens, "num-loss-tokens": tokens} if tokens else {}

    @property
    def site_metrics(self) -> dict[str, dict[str, float]]:
        """Site in the aggregate → `train-loss`, `seconds`, `staleness` and `rank`, for its manifest."""
        return {site: _measured(self.reports[site], self.staleness[site]) for site in self.sites}

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Site in the aggregate → what it trained on and holds, for its manifest."""
        return {site: _counted(self.reports[site]) for site in self.sites}

    @property
    def bases(self) -> dict[str, float]:
        """Kind of base → sum of the weights of the sites that trained on it."""
        shares: defaultdict[str, float] = defaultdict(float)
        for site in self.sites:
            shares[self.kinds[site]] += self.aggregate.weights[site]
        return dict(sorted(shares.items()))


class Training:
    """Trains rounds at the sites of an exchange, over a registry's versions.

    In a `buffered` run a late update is taken into the next round and weighs less, as in FedBuff (arXiv 2106.06639);
    its site gets no new round before. Otherwise it is dropped. A restarted process does not know of late updates.
    """

    def __init__(
        self,
        config: RunConfig,
        registry: AdapterRegistry,
        exchange: Sites,
        orders: Orders,
        strategy: Rule,
        on_report: OnReport,
    ) -> None:
        self._config = config
        self._registry = registry
        self._exchange = exchange
        self._orders = orders
        self._strategy = strategy
        self._on_report = on_report
        self._late: dict[str, _Given] = {}
        self._given: dict[str, _Given] = {}
        """Site → the round it works on, in this round."""
        self._asked: set[str] = set()
        """Sites that this round asks."""
        self._heads: list[str] = []
        """Digests of the versions that rounds trained from, in order."""
        self._kin = ""
        """Kin of the bases that take part in this round; empty but in runs with `mixed-bases`."""

    def run(self, number: int, head: AdapterManifest, kin: str = "") -> RoundResult:
        """Train one round from `head`, until every site has answered, or a quorum has and the others had their time.

        With `kin` sites take part whose base is kin to the one of `head`, too.
        Updates are folded in one by one; peak memory does not depend on the number of sites.
        """
        if head.digest in self._heads:  # what came after it was taken back, and what was trained from that goes with it
            del self._heads[self._heads.index(head.digest) + 1 :]
        else:
            self._heads.append(head.digest)
        self._late = {
            site: given
            for site, given in self._late.items()
            if given.version.digest in self._heads and self._staleness(given) <= MAX_EARLIER_PARENTS
        }
        self._kin = kin
        parent = Adapter.of(self._registry.read(head.ref)[0], head.base)
        spool = self._empty_spool()
        fold = self._strategy.begin(parent, spool, len(self._exchange.roster.sites))
        result = RoundResult(Aggregate({}, {}, {}, {}))
        self._collect(number, head, parent, fold, result)
        began = self._exchange.clock()
        result.admitted, result.aggregate = len(fold.admitted), fold.finish()
        result.folding_s += self._exchange.clock() - began
        shutil.rmtree(spool)
        result.left_out |= result.aggregate.left_out
        trained_from = [self._given[site].version.digest for site in result.sites]
        result.parents = tuple(dict.fromkeys([head.digest, *trained_from]))
        return result

    def _collect(
        self, number: int, head: AdapterManifest, parent: Adapter, fold: Fold, result: RoundResult
    ) -> None:  # fmt: skip
        """Talk to the sites, and fold in their updates.

        From the first admitted update on no further site takes part: how long a change may be depends on how many there
        are, and an update that is in the fold already would have been measured by another number.
        """
        config, clock = self._config, self._exchange.clock
        self._given, self._asked = {}, set()
        started = clock()
        in_time = started + config.round_seconds + config.straggler_seconds
        outcome = self._exchange.converse(
            lambda site, hello: self._train(site, hello, number, head, parent, fold, result),
            started + config.round_seconds + config.grace_seconds,
            group=f"round {number}",
            enough=lambda _: clock() >= in_time and len(fold.admitted) + len(result.skipped) >= config.quorum,
            open=lambda: not fold.admitted,
        )
        fate = "counts in the next round" if config.buffered else "is dropped"
        late = {site: given for site, given in self._given.items() if site in outcome.late}
        away = {site: given for site, given in self._late.items() if site not in self._given}
        closed = self._exchange.roster.sites.keys() - self._asked
        result.left_out |= dict.fromkeys(closed, "it came when the round had an update already; the next one asks it")
        result.left_out |= outcome.left_out
        result.left_out |= {site: f"{outcome.left_out[site]}; its late update {fate}" for site in late}
        result.left_out |= dict.fromkeys(away, f"its SuperNode is offline; its late update {fate}")
        self._late = away | late if config.buffered else {}

    def _train(
        self, site: str, hello: Hello, number: int, head: AdapterManifest, parent: Adapter, fold: Fold,
        result: RoundResult,
    ) -> Dialogue[RoundReport, None]:  # fmt: skip
        """Train at one site, unless nothing is worth it there; its update is kept nowhere but in the fold."""
        name = self._config.adapter
        self._asked.add(site)
        fold.sites = max(fold.sites, len(self._asked))
        given, reply = self._late.get(site), None
        if given is None:
            given = _Given(self._order(hello, number, head, parent), head)
            weights = parent.at_rank(given.order.plan.rank).blob
            reply = yield from dialogues.submit(self._orders.signed(given.order), weights)
        self._given[site] = given
        kin = kin_of(hello.fingerprint, hello.kin)
        base = head.base if self._kin and kin == self._kin else hello.fingerprint.digest
        update = yield from dialogues.collect(site, base, name, given.order, reply)
        self._orders.require(site, given.order, update.report)
        began, staleness = self._exchange.clock(), self._staleness(given)
        if isinstance(update, Skipped):
            result.skipped[site] = update.report.error or "no reason given"
            self._on_report(site, update.report, staleness)
            return
        fold.add(update, staleness)
        result.folding_s += self._exchange.clock() - began
        result.reports[site], result.staleness[site] = update.report, staleness
        result.kinds[site] = hello.packing or hello.dtype
        self._on_report(site, update.report, staleness)

    def _order(self, hello: Hello, number: int, head: AdapterManifest, parent: Adapter) -> RoundOrder:
        plan = self._strategy.plan(self._config.plan, number, hello.max_lora_rank)
        order = RoundOrder(
            key=f"{self._registry.lineage}-{number}-{head.digest[:16]}",
            base=head.base, kin=self._kin, parent=parent.at_rank(plan.rank).digest, round=number, plan=plan,
        )  # fmt: skip
        return self._orders.complete(order)

    def _staleness(self, given: _Given) -> int:
        """Count the versions that were promoted since the one it trains from."""
        return len(self._heads) - 1 - self._heads.index(given.version.digest)

    def _empty_spool(self) -> Path:
        """Return an empty folder where a fold may put updates that have to wait."""
        spool = run_lock.folder(self._registry.root, self._config.adapter) / "spool"
        shutil.rmtree(spool, ignore_errors=True)
        spool.mkdir(parents=True)
        return spool


def _measured(report: RoundReport, staleness: int) -> dict[str, float]:
    return {
        "train-loss": report.loss_sum / report.num_loss_tokens,
        "seconds": report.seconds,
        "staleness": staleness,
        "rank": report.rank or 0,
    }


def _counted(report: RoundReport) -> dict[str, int]:
    return {
        "num-examples": report.num_examples,
        "num-loss-tokens": report.num_loss_tokens,
        "steps": report.steps,
        "held-examples": report.held_examples,
        "held-loss-tokens": report.held_loss_tokens,
    }
