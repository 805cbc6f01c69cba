"""What users get of a version, followed while it happens: of a shadow before its verdict, and after a promotion."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

import httpx

from client.journal import BY_ITSELF, Journal, Promotion
from client.versions.comparison import Finding, Looks, compare
from serving.aliases import BASE_LABEL
from serving.engine import Engine
from serving.supervisor import Supervisor
from serving.traffic_report import TrafficReport, VersionTraffic
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import EngineError, EngineGone
from umbel.messages import Verdict
from umbel.site_sections import ShadowSection

POLL_S = 2.0
"""Between two questions to the router; an answer is a few kilobytes."""

RollBack = Callable[[str, AdapterRef | None], Awaitable[object]]
"""Of an adapter, as long as this version answers."""

logger = logging.getLogger(__name__)


class Watch:
    """Compares versions by the router's counts."""

    def __init__(self, policy: ShadowSection, journal: Journal, supervisor: Supervisor) -> None:
        self._policy = policy
        self._journal = journal
        self._supervisor = supervisor

    async def shadow(self, engine: Engine, ref: AdapterRef) -> Finding | None:
        """A shadow against what answers users now, until enough is seen, it is worse, or `watch_s` are over.

        None when it is a shadow no more, or something else answers users. Raises EngineGone, EngineError, HTTPError.
        """
        live = self._journal.alias(ref.name, "live")
        new, now, who = str(ref), str(live or BASE_LABEL), "live" if live else "base"
        before, looks = await self._traffic(engine), Looks(self._policy.confidence)
        end = time.monotonic() + self._policy.watch_s
        while True:
            await asyncio.sleep(POLL_S)
            traffic = await self._traffic(engine)
            if self._journal.get(ref).state is not Lifecycle.SHADOW or self._journal.alias(ref.name, "live") != live:
                return None
            mirror = traffic.mirrored(new).since(before.mirrored(new))
            answered = traffic.of(new).since(before.of(new))
            seen = answered.requests + mirror.compared + mirror.failed
            over = seen >= self._policy.min_requests or time.monotonic() >= end
            evidence = seen + answered.up + answered.down
            if over or looks.due(evidence):
                alpha, other = looks.spend(evidence), traffic.of(now).since(before.of(now))
                found = compare(answered, other, who, self._policy, alpha, mirror)
                if found.worse or over:
                    return found

    async def before(self, ref: AdapterRef, instead_of: AdapterRef | None) -> Promotion | None:
        """What users get just before `ref` answers them; None where nobody wants to know, or nobody can tell."""
        engine = self._supervisor.engine
        if not self._policy.rollback_window_s or engine is None:
            return None
        try:
            traffic = await engine.client.traffic()
        except (EngineError, httpx.HTTPError) as error:
            logger.warning("rollback.blind ref=%s: %s; it will not be rolled back by itself", ref, error)
            return None
        before, already = traffic.of(str(instead_of or BASE_LABEL)), traffic.of(str(ref))
        return Promotion(ref, instead_of, time.time(), before, already)

    async def guard(self, promotion: Promotion, roll_back: RollBack) -> None:
        """Go back when users are served worse than before a promotion; only promotions are followed, so not twice."""
        ref = promotion.ref
        found = await self._promoted(promotion)
        if found is not None and self._journal.alias(ref.name, "live") == ref:
            why = f"worse than {promotion.instead_of or 'the base'}, {found.reasons[0]}"
            logger.error("adapter.worse ref=%s %s; rolling back", ref, why)
            self._journal.note(ref, f"{BY_ITSELF}{why}")
            self._journal.report(ref, self._journal.get(ref).report.model_copy(update={"taken_back": why}))
            await self._insist(partial(roll_back, ref.name, ref))
        self._journal.end_window(ref)

    async def _insist(self, roll_back: Callable[[], Awaitable[object]]) -> None:
        """Again and again, where the engine does not do it just now: users wait for it."""
        while True:
            try:
                await roll_back()
                return
            except (EngineError, httpx.HTTPError) as error:
                logger.error("rollback.delayed %s; trying again", error)
                await asyncio.sleep(POLL_S)

    async def _promoted(self, promotion: Promotion) -> Finding | None:
        """A version that was promoted against the one before, until it is worse; None when it is not, in its window."""
        ref = promotion.ref
        who = str(promotion.instead_of or BASE_LABEL)
        end = time.monotonic() + promotion.at + self._policy.rollback_window_s - time.time()
        looks, start, counting = Looks(self._policy.confidence), promotion.already, self._supervisor.engine
        while time.monotonic() < end and self._journal.alias(ref.name, "live") == ref:
            await asyncio.sleep(POLL_S)
            engine = self._supervisor.engine
            if engine is None:
                continue
            try:
                answered = (await self._traffic(engine)).of(str(ref))
            except (EngineError, httpx.HTTPError):
                continue  # it is being started again
            if engine is not counting:
                counting, start = engine, VersionTraffic()  # another run of the engine counts from nothing
            answered = answered.since(start)
            seen = answered.requests + answered.up + answered.down
            if looks.due(seen):
                found = compare(answered, promotion.before, who, self._policy, looks.spend(seen))
                if found.worse:
                    return found
        return None

    async def _traffic(self, engine: Engine) -> TrafficReport:
        if self._supervisor.engine is not engine:
            raise EngineGone("the engine went away while its traffic was watched")
        return await engine.client.traffic()


def with_traffic(verdict: Verdict, found: Finding) -> Verdict:
    """A probe's verdict, and what traffic says: it can reject a version, and does not promote one by itself."""
    if found.worse:
        return Verdict(accepted=False, reasons=(*found.reasons, *verdict.reasons))
    return verdict.model_copy(update={"reasons": (*verdict.reasons, *found.reasons)})
