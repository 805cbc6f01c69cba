"""`Judging`: load a version beside the incumbent, probe it, watch it, and reach this site's verdict on it."""

import asyncio
import logging
import time
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import httpx

from client.data.in_use import DataInUse
from client.data.prepare import Prepared
from client.journal import Journal
from client.versions.loading import AGAIN_S, LONGEST_AGAIN_S, Loading
from client.versions.served import Served
from client.versions.switch import Switch
from client.versions.verdict import Probe, judge
from client.versions.version_files import directory
from client.versions.watch import Watch, with_traffic
from serving.engine import Engine
from serving.scores import Scores
from serving.supervisor import Supervisor
from umbel import faults
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import (
    AdapterError,
    Conflict,
    CoTrainerSilent,
    EngineError,
    EngineGone,
    NoAnswer,
    NoRoom,
    TrainingError,
)
from umbel.faults import Point, reach
from umbel.messages import ShadowReport
from umbel.site.config import SiteConfig
from umbel.site.sections import ShadowSection

logger = logging.getLogger(__name__)


class Evaluator(Protocol):
    """The part of `Jobs` that measures a version."""

    data: DataInUse

    async def evaluate(self, data: Prepared, adapter: Path | None, guard: str | None = None) -> Scores:
        """Return the scores of an adapter's folder (None: the base) on the held-out examples or on a guard's."""
        ...


class Evidence:
    """Measures an adapter's versions on its held-out examples and guards; remembers the scores that still matter."""

    def __init__(
        self, config: SiteConfig, policy: ShadowSection, journal: Journal, served: Served, jobs: Evaluator
    ) -> None:
        self._config = config
        self._guards = policy.guard
        self._journal = journal
        self._served = served
        self._jobs = jobs
        self._known: dict[tuple[Path, AdapterRef | None, str | None], Scores] = {}
        """Held-out token file, by which the data is known, version (None: the base), guard → scores."""
        self._damages = served.damages

    async def probe(self, ref: AdapterRef) -> Probe:
        """Measure base, live and shadow on the held-out examples, and the shadow and the incumbent on each guard.

        All are measured on the data that is in use when the probe begins. Raises EngineGone, TrainingError.
        """
        with self._jobs.data.held() as data:
            return await self._probe(ref, data)

    async def _probe(self, ref: AdapterRef, data: Prepared) -> Probe:
        live = self._journal.alias(ref.name, "live")
        subjects: dict[str, AdapterRef | None] = {"base": None, **({"live": live} if live else {}), "shadow": ref}
        rivals = {role: subjects[role] for role in ("live" if live else "base", "shadow")}
        probe = Probe(
            {role: await self._scores(data, subject) for role, subject in subjects.items()},
            {
                guard.name: {role: await self._scores(data, subject, guard.name) for role, subject in rivals.items()}
                for guard in self._guards
            },
            data.heldout,
        )
        if self._journal.alias(ref.name, "live") != live:  # it was measured against another incumbent
            return await self._probe(ref, data)
        self._known = {
            asked: scores
            for asked, scores in self._known.items()
            if asked[0] == data.eval and asked[1] in subjects.values()
        }
        return probe

    async def _scores(self, data: Prepared, subject: AdapterRef | None, guard: str | None = None) -> Scores:
        """Return known scores; measure what is not known, or was measured before a version was found damaged."""
        if self._damages != self._served.damages:
            self._damages = self._served.damages
            self._known.clear()
        asked = (data.eval, subject, guard)
        if asked not in self._known:
            folder = directory(self._config, subject) if subject else None
            self._known[asked] = await self._jobs.evaluate(data, folder, guard)
        return self._known[asked]


