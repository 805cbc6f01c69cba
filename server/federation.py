"""The steps of a federation's rounds; server/app.py puts them in order. Each is recorded before the next begins."""

import hashlib
import importlib.metadata
import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import asdict
from functools import partial

from server.config import RunConfig
from server.exchange import Exchange
from server.orders import Orders
from server.reconcile import ASK_S, reconcile
from server.registry.events import Events
from server.registry.pin import Pin
from server.registry.registry import HEAD, LIVE, AdapterRegistry
from server.registry.round_log import RoundState
from server.rollout import Judgement, Rollout
from server.training import RoundResult, Training
from strategies import catalogue
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.errors import ConfigError, Conflict, NotFound, UmbelError
from umbel.faults import Point, reach
from umbel.messages import Hello, RoundReport


class Federation:
    """One run over the sites of one adapter. Raises ConfigError for a run that the registry cannot go on with."""

    def __init__(
        self, config: RunConfig, registry: AdapterRegistry, exchange: Exchange, events: Events, run_id: str
    ) -> None:
        self._config = config
        self._name = config.adapter
        self._registry = registry
        self._exchange = exchange
        self._events = events
        self._run_id = run_id
        self._rollout = Rollout(
            exchange, quorum=config.quorum, straggler_s=config.straggler_seconds, grace_s=config.grace_seconds,
            sign=registry.sign, waves=config.rollout,
        )  # fmt: skip
        self._strategy = catalogue.find(config.strategy)(**config.options)
        self._orders = Orders(config, registry)
        self._training = Training(config, registry, exchange, self._orders, self._strategy, self._tell)
        self._round = 0
        self._aside: dict[str, str] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._require(registry.pin(self._name))

    def rounds(self) -> Iterator[int]:
        """The rounds to run: versions an earlier run left without a verdict, then what is left of this run's own.

        Before each, and at the end, the sites are brought to what the registry says is live; without rounds, only that.
        """
        if not self._config.rounds:
            self._emit("run.started", rounds=0)
            self.reconcile()
            self._emit("run.finished", head=str(self._registry.aliases(self._name).get(HEAD, "none")))
            return
        first = self._registry.rounds.begin_run(self._run_id, self._name, self._config.plan.model_dump_json())
        own = range(first, first + self._config.rounds)
        self._emit("run.started", first_round=first, rounds=len(own), strategy=self._config.strategy)
        earlier = [record.round for record in self._registry.rounds.all(self._name) if record.round < first]
        for number in [*earlier, *own]:
            record = self._registry.rounds.find(self._name, number)
            if record is None or not record.state.final:
                self.reconcile()
                self._seconds.clear()
                yield number
        self.reconcile()
        self._emit("run.finished", head=str(self._registry.aliases(self._name).get(HEAD, "none")))

    def reconcile(self) -> None:
        """Bring the sites that are online to what the registry says is live, as far as each one's own word goes."""
        grace_s = self._config.grace_seconds
        ask_s = min(ASK_S, grace_s) if self._config.rounds else grace_s
        found = reconcile(self._exchange, self._registry, self._name, ask_s=ask_s, grace_s=grace_s)
        aside = {**found.kept, **found.missed} if found else {}
        if found and (found.brought or aside != self._aside or not self._config.rounds):
            self._emit("fleet.reconciled", **asdict(found))
        self._aside = aside

    def version_of(self, number: int) -> AdapterManifest | None:
        """The version a round has published already, before an interruption."""
        record = self._registry.rounds.find(self._name, number)
        if record is None or record.version is None:
            return None
        return self._registry.manifest(AdapterRef(self._name, record.version))

    def train(self, number: int) -> AdapterManifest | None:
        """Train at the sites, aggregate and publish. None when no quorum came about; the round is then failed."""
        self._record(number, RoundState.TRAINING)
        reach(Point.ROUND_RECORDED)
        if not self._gather():
            there = self._exchange.roster.sites
            found = f"{len(there)} of {self._config.quorum} sites needed were there"
            self._fail(number, {**self._exchange.roster.troubles, **_disagreements(there), "*": found})
            return None
        aliases = self._registry.aliases(self._name)
        held = {alias: aliases[alias].version for alias in (HEAD, LIVE) if alias in aliases}
        self._registry.rounds.expect(self._name, number, held)  # before head is read: a move after this is noticed
        head = self._registry.manifest(self._registry.resolve(f"{self._name}@{HEAD}"))
        self._emit("round.started", round=number, parent=head.digest, sites=sorted(self._exchange.roster.sites))
        started, self._round = self._exchange.clock(), number
        result = self._training.run(number, head)
        wall = self._exchange.clock() - started
        self._time_training(result, wall)
        result.left_out = {**self._exchange.roster.troubles, **result.left_out}
        self._emit("round.trained", round=number, seconds=round(wall, 3), left_out=result.left_out)
        if result.admitted < self._config.quorum or not result.aggregate.tensors:
            admitted = f"{result.admitted} of {self._config.quorum} updates needed were admitted"
            self._fail(number, {**result.left_out, "*": admitted})
            return None
        return self._publish(number, head, result)

    def judge(self, number: int, version: AdapterManifest) -> Judgement:
        """Shadow a version at the sites. A verdict that was recorded before an interruption stands.

        What an operator overruled by moving `head` or `live` since the round began is not asked about any more.
        """
        blob, _ = self._registry.read(version.ref)
        record = self._registry.rounds.find(self._name, number)
        overruled = self._registry.overruled(self._name, number)
        if overruled and record is not None and record.state is RoundState.PUBLISHED:
            judgement = Judgement(False, {}, {"*": overruled})
        elif not self._gather():
            troubles = {**self._exchange.roster.troubles, "*": "too few sites were there to judge it"}
            judgement = Judgement(False, {}, troubles)
        else:
            started = self._exchange.clock()
            judgement = self._rollout.shadow(version, blob)
            self._time_shadow(judgement, self._exchange.clock() - started)
        if record is not None and record.state in (RoundState.PROMOTING, RoundState.DISCARDING):
            judgement = Judgement(record.state is RoundState.PROMOTING, judgement.reports, judgement.reasons)
        state = RoundState.PROMOTING if judgement.accepted else RoundState.DISCARDING
        self._record(number, state, judgement.reasons)
        reach(Point.VERDICT_RECORDED)
        for site, report in judgement.reports.items():
            self._emit("site.judged", round=number, site=site, **json.loads(report.model_dump_json()))
        self._emit("round.judged", round=number, accepted=judgement.accepted, reasons=judgement.reasons)
        return judgement

    def promote(self, number: int, version: AdapterManifest, judgement: Judgement) -> None:
        """Make it live at the sites, wave by wave, then `head` and `live` of the registry.

        Where it is stopped on the way, or an operator moved those aliases meanwhile, it is taken back and rejected.
        """
        started = self._exchange.clock()
        promotion = self._rollout.promote(
            version.ref, judgement, overruled=partial(self._registry.overruled, self._name, number),
            tell=partial(self._emit, round=number, version=version.version),
        )  # fmt: skip
        self._seconds["promote"] += self._exchange.clock() - started
        missed = {site: f"accepted, but not promoted: {reason}" for site, reason in promotion.left_out.items()}
        reach(Point.SITES_PROMOTED)
        if not promotion.stopped:
            try:
                self._registry.accept(self._name, number, self._run_id, missed | promotion.went_back)
            except Conflict as overruled:
                promotion.stopped = str(overruled)
            reach(Point.ROUND_ACCEPTED)
        if promotion.stopped:
            reasons = {**judgement.reasons, **missed, **promotion.went_back, "*": f"taken back: {promotion.stopped}"}
            self._record(number, RoundState.DISCARDING, reasons)
            self.discard(number, version, Judgement(False, judgement.reports, reasons), judgement.in_favour)
        else:
            self._done("round.promoted", number, version=version.version, sites=sorted(promotion.sites))

    def discard(
        self, number: int, version: AdapterManifest, judgement: Judgement, answering: Collection[str] = ()
    ) -> None:
        """Unload it at the sites, and take it back where it may be `answering` users; neither alias moves."""
        started = self._exchange.clock()
        answering = {*answering, *judgement.answering}
        self._rollout.discard(version.ref, set(judgement.reasons), answering=answering)
        self._seconds["promote"] += self._exchange.clock() - started
        reach(Point.SITES_DISCARDED)
        self._record(number, RoundState.REJECTED)
        reach(Point.ROUND_REJECTED)
        self._done("round.rejected", number, version=version.version, reasons=judgement.reasons)

    def _publish(self, number: int, parent: AdapterManifest, result: RoundResult) -> AdapterManifest:
        aggregate = result.aggregate
        reports = {site: result.reports[site] for site in result.sites}
        tokens = sum(report.num_loss_tokens for report in reports.values())
        loss = sum(report.loss_sum for report in reports.values())
        version = self._registry.publish(
            self._name, peft_dir.encode(aggregate.tensors), round=number, run_id=self._run_id, parent=parent.digest,
            parents=result.parents, personal=self._strategy.personal, strategy=self._config.strategy,
            options=self._strategy.options.model_dump(),
            weights=aggregate.weights, left_out=result.left_out, certificate=aggregate.certificate,
            metrics={"train-loss": loss / tokens, "num-loss-tokens": tokens} if tokens else {},
            site_metrics={site: _measured(report, result.staleness[site]) for site, report in reports.items()},
            counts={site: _counted(report) for site, report in reports.items()},
            code=_code(), config=hashlib.sha256(self._config.model_dump_json().encode()).hexdigest(),
        )  # fmt: skip
        reach(Point.VERSION_PUBLISHED)
        self._emit(
            "round.published", round=number, version=version.version, digest=version.digest,
            weights=aggregate.weights, left_out=result.left_out,
            relative_error=max(aggregate.certificate.values(), default=None),
        )  # fmt: skip
        return version

    def _tell(self, site: str, report: RoundReport, staleness: int) -> None:
        fields = json.loads(report.model_dump_json())  # in which a loss that is no number is a string
        self._emit("site.trained", round=self._round, site=site, staleness=staleness, **fields)

    def _gather(self) -> bool:
        """Wait for a quorum of sites; the first one decides what the registry holds fast."""
        deadline = self._exchange.clock() + self._config.grace_seconds
        pin = self._registry.pin(self._name)
        enough = self._exchange.gather(lambda sites: self._agreed(pin, sites) is not None, deadline)
        if not self._exchange.roster.sites and not self._registry.versions(self._name):
            raise NotFound(
                f"no site that serves {self._name!r} was found within {self._config.grace_seconds:g} s; are the "
                "SuperNodes connected to this SuperLink, and is `umbel serve` running beside each? "
                + "; ".join(f"{who}: {why}" for who, why in self._exchange.roster.troubles.items())
            )
        agreed = self._agreed(pin, self._exchange.roster.sites) if enough else None
        if agreed is not None and (
            pin is None or HEAD not in self._registry.aliases(self._name)
        ):  # or cut off in there
            self._registry.begin(self._name, agreed, self._config.seed)
            self._require(agreed)
        return enough

    def _agreed(self, pin: Pin | None, sites: dict[str, Hello]) -> Pin | None:
        """The pin that a quorum of sites matches; before there is one, whatever a quorum has in common."""
        pins = [pin or Pin.of(hello, self._config.rank) for hello in sites.values()]
        return next((one for one in pins if pins.count(one) >= self._config.quorum), None)

    def _require(self, pin: Pin | None) -> None:
        """Hold the sites to the pin, or, before there is one, to being able to take part at all."""
        training = self._config.rounds > 0
        if training and pin is not None and pin.rank != self._config.rank:
            raise ConfigError(
                f"rank = {self._config.rank}, but {self._name} in {self._registry.root} has rank {pin.rank}; "
                f"run with rank={pin.rank}, or with another registry"
            )

        personal = self._strategy.personal

        def admit(hello: Hello) -> None:
            self._orders.require_key(hello.site)
            held = pin or Pin.of(hello, self._config.rank)
            held.require(hello, self._name)
            if training:
                held.require_rank(hello, mixed=self._strategy.mixed_ranks, own=personal.rank if personal else 0)

        self._exchange.roster.require(admit)

    def _time_training(self, result: RoundResult, wall: float) -> None:
        fresh = [report.seconds for site, report in result.reports.items() if not result.staleness[site]]
        longest = max(fresh, default=0.0)
        self._seconds["train"] += longest
        self._seconds["aggregate"] += result.folding_s
        self._seconds["transfer"] += max(0.0, wall - longest - result.folding_s)

    def _time_shadow(self, judgement: Judgement, wall: float) -> None:
        load = max((report.load_s for report in judgement.reports.values()), default=0.0)
        probe = max((report.probe_s for report in judgement.reports.values()), default=0.0)
        self._seconds["load"] += load
        self._seconds["probe"] += probe
        self._seconds["transfer"] += max(0.0, wall - load - probe)

    def _fail(self, number: int, reasons: dict[str, str]) -> None:
        self._record(number, RoundState.FAILED, reasons)
        self._done("round.failed", number, reasons=reasons)

    def _record(self, number: int, state: RoundState, reasons: dict[str, str] | None = None) -> None:
        self._registry.rounds.record(self._name, number, self._run_id, state, reasons=reasons)

    def _done(self, event: str, number: int, **fields: object) -> None:
        self._emit(event, round=number, **fields, seconds={part: round(s, 3) for part, s in self._seconds.items()})

    def _emit(self, event: str, **fields: object) -> None:
        self._events.emit(event, run_id=self._run_id, adapter=self._name, **fields)


def _code() -> str:
    """The installed release; nothing where only Flower's bundle is there."""
    try:
        return importlib.metadata.version("umbel")
    except importlib.metadata.PackageNotFoundError:
        return ""


def _measured(report: RoundReport, staleness: int) -> dict[str, float]:
    return {
        "train-loss": report.loss_sum / report.num_loss_tokens,
        "seconds": report.seconds,
        "staleness": staleness,
        "rank": report.rank or 0,
    }


def _counted(report: RoundReport) -> dict[str, int]:
    return {"num-examples": report.num_examples, "num-loss-tokens": report.num_loss_tokens}


def _disagreements(sites: dict[str, Hello]) -> dict[str, str]:
    """How sites differ from the first of them."""
    reasons: dict[str, str] = {}
    first = min(sites, default="")
    for site, hello in sites.items():
        try:
            sites[first].fingerprint.require_same(hello.fingerprint, here=f"site {first}", there=f"site {site}")
        except UmbelError as difference:
            reasons[site] = str(difference)
    return reasons
