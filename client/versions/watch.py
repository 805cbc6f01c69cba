"""`Watch`: compare a version with the incumbent by users' traffic, before its verdict and after its promotion."""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import partial

import httpx

from client.journal import BY_ITSELF, Journal
from client.rollback_windows import Promotion
from client.versions.looks import Looks
from client.versions.switch import Switch
from client.versions.traffic_comparison import Finding, compare, fewest_users
from serving.aliases import BASE_LABEL
from serving.engine import Engine
from serving.supervisor import Supervisor
from serving.traffic_report import TrafficReport, VersionTraffic
from umbel.adapter import AdapterRef
from umbel.errors import EngineError, EngineGone, NoRoom
from umbel.messages import Verdict
from umbel.site.sections import ShadowSection

POLL_S = 2.0
"""Seconds between two questions to the router; an answer is a few kilobytes."""

logger = logging.getLogger(__name__)


class Watch:
    """Compares a version with the incumbent by the router's counts, and rolls it back if users are served worse."""

    def __init__(self, policy: ShadowSection, journal: Journal, supervisor: Supervisor, switch: Switch) -> None:
        self._policy = policy
        self._journal = journal
        self._supervisor = supervisor
        self._switch = switch

    async def shadow(self, engine: Engine, ref: AdapterRef) -> Finding | None:
        """Compare a shadow with the incumbent until enough is seen, it is worse, or `watch_s` are over.

        Returns None when the version is no shadow any more, or the incumbent has changed. Raises EngineGone,
        EngineError, HTTPError.
        """
        live = self._journal.alias(ref.name, "live")
        candidate, incumbent, incumbent_name = str(ref), str(live or BASE_LABEL), "live" if live else "base"
        start, looks = await self._traffic(engine), Looks(self._policy.confidence, self._policy.min_requests)
        end = time.monotonic() + self._policy.watch_s
        while True:
            await asyncio.sleep(POLL_S)
            traffic = await self._traffic(engine)
            if not self._journal.get(ref).state.is_shadow or self._journal.alias(ref.name, "live") != live:
                return None
            mirror = traffic.mirrored(candidate).since(start.mirrored(candidate))
            answered = traffic.of(candidate).since(start.of(candidate))
            other = traffic.of(incumbent).since(start.of(incumbent))
            seen = answered.requests + mirror.compared + mirror.failed
            many = not self._policy.canary_share or fewest_users(answered, other) >= self._policy.min_users
            over = (many and seen >= self._policy.min_requests) or time.monotonic() >= end
            if over or looks.due(seen):
                alpha, before = looks.spend(seen, last=over), start.of(incumbent)
                found = await asyncio.to_thread(
                    compare, answered, other, incumbent_name, self._policy, alpha, mirror, before
                )
                if found.worse or over:
                    return found

    async def before(self, ref: AdapterRef, instead_of: AdapterRef | None) -> Promotion | None:
        """Read the traffic just before `ref` is promoted over `instead_of` (None: the base).

        Returns None where the site has no roll-back window, or the engine does not say.
        """
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

    async def guard(self, promotion: Promotion) -> None:
        """Roll back a promotion if users are served worse than those whom the version before still answers.

        When the window ends, all users get the version. A roll-back itself is not guarded, so a site does not go back
        and forth.
        """
        ref = promotion.ref
        found = await self._promoted(promotion)
        if found is not None and self._journal.alias(ref.name, "live") == ref:
            why = f"worse than {promotion.instead_of or 'the base'}, {found.reasons[0]}"
            logger.error("adapter.worse ref=%s %s; rolling back", ref, why)
            await self._insist(partial(self._roll_back, ref, why))
        await self._insist(partial(self._switch.stand, ref))

    async def _roll_back(self, ref: AdapterRef, why: str) -> None:
        if not self._journal.get(ref).report.taken_back:
            taken_back = self._journal.get(ref).report.model_copy(update={"taken_back": why})
            self._journal.report(ref, taken_back, f"{BY_ITSELF}{why}")
        await self._switch.roll_back(ref.name, ref)

    async def _insist(self, change: Callable[[], Awaitable[None]]) -> None:
        """Make a change, and try again for as long as the engine fails or the disk is full: users wait for it."""
        while True:
            try:
                return await change()
            except (EngineError, NoRoom, httpx.HTTPError) as error:
                logger.error("rollback.delayed %s; trying again", error)
                await asyncio.sleep(POLL_S)

    async def _promoted(self, promotion: Promotion) -> Finding | None:
        """Compare a promoted version with the one before; None when its window ends and it was not worse."""
        ref, before, few = promotion.ref, promotion.before, True
        incumbent = str(promotion.instead_of or BASE_LABEL)
        end = time.monotonic() + promotion.at + self._policy.rollback_window_s - time.time()
        looks, already, counting = Looks(self._policy.confidence), promotion.already, self._supervisor.engine
        while time.monotonic() < end and self._journal.alias(ref.name, "live") == ref:
            await asyncio.sleep(POLL_S)
            engine = self._supervisor.engine
            if engine is None:
                continue
            try:
                traffic = await self._traffic(engine)
            except (EngineError, httpx.HTTPError):
                continue  # the engine is being started again
            if engine is not counting:
                counting = engine  # another run of the engine counts from nothing, and has other codes for users
                already = before = VersionTraffic()
            answered, other = traffic.of(str(ref)).since(already), traffic.of(incumbent).since(before)
            few = fewest_users(answered, other) < self._policy.min_users
            seen = min(answered.requests, other.requests)
            if looks.due(seen):
                found = await asyncio.to_thread(
                    compare, answered, other, incumbent, self._policy, looks.spend(seen), before=before
                )
                if found.worse:
                    return found
        if few and self._journal.alias(ref.name, "live") == ref:
            logger.warning("rollback.few_users ref=%s: fewer than min_users = %d met it or what answered before",
                           ref, self._policy.min_users)  # fmt: skip
        return None

    async def _traffic(self, engine: Engine) -> TrafficReport:
        if self._supervisor.engine is not engine:
            raise EngineGone("the engine went away while its traffic was watched")
        return await engine.client.traffic()


def with_traffic(verdict: Verdict, found: Finding, policy: ShadowSection) -> Verdict:
    """Add a finding from traffic to a probe's verdict. It can reject a version, but does not promote one by itself."""
    if found.worse:
        return Verdict(accepted=False, reasons=(*found.reasons, *verdict.reasons))
    if found.few_users and policy.canary_share and policy.too_few_users == "keep" and verdict.accepted:
        return Verdict(accepted=False, decision="keep", reasons=(*found.reasons, *verdict.reasons))
    return verdict.model_copy(update={"reasons": (*verdict.reasons, *found.reasons)})