class Judging:
    """Judges versions, each against the incumbent of that time. It may be asked again after a restart."""

    def __init__(
        self,
        policy: ShadowSection,
        journal: Journal,
        supervisor: Supervisor,
        loading: Loading,
        evidence: Evidence,
        watch: Watch,
        switch: Switch,
    ) -> None:
        self._policy = policy
        self._journal = journal
        self._supervisor = supervisor
        self._loading = loading
        self._evidence = evidence
        self._watch = watch
        self._switch = switch

    async def judge(self, ref: AdapterRef) -> None:
        """Load, warm and probe a candidate; whatever the engine does meanwhile, this ends with a verdict.

        An engine that is late, or a full disk, is no fault of the version: it is tried again until it is discarded.
        """
        pause = AGAIN_S
        while True:
            engine = await self._supervisor.ready()
            try:
                if await self._load_and_probe(engine, ref):
                    return
            except EngineGone as gone:
                logger.warning("adapter.judge ref=%s interrupted: %s", ref, gone)
            except (NoAnswer, CoTrainerSilent, NoRoom) as late:
                logger.warning("adapter.judge ref=%s delayed: %s; again in %.0f s", ref, late, pause)
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_AGAIN_S)
            except (AdapterError, EngineError, TrainingError) as error:
                await self._switch.discard(ref, str(error))
                return
            except httpx.HTTPError as error:
                if not await self._loading.is_gone(engine):
                    await self._switch.discard(ref, f"the engine does not answer: {error}")
                    return
                logger.warning("adapter.judge ref=%s interrupted: %s", ref, error)

    async def _load_and_probe(self, engine: Engine, ref: AdapterRef) -> bool:
        """Return True when the version has its verdict or is not to have one any more; False to begin again."""
        for older in self._journal.versions(adapter=ref.name):
            waiting = older.state is Lifecycle.CANDIDATE or older.state.is_shadow
            if waiting and older.ref < ref:
                await self._supersede(older.ref, ref)
        began = time.monotonic()
        await self._loading.ensure_loaded(engine, ref)
        loaded = time.monotonic()
        version = self._journal.get(ref)
        if version.state is Lifecycle.REJECTED:  # discarded while it was loading
            await self._loading.retire(ref)
            return True
        if version.state is not Lifecycle.CANDIDATE and not self._is_open(ref):  # another task has judged it
            return True
        report = version.report.model_copy(update={"state": Lifecycle.PROBING, "load_s": loaded - began})
        if version.state is Lifecycle.CANDIDATE:
            reach(Point.SHADOW_BEGUN)
            self._journal.move(ref, report)
            reach(Point.SHADOW_JOURNALLED)
            await self._loading.publish_table(faults.SHADOW)
        else:  # probed anew: the engine went away, or something else began to answer users
            await self._note(ref, report, Lifecycle.PROBING)
        probe = await self._evidence.probe(ref)
        look = self._journal.looks.next(ref.name, probe.asked)
        verdict = await asyncio.to_thread(judge, probe, self._policy, look)
        probed = time.monotonic()
        report = report.model_copy(update={"probe": probe.sums, "probe_s": probed - loaded})
        if verdict.decision != "reject" and self._policy.watch_s:
            if not await self._note(ref, report, Lifecycle.WATCHING):
                return True
            found = await self._watch.shadow(engine, ref)
            if found is None:
                return not self._is_open(ref)
            verdict = with_traffic(verdict, found, self._policy)
            report = report.model_copy(update={"watch_s": time.monotonic() - probed})
        judged = report.model_copy(update={"verdict": verdict})
        reach(Point.JUDGE_DECIDED)
        if await self._note(ref, judged, Lifecycle.JUDGED, f"judged: {verdict.decision}", probe.asked):
            reach(Point.JUDGE_JOURNALLED)
            logger.info("adapter.judged ref=%s decision=%s %s", ref, verdict.decision, "; ".join(verdict.reasons))
        return True

    async def _note(
        self, ref: AdapterRef, report: ShadowReport, state: Lifecycle, event: str = "", heldout: str = ""
    ) -> bool:
        """Write a version's report and state, and tell the router; return False if it is not being judged any more."""
        if not self._is_open(ref):
            return False
        self._journal.report(ref, report.model_copy(update={"state": state}), event, heldout)
        if self._policy.watch_s:
            await self._loading.publish_table(faults.SHADOW)  # the state decides which users are in its canary
        return True

    def _is_open(self, ref: AdapterRef) -> bool:
        """True for a version that is loaded and waits for its verdict."""
        return self._journal.get(ref).state in (Lifecycle.PROBING, Lifecycle.WATCHING)

    async def _supersede(self, older: AdapterRef, newer: AdapterRef) -> None:
        with suppress(Conflict):  # it was promoted just now
            await self._switch.discard(older, f"superseded by {newer}")
