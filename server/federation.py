"""`Federation`: the steps of a round, each recorded before the next begins; server/loop.py puts them in order."""

import importlib.metadata
import itertools
import json
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import asdict
from functools import partial

from server.config import RunConfig
from server.dialogues import Sites
from server.keyring import Keyring
from server.orders import Orders
from server.quorum import Quorum
from server.reconcile import ASK_S, reconcile
from server.registry.events import Events
from server.registry.registry import HEAD, LIVE, AdapterRegistry
from server.registry.round_log import RoundState
from server.rollout import Judgement, Rollout
from server.seen_live import SeenLive
from server.training import RoundResult, Training
from strategies.rule import Rule
from umbel import peft_dir
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.errors import Conflict, NotFound, RegistryError
from umbel.faults import Point, reach
from umbel.messages import JobState, RoundReport


class Federation:
    """One run over the sites of one adapter. Raises ConfigError for a run that the registry cannot go on with."""

    def __init__(
        self, config: RunConfig, registry: AdapterRegistry, exchange: Sites, events: Events, run_id: str, strategy: Rule
    ) -> None:
        self._config = config
        self._name = config.adapter
        self._registry = registry
        self._exchange = exchange
        self._events = events
        self._run_id = run_id
        self._keys = Keyring(config.site_keys)
        self._rollout = Rollout(
            exchange, quorum=config.quorum, straggler_s=config.straggler_seconds, grace_s=config.grace_seconds,
            sign=registry.sign, keys=self._keys, waves=config.rollout,
        )  # fmt: skip
        self._strategy = strategy
        self._orders = Orders(config, registry, self._keys)
        self._training = Training(config, registry, exchange, self._orders, self._strategy, self._tell)
        self._quorum = Quorum(config, registry, exchange, self._keys, self._strategy)
        self._seen = SeenLive(exchange.roster)
        self._round = 0
        self._aside: dict[str, str] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)

    def rounds(self) -> Iterator[int]:
        """Yield the rounds to run: those that an earlier run left without a verdict, then the rest of this run's own.

        Before each round, and at the end, the sites are reconciled with the registry; a run of 0 rounds does only that.
        """
        if not self._config.rounds:
            self._emit("run.started", rounds=0)
            self.reconcile()
            self._emit("run.finished", head=str(self._registry.aliases(self._name).get(HEAD, "none")))
            return
        plan = self._config.plan.model_dump_json()
        if self._config.mixed_bases:  # orders say another thing then
            plan += " mixed-bases"
        first = self._registry.rounds.begin_run(self._run_id, self._name, plan)
        own = range(first, first + self._config.rounds)
        self._emit("run.started", first_round=first, rounds=len(own), strategy=self._config.strategy)
        earlier = [record.round for record in self._registry.rounds.all(self._name) if record.round < first]
        for number in itertools.chain(earlier, own):
            record = self._registry.rounds.find(self._name, number)
            if record is None or not record.state.final:
                self._exchange.sent.clear()
                self.reconcile()
                self._seconds.clear()
                if damage := self._damage_of(number):
                    self._end(number, RoundState.FAILED, {"*": damage})
                else:
                    yield number
        self._seen.forget_all()  # the last look of a run is at every site
        self.reconcile()
        self._emit("run.finished", head=str(self._registry.aliases(self._name).get(HEAD, "none")))

    def reconcile(self) -> None:
        """Bring the sites that are online to the version that is live in the registry; a site's refusal stands."""
        grace_s = self._config.grace_seconds
        ask_s = min(ASK_S, grace_s) if self._config.rounds else grace_s
        found = reconcile(
            self._exchange, self._registry, self._keys, self._name, self._seen, kin=self._quorum.kin, ask_s=ask_s,
            grace_s=grace_s,
        )  # fmt: skip
        aside = {**found.kept, **found.missed} if found else {}
        if found and (found.brought or aside != self._aside or not self._config.rounds):
            self._emit("fleet.reconciled", **asdict(found))
        self._aside = aside

    def version_of(self, number: int) -> AdapterManifest | None:
        """Return the version that a round published before an interruption; None where it did not."""
        record = self._registry.rounds.find(self._name, number)
        if record is None or record.version is None:
            return None
        return self._registry.manifest(AdapterRef(self._name, record.version))

    def state_of(self, number: int) -> RoundState | None:
        """Return how far a round is, or how it ended; None for one that was never begun."""
        record = self._registry.rounds.find(self._name, number)
        return record.state if record else None

    def _damage_of(self, number: int) -> str:
        """Say why the version of an interrupted round cannot be read; empty where it can, or there is none yet."""
        record = self._registry.rounds.find(self._name, number)
        if record is None or record.version is None:
            return ""
        try:
            self._registry.read(AdapterRef(self._name, record.version))
        except (NotFound, RegistryError) as error:
            return f"its version cannot be read: {error}"
        return ""

    def train(self, number: int) -> AdapterManifest | None:
        """Train at the sites, aggregate and publish.

        Return None, with the round failed, when there is no quorum; idle, when it has nothing worth training.
        """
        self._record(number, RoundState.TRAINING)
        reach(Point.ROUND_RECORDED)
        if not self._quorum.gather():
            self._end(number, RoundState.FAILED, self._quorum.shortfall())
            return None
        aliases = self._registry.aliases(self._name)
        held = {alias: aliases[alias].version for alias in (HEAD, LIVE) if alias in aliases}
        self._registry.rounds.expect(self._name, number, held)  # before head is read, so that a later move is noticed
        head = self._registry.manifest(self._registry.resolve(f"{self._name}@{HEAD}"))
        self._emit("round.started", round=number, parent=head.digest, sites=sorted(self._exchange.roster.sites))
        started, self._round = self._exchange.clock(), number
        result = self._training.run(number, head, self._quorum.kin)
        wall = self._exchange.clock() - started
        self._time_training(result, wall)
        self._seen.forget(result.left_out)
        result.left_out = {**self._exchange.roster.troubles, **result.left_out}
        self._emit(
            "round.trained", round=number, seconds=round(wall, 3), left_out=result.left_out, skipped=result.skipped
        )
        if result.took_part >= self._config.quorum and result.aggregate.tensors:
            return self._publish(number, head, result)
        idle = result.took_part >= self._config.quorum and not result.admitted
        why = f"{result.admitted} of {self._config.quorum} updates needed were admitted"
        why = f"nothing is worth training at {len(result.skipped)} sites" if idle else why
        reasons = {**result.skipped, **result.left_out, "*": why}
        self._end(number, RoundState.IDLE if idle else RoundState.FAILED, reasons)
        return None

    def judge(self, number: int, version: AdapterManifest) -> Judgement:
        """Shadow a version at the sites. A verdict that was recorded before an interruption stands.

        Sites are not asked when an operator has moved `head` or `live` since the round began: the version is rejected.
        """
        blob, _ = self._registry.read(version.ref)
        record = self._registry.rounds.find(self._name, number)
        overruled = self._registry.overruled(self._name, number)
        if overruled and record is not None and record.state is RoundState.PUBLISHED:
            judgement = Judgement(False, {}, {"*": overruled})
        elif not self._quorum.gather():
            troubles = {**self._exchange.roster.troubles, "*": "too few sites were there to judge it"}
            judgement = Judgement(False, {}, troubles)
        else:
            started = self._exchange.clock()
            judgement = self._rollout.shadow(version, blob, self._quorum.kin)
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
        """Make a version live at the sites, wave by wave, then move `head` and `live` of the registry to it.

        If the promotion is stopped, or an operator moved those aliases meanwhile, it is rolled back and rejected.
        """
        started = self._exchange.clock()
        promotion = self._rollout.promote(
            version.ref, judgement, overruled=partial(self._registry.overruled, self._name, number),
            tell=partial(self._emit, round=number, version=version.version),
        )  # fmt: skip
        self._seconds["promote"] += self._exchange.clock() - started
        self._seen.note(promotion.sites, str(version.ref))
        self._seen.forget({**promotion.left_out, **promotion.went_back})
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
        """Unload a version at the sites, rolled back where it may be `answering` users; no alias moves."""
        started = self._exchange.clock()
        answering = {*answering, *judgement.answering}
        self._seen.forget(answering)
        self._rollout.discard(version.ref, set(judgement.reasons), answering=answering)
        self._seconds["promote"] += self._exchange.clock() - started
        reach(Point.SITES_DISCARDED)
        self._record(number, RoundState.REJECTED)
        reach(Point.ROUND_REJECTED)
        self._done("round.rejected", number, version=version.version, reasons=judgement.reasons)

    def _publish(self, number: int, parent: AdapterManifest, result: RoundResult) -> AdapterManifest:
        aggregate = result.aggregate
        version = self._registry.publish(
            self._name, peft_dir.encode(aggregate.tensors), round=number, run_id=self._run_id, parent=parent.digest,
            parents=result.parents, personal=self._strategy.personal, strategy=self._config.strategy,
            options=self._strategy.options.model_dump(),
            kin=self._quorum.kin, bases=result.bases if self._config.mixed_bases else {},
            weights=aggregate.weights, left_out=result.left_out, skipped=result.skipped,
            certificate=aggregate.certificate, change_certificate=aggregate.change_certificate,
            metrics=result.metrics, site_metrics=result.site_metrics, counts=result.counts,
            code=_code(), config=self._config.digest,
        )  # fmt: skip
        reach(Point.VERSION_PUBLISHED)
        self._emit(
            "round.published", round=number, version=version.version, digest=version.digest,
            weights=aggregate.weights, left_out=result.left_out, skipped=result.skipped,
            relative_error=max(aggregate.certificate.values(), default=None),
            change_error=max(aggregate.change_certificate.values(), default=None),
        )  # fmt: skip
        return version

    def _tell(self, site: str, report: RoundReport, staleness: int) -> None:
        if site not in self._seen.at(report.live):
            self._seen.forget({site})
        if report.state is JobState.SKIPPED:
            self._emit("site.skipped", round=self._round, site=site, reason=report.error)
            return
        fields = json.loads(report.model_dump_json())  # NaN becomes a string, as JSON needs
        self._emit("site.trained", round=self._round, site=site, staleness=staleness, **fields)

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

    def _end(self, number: int, state: RoundState, reasons: dict[str, str]) -> None:
        """End a round without a version: failed or idle."""
        self._record(number, state, reasons)
        self._done(f"round.{state}", number, reasons=reasons)

    def _record(self, number: int, state: RoundState, reasons: dict[str, str] | None = None) -> None:
        self._registry.rounds.record(self._name, number, self._run_id, state, reasons=reasons)

    def _done(self, event: str, number: int, **fields: object) -> None:
        nodes = {site: self._exchange.roster.node_of(site) for site in sorted(self._exchange.roster.sites)}
        messages = {site: self._exchange.sent[node] for site, node in nodes.items() if node is not None}
        seconds = {part: round(s, 3) for part, s in self._seconds.items()}
        self._emit(event, round=number, **fields, seconds=seconds, messages=messages)

    def _emit(self, event: str, **fields: object) -> None:
        self._events.emit(event, run_id=self._run_id, adapter=self._name, **fields)


def _code() -> str:
    """Return the installed release; empty where only Flower's bundle is there."""
    try:
        return importlib.metadata.version("umbel")
    except importlib.metadata.PackageNotFoundError:
        return ""
