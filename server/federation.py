"""The steps of a federation's rounds; server/app.py puts them in order. Each is recorded before the next begins."""

from collections import defaultdict
from collections.abc import Iterator

from server import dialogues
from server.config import RunConfig
from server.events import Events
from server.exchange import Exchange, Outcome
from server.pin import Pin
from server.registry import HEAD, AdapterRegistry
from server.rollout import Judgement, Rollout
from server.rounds import RoundState
from strategies import catalogue
from strategies.base import Adapter, Aggregate, Update
from umbel import peft_dir
from umbel.adapter import AdapterManifest
from umbel.errors import ConfigError, NotFound, UmbelError
from umbel.messages import Hello, RoundOrder


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
        self._rollout = Rollout(exchange, quorum=config.quorum, grace_s=config.grace_seconds)
        self._strategy = catalogue.find(config.strategy)(max_examples=config.steps * config.batch_size)
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._require(registry.pin(self._name))

    def rounds(self) -> Iterator[int]:
        """The rounds to run: versions an earlier run left without a verdict, then what is left of this run's own."""
        first = self._registry.rounds.begin_run(self._run_id, self._name, self._config.plan.model_dump_json())
        own = range(first, first + self._config.rounds)
        self._emit("run.started", first_round=first, rounds=len(own), strategy=self._config.strategy)
        earlier = [record.round for record in self._registry.rounds.all(self._name) if record.round < first]
        for number in [*earlier, *own]:
            record = self._registry.rounds.find(self._name, number)
            if record is None or not record.state.final:
                self._seconds.clear()
                yield number
        self._emit("run.finished", head=str(self._registry.aliases(self._name).get(HEAD, "none")))

    def version_of(self, number: int) -> AdapterManifest | None:
        """The version a round has published already, before an interruption."""
        record = self._registry.rounds.find(self._name, number)
        if record is None or record.version is None:
            return None
        return self._registry.versions(self._name)[record.version]

    def train(self, number: int) -> AdapterManifest | None:
        """Train at the sites, aggregate and publish. None when no quorum came about; the round is then failed."""
        self._record(number, RoundState.TRAINING)
        if not self._gather():
            there = self._exchange.roster.sites
            found = f"{len(there)} of {self._config.quorum} sites needed were there"
            self._fail(number, {**self._exchange.roster.troubles, **_disagreements(there), "*": found})
            return None
        blob, head = self._registry.read(self._registry.resolve(f"{self._name}@{HEAD}"))
        parent = Adapter.of(blob, head.base)
        outcome = self._collect(number, parent)
        started = self._exchange.clock()
        aggregate = self._strategy.aggregate(parent, list(outcome.answers.values()))
        self._seconds["aggregate"] += self._exchange.clock() - started
        left_out = {**self._exchange.roster.troubles, **outcome.left_out, **aggregate.left_out}
        if len(aggregate.weights) < self._config.quorum:
            admitted = f"{len(aggregate.weights)} of {self._config.quorum} updates needed were admitted"
            self._fail(number, {**left_out, "*": admitted})
            return None
        return self._publish(number, head, aggregate, left_out, outcome.answers)

    def judge(self, number: int, version: AdapterManifest) -> Judgement:
        """Shadow a version at the sites. A verdict that was recorded before an interruption stands."""
        blob, _ = self._registry.read(version.ref)
        if not self._gather():
            troubles = {**self._exchange.roster.troubles, "*": "too few sites were there to judge it"}
            judgement = Judgement(False, {}, troubles)
        else:
            started = self._exchange.clock()
            judgement = self._rollout.shadow(version, blob)
            self._time_shadow(judgement, self._exchange.clock() - started)
        record = self._registry.rounds.find(self._name, number)
        if record is not None and record.state in (RoundState.PROMOTING, RoundState.DISCARDING):
            judgement = Judgement(record.state is RoundState.PROMOTING, judgement.reports, judgement.reasons)
        state = RoundState.PROMOTING if judgement.accepted else RoundState.DISCARDING
        self._record(number, state, judgement.reasons)
        for site, report in judgement.reports.items():
            self._emit("site.judged", round=number, site=site, **report.model_dump(mode="json"))
        self._emit("round.judged", round=number, accepted=judgement.accepted, reasons=judgement.reasons)
        return judgement

    def promote(self, number: int, version: AdapterManifest, judgement: Judgement) -> None:
        """Make it live at the sites, then `head` and `live` of the registry."""
        started = self._exchange.clock()
        outcome = self._rollout.promote(version.ref, judgement)
        self._seconds["promote"] += self._exchange.clock() - started
        missed = {site: f"accepted, but not promoted: {reason}" for site, reason in outcome.left_out.items()}
        self._registry.accept(self._name, number, self._run_id, missed)
        self._done("round.promoted", number, version=version.version, sites=sorted(outcome.answers))

    def discard(self, number: int, version: AdapterManifest, judgement: Judgement) -> None:
        """Unload it at the sites; neither alias moves."""
        started = self._exchange.clock()
        self._rollout.discard(version.ref, set(judgement.reasons))
        self._seconds["promote"] += self._exchange.clock() - started
        self._record(number, RoundState.REJECTED)
        self._done("round.rejected", number, version=version.version, reasons=judgement.reasons)

    def _collect(self, number: int, parent: Adapter) -> Outcome[Update]:
        """Have the sites train; their updates, and who gave none."""
        order = RoundOrder(
            key=f"{self._registry.lineage}-{number}-{parent.digest[:16]}",
            base=parent.base, parent=parent.digest, round=number, plan=self._config.plan,
        )  # fmt: skip
        self._emit("round.started", round=number, parent=parent.digest, sites=sorted(self._exchange.roster.sites))
        started = self._exchange.clock()
        outcome = self._exchange.converse(
            lambda hello: dialogues.train(hello.site, hello.fingerprint.digest, self._name, order, parent.blob),
            started + self._config.round_seconds + self._config.grace_seconds,
            group=f"round {number}",
        )
        wall = self._exchange.clock() - started
        for site, update in outcome.answers.items():
            self._emit("site.trained", round=number, site=site, **update.report.model_dump(mode="json"))
        longest = max((update.report.seconds for update in outcome.answers.values()), default=0.0)
        self._seconds["train"] += longest
        self._seconds["transfer"] += max(0.0, wall - longest)
        self._emit("round.trained", round=number, seconds=round(wall, 3), left_out=outcome.left_out)
        return outcome

    def _publish(
        self, number: int, parent: AdapterManifest, aggregate: Aggregate, left_out: dict[str, str],
        updates: dict[str, Update],
    ) -> AdapterManifest:  # fmt: skip
        reports = [updates[site].report for site in aggregate.weights]
        tokens = sum(report.num_loss_tokens for report in reports)
        version = self._registry.publish(
            self._name, peft_dir.encode(aggregate.tensors), round=number, run_id=self._run_id, parent=parent.digest,
            strategy=self._config.strategy, weights=aggregate.weights, left_out=left_out,
            certificate=aggregate.certificate,
            metrics={"train-loss": sum(report.loss_sum for report in reports) / tokens, "num-loss-tokens": tokens},
        )  # fmt: skip
        worst = max(aggregate.certificate.values(), default=None)
        self._emit(
            "round.published", round=number, version=version.version, digest=version.digest,
            weights=aggregate.weights, left_out=left_out, relative_error=worst,
        )  # fmt: skip
        return version

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
        if agreed is not None and pin is None:
            self._registry.begin(self._name, agreed, self._config.seed)
            self._require(agreed)
        return enough

    def _agreed(self, pin: Pin | None, sites: dict[str, Hello]) -> Pin | None:
        """The pin that a quorum of sites matches; before there is one, whatever a quorum has in common."""
        pins = [pin or Pin.of(hello, self._config.rank) for hello in sites.values()]
        return next((one for one in pins if pins.count(one) >= self._config.quorum), None)

    def _require(self, pin: Pin | None) -> None:
        """Hold the sites to the pin, or, before there is one, to being able to take part at all."""
        if pin is not None and pin.rank != self._config.rank:
            raise ConfigError(
                f"rank = {self._config.rank}, but {self._name} in {self._registry.root} has rank {pin.rank}; "
                f"run with rank={pin.rank}, or with another registry"
            )
        rank = self._config.rank
        self._exchange.roster.require(lambda hello: (pin or Pin.of(hello, rank)).require(hello, self._name))

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
