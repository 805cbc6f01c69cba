"""How a version comes to this site's verdict: loaded beside what answers users, probed, watched, judged."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

import httpx

from client.jobs import Jobs
from client.journal import Journal
from client.versions.loading import Loading
from client.versions.verdict import Probe, judge
from client.versions.watch import Watch, with_traffic
from serving.engine import Engine
from serving.scores import Scores
from serving.supervisor import Supervisor
from umbel import faults
from umbel.adapter import AdapterRef, Lifecycle
from umbel.config import SiteConfig
from umbel.errors import AdapterError, Conflict, EngineError, EngineGone, TrainingError
from umbel.faults import Point, reach
from umbel.messages import ShadowReport, ShadowState
from umbel.site_sections import ShadowSection

NOTICE_S = 2.0

Discard = Callable[[AdapterRef, str], Awaitable[object]]
"""Of a version, for a reason; raises Conflict where it answers users, or did."""

logger = logging.getLogger(__name__)


class Evidence:
    """Asks the co-trainer, and remembers what it said of versions that still matter. `folder` says where one lies."""

    def __init__(self, config: SiteConfig, journal: Journal, jobs: Jobs, folder: Callable[[AdapterRef], Path]) -> None:
        self._config = config
        self._journal = journal
        self._jobs = jobs
        self._folder = folder
        self._known: dict[tuple[AdapterRef | None, str | None], Scores] = {}

    async def probe(self, ref: AdapterRef) -> Probe:
        """Base, live and shadow on the held-out examples; on each guard the shadow and what answers users now.

        Raises EngineGone, TrainingError.
        """
        live = self._journal.alias(ref.name, "live")
        subjects: dict[str, AdapterRef | None] = {"base": None, **({"live": live} if live else {}), "shadow": ref}
        rivals = {role: subjects[role] for role in ("live" if live else "base", "shadow")}
        probe = Probe(
            {role: await self._scores(subject) for role, subject in subjects.items()},
            {
                guard.name: {role: await self._scores(subject, guard.name) for role, subject in rivals.items()}
                for guard in self._config.shadow.guard
            },
        )
        if self._journal.alias(ref.name, "live") != live:  # the evidence is against what answers users no more
            return await self.probe(ref)
        self._known = {asked: scores for asked, scores in self._known.items() if asked[0] in subjects.values()}
        return probe

    def forget(self) -> None:
        """Ask anew from now on: what was measured may not be what lies there."""
        self._known.clear()

    async def _scores(self, subject: AdapterRef | None, guard: str | None = None) -> Scores:
        """What is known already is not asked again."""
        if (subject, guard) not in self._known:
            self._known[subject, guard] = await self._jobs.evaluate(self._folder(subject) if subject else None, guard)
        return self._known[subject, guard]


class Judging:
    """Judges one version after the other, each against what answers users at that time."""

    def __init__(
        self,
        policy: ShadowSection,
        journal: Journal,
        supervisor: Supervisor,
        loading: Loading,
        evidence: Evidence,
        watch: Watch,
        discard: Discard,
    ) -> None:
        self._policy = policy
        self._journal = journal
        self._supervisor = supervisor
        self._loading = loading
        self._evidence = evidence
        self._watch = watch
        self._discard = discard

    async def judge(self, ref: AdapterRef) -> None:
        """Load, warm and probe a candidate; whatever the engine does meanwhile, this ends with a verdict."""
        while True:
            engine = await self._supervisor.ready()
            try:
                if await self._load_and_probe(engine, ref):
                    return
            except EngineGone as gone:
                logger.warning("adapter.judge ref=%s interrupted: %s", ref, gone)
            except (AdapterError, EngineError, TrainingError) as error:
                await self._discard(ref, str(error))
                return
            except httpx.HTTPError as error:
                await asyncio.sleep(NOTICE_S)  # a dead engine is noticed a moment after its connections break
                if self._supervisor.engine is engine:
                    await self._discard(ref, f"the engine does not answer: {error}")
                    return
                logger.warning("adapter.judge ref=%s interrupted: %s", ref, error)

    async def _load_and_probe(self, engine: Engine, ref: AdapterRef) -> bool:
        """Whether that is done; False where the evidence is against what answers users no more."""
        for older in self._journal.versions(Lifecycle.CANDIDATE, Lifecycle.SHADOW):
            if older.ref.name == ref.name and older.ref < ref:
                await self._supersede(older.ref, ref)
        began = time.monotonic()
        await self._loading.ensure_loaded(engine, ref)
        loaded = time.monotonic()
        version = self._journal.get(ref)
        if version.state is Lifecycle.REJECTED:  # discarded while it was loading
            await self._loading.retire(ref)
            return True
        report = version.report.model_copy(update={"state": ShadowState.PROBING, "load_s": loaded - began})
        if version.state is Lifecycle.CANDIDATE:
            reach(Point.SHADOW_BEGUN)
            self._journal.move(ref, Lifecycle.SHADOW, report)
            reach(Point.SHADOW_JOURNALLED)
            await self._loading.publish_table(faults.SHADOW)
        else:  # it may have been watched when the engine went away, or something else began to answer users
            await self._note(ref, report, ShadowState.PROBING)
        probe = await self._evidence.probe(ref)
        verdict = await asyncio.to_thread(judge, probe, self._policy)
        probed = time.monotonic()
        report = report.model_copy(update={"probe": probe.sums, "probe_s": probed - loaded})
        if verdict.decision != "reject" and self._policy.watch_s:
            if not await self._note(ref, report, ShadowState.WATCHING):
                return True
            found = await self._watch.shadow(engine, ref)
            if found is None:
                return not self._is_shadow(ref)
            verdict = with_traffic(verdict, found)
            report = report.model_copy(update={"watch_s": time.monotonic() - probed})
        judged = report.model_copy(update={"verdict": verdict})
        reach(Point.JUDGE_DECIDED)
        if await self._note(ref, judged, ShadowState.JUDGED, f"judged: {verdict.decision}"):
            reach(Point.JUDGE_JOURNALLED)
            logger.info("adapter.judged ref=%s decision=%s %s", ref, verdict.decision, "; ".join(verdict.reasons))
        return True

    async def _note(self, ref: AdapterRef, report: ShadowReport, state: ShadowState, event: str = "") -> bool:
        """Write down how a shadow stands, and let the router know; False for what is no shadow any more."""
        if not self._is_shadow(ref):
            return False
        self._journal.report(ref, report.model_copy(update={"state": state}), event)
        if self._policy.watch_s:
            await self._loading.publish_table(faults.SHADOW)  # who is in its canary follows from the state
        return True

    def _is_shadow(self, ref: AdapterRef) -> bool:
        return self._journal.get(ref).state is Lifecycle.SHADOW

    async def _supersede(self, older: AdapterRef, newer: AdapterRef) -> None:
        with suppress(Conflict):  # it was promoted just now
            await self._discard(older, f"superseded by {newer}")
