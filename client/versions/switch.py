"""`Switch`: change which version answers users: one journal transaction, then `aliases.json`, then the router."""

import asyncio
import logging

from client.journal import LIVE_AGAIN, ROLLED_BACK, TAKEN_BACK, Journal, Version
from client.versions.background import Background
from client.versions.loading import Loading
from serving.supervisor import Supervisor
from umbel import faults
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import Conflict, NotFound
from umbel.faults import Point, reach
from umbel.messages import ShadowReport, Verdict

logger = logging.getLogger(__name__)


class Switch:
    """Makes a version live or rejected, and retires in the background what nobody can ask for any more.

    Each adapter has its own, so that none waits for another's promotion. `moving` is held during each change.
    `make_live`, `make_base_live` and `publish` are for callers that hold it, so that their checks are still true when
    the change is made; `roll_back` and `discard` take it themselves.
    """

    def __init__(self, journal: Journal, supervisor: Supervisor, loading: Loading, background: Background) -> None:
        self._journal = journal
        self._supervisor = supervisor
        self._loading = loading
        self._background = background
        self.moving = asyncio.Lock()

    async def make_live(self, version: Version, event: str, change: faults.AliasChange, left: str = "") -> ShadowReport:
        """Let a version answer users. `event` goes to its history, `left` to that of the version it replaces.

        Raises AdapterError, EngineError or HTTPError where the engine cannot load it; then nothing has changed.
        """
        ref, engine = version.ref, self._supervisor.engine
        if engine is not None:
            await self._loading.ensure_loaded(engine, ref)
            await self._loading.prefill(engine, ref)
        old = self._journal.alias(ref.name, "live")
        dropped = self._journal.alias(ref.name, "previous")
        reach(change.begun)
        report = self._journal.make_live(ref, event, left)
        reach(change.journalled)
        await self.publish(change)
        logger.info("adapter.%s ref=%s instead_of=%s", event.replace(" ", "_"), ref, old or "base")
        if dropped is not None and dropped != ref:
            self._retire(dropped)
        return report

    async def make_base_live(self, live: AdapterRef, event: str) -> None:
        """Let the base answer users instead of `live`; `event` goes to the history of `live`."""
        dropped = self._journal.alias(live.name, "previous")
        reach(Point.ROLL_BACK_BEGUN)
        self._journal.make_base_live(live, event)
        reach(Point.ROLL_BACK_JOURNALLED)
        await self.publish(faults.ROLL_BACK)
        if dropped is not None:
            self._retire(dropped)

    async def publish(self, change: faults.AliasChange) -> None:
        """Bring the file and the router to what the journal says; a router may have missed it the first time."""
        await self._loading.publish_table(change)

    async def roll_back(self, name: str, instead_of: AdapterRef | None = None, *, forced: bool = False) -> str | None:
        """Let what answered before answer users again; return that version, or None for the base.

        With `instead_of`: only while that version answers, so that asking twice goes back once. Raises Conflict for
        a version that the site rolled back by itself, unless its operator has `forced` it; NotFound where no version
        ever answered.
        """
        async with self.moving:
            previous, live = self._journal.alias(name, "previous"), self._journal.alias(name, "live")
            if instead_of is not None and instead_of != live:
                await self.publish(faults.ROLL_BACK)
                return str(live) if live else None
            if previous is not None:
                undone = previous in self._journal.refused(name, limit=-1)  # going back to it undoes its own roll-back
                left, version = "" if undone else ROLLED_BACK, self._journal.get(previous)
                if version.report.taken_back and not forced:
                    raise Conflict(
                        f"{previous} answered before {live or 'the base'}, and this site went back from it by itself: "
                        f"{version.report.taken_back}; `umbel rollback SITE_FILE {name} --force` does it all the same"
                    )
                return (await self.make_live(version, LIVE_AGAIN, faults.ROLL_BACK, left)).ref
            if live is None:
                raise NotFound(f"{name}: the base answers, and no version ever did; there is nothing to roll back to")
            await self.make_base_live(live, TAKEN_BACK)
            logger.info("adapter.rolled_back ref=base instead_of=%s", live)
            return None

    async def stand(self, ref: AdapterRef) -> None:
        """End the roll-back window of a version: the users who stayed with the one before get it, too, if it is live.

        Raises NoRoom and EngineError where the router cannot be told; it is told with the next change at the latest.
        """
        async with self.moving:
            self._journal.windows.end(ref)
            if self._journal.alias(ref.name, "live") == ref:
                await self.publish(faults.PROMOTE)

    async def discard(self, ref: AdapterRef, reason: str) -> ShadowReport:
        """Reject a version, unload it and never use it again. A second time is no change.

        Raises NotFound, and Conflict for a version that answers users, or did.
        """
        async with self.moving:
            version = self._journal.get(ref)
            if version.state in (Lifecycle.LIVE, Lifecycle.RETIRED):
                raise Conflict(
                    f"{ref} is {version.state} and cannot be discarded; `umbel rollback` changes what is live"
                )
            if version.state is Lifecycle.REJECTED:
                await self.publish(faults.REJECT)  # the router may have missed it the first time
                return version.report
            reasons = version.report.verdict.reasons if version.report.verdict else ()
            verdict = Verdict(accepted=False, reasons=(reason, *reasons))
            report = version.report.model_copy(update={"state": Lifecycle.REJECTED, "verdict": verdict})
            reach(Point.REJECT_BEGUN)
            self._journal.move(ref, report)
            reach(Point.REJECT_JOURNALLED)
            await self.publish(faults.REJECT)
            logger.info("adapter.rejected ref=%s %s", ref, reason)
            self._retire(ref)
            return report

    def is_retiring(self, ref: AdapterRef) -> bool:
        """True while a version is being drained and unloaded, and its files are removed."""
        return _retirement(ref) in self._background

    def _retire(self, ref: AdapterRef) -> None:
        self._background.start(_retirement(ref), self._loading.retire(ref))


def _retirement(ref: AdapterRef) -> str:
    return f"retire {ref}"
