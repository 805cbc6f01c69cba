"""The life of an adapter version at a site: validate → load → warm → probe → promote → drain → retire, or discard.

Users are answered by what the alias `live` means, and that changes in one place: `promote` and `roll_back`, each one
journal transaction, one atomic file change, one assignment in the router. Everything else happens beside them.
"""

import asyncio
import logging
import shutil
from functools import partial
from pathlib import Path

from client.jobs import Jobs
from client.journal import LIVE_AGAIN, ROLLED_BACK, TAKEN_BACK, Journal, Version
from client.keys import SiteKeys
from client.personal import served
from client.versions.judging import Evidence, Judging
from client.versions.loading import Loading
from client.versions.recovery import forget_damaged, sweep
from client.versions.version_files import directory, validate
from client.versions.watch import Watch
from serving.aliases import AliasTable
from serving.supervisor import Supervisor
from umbel import faults, peft_dir
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.base import BaseFingerprint
from umbel.config import SiteConfig
from umbel.errors import Conflict, EngineError, NotFound
from umbel.faults import Point, reach
from umbel.messages import Restored, ShadowReport, ShadowState, Verdict

logger = logging.getLogger(__name__)


class Deployer:
    """Moves versions through their life; the journal remembers where each one stands."""

    def __init__(
        self,
        config: SiteConfig,
        journal: Journal,
        supervisor: Supervisor,
        jobs: Jobs,
        fingerprint: BaseFingerprint,
        shapes: peft_dir.Shapes,
        keys: SiteKeys,
    ) -> None:
        self._config = config
        self._journal = journal
        self._supervisor = supervisor
        self._evidence = Evidence(config, journal, jobs, partial(directory, config))
        self._watch = Watch(config.shadow, journal, supervisor)
        self.loading = Loading(config, journal, supervisor)
        self._judging = Judging(
            config.shadow, journal, supervisor, self.loading, self._evidence, self._watch, self.discard
        )
        self._fingerprint = fingerprint
        self._shapes = shapes
        self._keys = keys
        self._moving = asyncio.Lock()
        self._background: dict[str, asyncio.Task[None]] = {}
        self.recovered: list[str] = []
        """What was found damaged, half-made or left over since this daemon began, in words."""

    def resume(self) -> None:
        """Take up what a crash cut off: damaged and half-made things go, versions that were being probed are judged."""
        self._forget_damaged()
        self.recovered += sweep(self._config, self._journal)
        reach(Point.SWEPT)
        for version in self._journal.versions(Lifecycle.CANDIDATE, Lifecycle.SHADOW):
            if version.report.state is not ShadowState.JUDGED:
                self._spawn(f"judge {version.ref}", self._judging.judge(version.ref))
        for promotion in self._journal.windows():
            self._spawn(f"guard {promotion.ref}", self._watch.guard(promotion, self.roll_back))

    def receive(self, name: str, manifest: AdapterManifest, blob: bytes, signature: str = "") -> ShadowReport:
        """Validate and store a version, then judge it in the background. The same version again: how it stands.

        Raises AdapterError, BaseMismatch or Conflict before anything is stored.
        """
        self._keys.require(manifest, signature)
        ref = manifest.ref
        known = self._journal.find(ref)
        again = known is not None and known.manifest.digest == manifest.digest
        if known is not None and again and not self._is_gone(known):
            return known.report
        validate(self._config, self._fingerprint, self._shapes, name, manifest, blob)
        stored, weights = served(self._config, manifest, blob)
        report = ShadowReport(ref=str(ref), state=ShadowState.VALIDATING)
        if known is None or again:
            shutil.rmtree(directory(self._config, ref), ignore_errors=True)  # files that a crash left unrecorded
            peft_dir.write(directory(self._config, ref), weights, stored, base=str(self._config.model.path))
        if known is not None and again:  # it was judged here, and was live: it only lacked its files
            return known.report
        reach(Point.RECEIVE_WRITTEN)
        self._journal.add(manifest, report)
        reach(Point.RECEIVE_JOURNALLED)
        logger.info("adapter.candidate ref=%s digest=%s", ref, manifest.digest[:12])
        self._spawn(f"judge {ref}", self._judging.judge(ref))
        return report

    def report(self, ref: AdapterRef) -> ShadowReport:
        """How a version stands here; raises NotFound."""
        return self._journal.get(ref).report

    async def promote(self, ref: AdapterRef, *, forced: bool = False) -> ShadowReport:
        """Make a judged shadow answer the users. Promoting the live version again is no change.

        Raises Conflict where the site's own verdict is against it, unless the site's operator has `forced` it.
        """
        async with self._moving:
            version = self._journal.get(ref)
            if version.state is Lifecycle.LIVE:
                await self.loading.publish_table(faults.PROMOTE)  # the router may have missed it the first time
                return version.report
            if version.state is not Lifecycle.SHADOW or version.report.state is not ShadowState.JUDGED:
                raise Conflict(
                    f"{ref} is {version.state} ({version.report.state}); only a judged shadow can be promoted"
                )
            if not forced:
                _require_in_favour(version)
            event = "promoted" if _is_in_favour(version) else "promoted by the operator"
            return await self._promote(version, event)

    async def roll_back(self, name: str, instead_of: AdapterRef | None = None, *, forced: bool = False) -> str | None:
        """Make what answered before answer the users again; what that is: a version, or None for the base.

        With `instead_of`: only while that version answers, so that asking twice goes back once. Raises Conflict for
        what the site went back from by itself, unless its operator has `forced` it.
        """
        self._config.require_adapter(name)
        async with self._moving:
            previous, live = self._journal.alias(name, "previous"), self._journal.alias(name, "live")
            if instead_of is not None and instead_of != live:
                await self.loading.publish_table(faults.ROLL_BACK)  # the router may have missed it the first time
                return str(live) if live else None
            if previous is not None:
                undone = previous in self._journal.refused(name, limit=-1)  # the second of two says nothing against
                left, version = "" if undone else ROLLED_BACK, self._journal.get(previous)
                if version.report.taken_back and not forced:
                    raise Conflict(
                        f"{previous} answered before {live or 'the base'}, and this site went back from it by itself: "
                        f"{version.report.taken_back}; `umbel rollback SITE_FILE {name} --force` does it all the same"
                    )
                return (await self._make_live(version, LIVE_AGAIN, faults.ROLL_BACK, left)).ref
            if live is None:
                raise NotFound(f"{name}: the base answers, and no version ever did; there is nothing to roll back to")
            self._make_base_live(live, TAKEN_BACK)
            await self.loading.publish_table(faults.ROLL_BACK)
            logger.info("adapter.rolled_back ref=base instead_of=%s", live)
            return None

    async def restore(self, name: str, ref: AdapterRef | None) -> Restored:
        """Let users be answered by what the federation says, None for the base. Doing it twice is no change.

        A version that was live here is live again at once, a shadow once this site is in favour of it. Raises Conflict
        for one that this site has rejected, or went back from by itself.
        """
        self._config.require_adapter(name)
        async with self._moving:
            live = self._journal.alias(name, "live")
            if ref is None:
                await self._restore_base(name, live)
                return Restored(live=None, state=None)
            version = self._journal.find(ref)
            state = version.report.state if version is not None else None
            if version is None or version.state is Lifecycle.LIVE:
                await self.loading.publish_table(faults.ROLL_BACK)  # the router may have missed it the first time
            elif ref in self._journal.refused(name, limit=-1):
                raise Conflict(f"{ref} was rejected here, or this site went back from it; {live or 'the base'} stays")
            elif version.state is Lifecycle.RETIRED:
                if f"retire {ref}" in self._background:
                    raise EngineError(f"{ref} is just being unloaded; ask again")
                state = None
                if not self._is_gone(version):
                    state = (await self._make_live(version, "live again, as in the federation", faults.ROLL_BACK)).state
            elif state is ShadowState.JUDGED:
                _require_in_favour(version)
                state = (await self._promote(version, "promoted")).state
            return Restored(live=str(ref) if state is ShadowState.LIVE else str(live) if live else None, state=state)

    async def discard(self, ref: AdapterRef, reason: str = "discarded by the federation") -> ShadowReport:
        """Unload a shadow and never use it again. Discarding it twice is no change."""
        async with self._moving:
            version = self._journal.get(ref)
            if version.state in (Lifecycle.LIVE, Lifecycle.RETIRED):
                raise Conflict(
                    f"{ref} is {version.state} and cannot be discarded; `umbel rollback` changes what is live"
                )
            return await self._reject(version, reason)

    def what_to_serve(self) -> tuple[AliasTable, dict[AdapterRef, Path]]:
        """The alias table and what it needs loaded, without what is damaged: what is left always answers."""
        self._forget_damaged()
        return self.loading.table(), self.loading.serving()

    async def close(self) -> None:
        for task in self._background.values():
            task.cancel()
        await asyncio.gather(*self._background.values(), return_exceptions=True)

    def _forget_damaged(self) -> None:
        forgotten = forget_damaged(self._config, self._journal)
        if forgotten:
            self._evidence.forget()
        self.recovered += forgotten

    async def _promote(self, version: Version, event: str) -> ShadowReport:
        """Make a version live, and have what users get of it compared with before where the site wants that."""
        ref = version.ref
        promotion = await self._watch.before(ref, self._journal.alias(ref.name, "live"))
        if promotion is not None:
            self._journal.begin_window(promotion)
        report = await self._make_live(version, event, faults.PROMOTE)
        if promotion is not None:
            self._spawn(f"guard {ref}", self._watch.guard(promotion, self.roll_back))
        return report

    async def _restore_base(self, name: str, live: AdapterRef | None) -> None:
        dropped = self._journal.alias(name, "previous")
        if live is not None:
            self._make_base_live(live, "the base answers again, as in the federation")
            logger.info("adapter.restored ref=base instead_of=%s", live)
            if dropped is not None:
                self._spawn(f"retire {dropped}", self.loading.retire(dropped))
        await self.loading.publish_table(faults.ROLL_BACK)

    def _make_base_live(self, live: AdapterRef, event: str) -> None:
        reach(Point.ROLL_BACK_BEGUN)
        self._journal.make_base_live(live, _retired(self._journal.get(live)), event)
        reach(Point.ROLL_BACK_JOURNALLED)

    async def _make_live(self, version: Version, event: str, move: faults.Move, left: str = "") -> ShadowReport:
        ref, engine = version.ref, self._supervisor.engine
        if engine is not None:
            await self.loading.ensure_loaded(engine, ref)
            await self.loading.prefill(engine, ref)
        old = self._journal.alias(ref.name, "live")
        dropped = self._journal.alias(ref.name, "previous")
        report = version.report.model_copy(update={"state": ShadowState.LIVE, "taken_back": ""})
        old_report = _retired(self._journal.get(old)) if old else None
        reach(move.begun)
        self._journal.make_live(ref, report, old_report, event, left)
        reach(move.journalled)
        await self.loading.publish_table(move)
        logger.info("adapter.%s ref=%s instead_of=%s", event.replace(" ", "_"), ref, old or "base")
        if dropped is not None and dropped != ref:
            self._spawn(f"retire {dropped}", self.loading.retire(dropped))
        return report

    async def _reject(self, version: Version, reason: str) -> ShadowReport:
        if version.state is Lifecycle.REJECTED:
            return version.report
        ref = version.ref
        verdict = Verdict(
            accepted=False, reasons=(reason, *(version.report.verdict.reasons if version.report.verdict else ()))
        )
        report = version.report.model_copy(update={"state": ShadowState.REJECTED, "verdict": verdict})
        reach(Point.REJECT_BEGUN)
        self._journal.move(ref, Lifecycle.REJECTED, report)
        reach(Point.REJECT_JOURNALLED)
        await self.loading.publish_table(faults.REJECT)
        logger.info("adapter.rejected ref=%s %s", ref, reason)
        self._spawn(f"retire {ref}", self.loading.retire(ref))
        return report

    def _is_gone(self, version: Version) -> bool:
        """Whether it was live here, and its files were removed since."""
        files = directory(self._config, version.ref) / peft_dir.WEIGHTS
        retiring = f"retire {version.ref}" in self._background
        return version.state is Lifecycle.RETIRED and not retiring and not files.is_file()

    def _spawn(self, name: str, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)  # type: ignore[arg-type]
        self._background[name] = task
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.pop(task.get_name(), None)
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s failed", task.get_name(), exc_info=task.exception())


def _is_in_favour(version: Version) -> bool:
    return version.report.verdict is not None and version.report.verdict.accepted


def _require_in_favour(version: Version) -> None:
    """A site never gets by a rollout what it judged against."""
    verdict = version.report.verdict
    if not _is_in_favour(version):
        why = f"{verdict.decision}: {'; '.join(verdict.reasons)}" if verdict else "not given yet"
        raise Conflict(
            f"{version.ref}: this site's own verdict is {why}; only its operator promotes it all the same, while it is "
            f"a shadow, with `umbel promote SITE_FILE {version.ref}`"
        )


def _retired(version: Version) -> ShadowReport:
    return version.report.model_copy(update={"state": ShadowState.RETIRED})
