"""The life of an adapter version at a site: validate → load → warm → probe → promote → drain → retire, or discard.

Users are answered by what the alias `live` means, and that changes in one place: `promote` and `roll_back`, each one
journal transaction, one atomic file change, one assignment in the router. Everything else happens beside them.
"""

import asyncio
import logging
import shutil
import time
from pathlib import Path

import httpx

from client.jobs import Jobs
from client.journal import Journal, Version
from client.personal import served
from client.recovery import directory, forget_damaged, sweep, verify
from client.verdict import Probe, judge
from serving.aliases import AliasTable
from serving.engine import Engine
from serving.scores import Scores
from serving.supervisor import Supervisor
from umbel import faults, peft_dir, signing
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.base import BaseFingerprint
from umbel.config import SiteConfig
from umbel.errors import AdapterError, BaseMismatch, Conflict, EngineError, EngineGone, NotFound, TrainingError
from umbel.faults import Point, reach
from umbel.messages import ShadowReport, ShadowState, Verdict

DRAIN_POLL_S = 0.2
NOTICE_S = 2.0

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
    ) -> None:
        self._config = config
        self._journal = journal
        self._supervisor = supervisor
        self._jobs = jobs
        self._fingerprint = fingerprint
        self._shapes = shapes
        self._trusted = signing.read_public(config.site.trusted_key) if config.site.trusted_key else None
        self._known: dict[tuple[AdapterRef | None, str | None], Scores] = {}
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
                self._spawn(f"judge {version.ref}", self._judge(version.ref))

    def receive(self, name: str, manifest: AdapterManifest, blob: bytes, signature: str = "") -> ShadowReport:
        """Validate and store a version, then judge it in the background. The same version again: how it stands.

        Raises AdapterError, BaseMismatch or Conflict before anything is stored.
        """
        if self._trusted is not None:
            signing.verify(self._trusted, manifest, signature)
        ref = manifest.ref
        known = self._journal.find(ref)
        if known is not None and known.manifest.digest == manifest.digest:
            return known.report
        self._validate(name, manifest, blob)
        stored, weights = served(self._config, manifest, blob)
        report = ShadowReport(ref=str(ref), state=ShadowState.VALIDATING)
        if known is None:
            shutil.rmtree(directory(self._config, ref), ignore_errors=True)  # files that a crash left unrecorded
            peft_dir.write(directory(self._config, ref), weights, stored, base=str(self._config.model.path))
        reach(Point.RECEIVE_WRITTEN)
        self._journal.add(manifest, report)
        reach(Point.RECEIVE_JOURNALLED)
        logger.info("adapter.candidate ref=%s digest=%s", ref, manifest.digest[:12])
        self._spawn(f"judge {ref}", self._judge(ref))
        return report

    def report(self, ref: AdapterRef) -> ShadowReport:
        """How a version stands here; raises NotFound."""
        return self._journal.get(ref).report

    async def promote(self, ref: AdapterRef) -> ShadowReport:
        """Make a judged shadow answer the users. Promoting the live version again is no change."""
        async with self._moving:
            version = self._journal.get(ref)
            if version.state is Lifecycle.LIVE:
                await self._publish_table(faults.PROMOTE)  # the router may have missed it the first time
                return version.report
            if version.state is not Lifecycle.SHADOW or version.report.state is not ShadowState.JUDGED:
                raise Conflict(
                    f"{ref} is {version.state} ({version.report.state}); only a judged shadow can be promoted"
                )
            return await self._make_live(version, "promoted", faults.PROMOTE)

    async def roll_back(self, name: str) -> str | None:
        """Make what answered before answer the users again; what that is: a version, or None for the base."""
        names = [section.name for section in self._config.adapter]
        if name not in names:
            raise NotFound(f"there is no adapter {name!r} here; there is {', '.join(names)}")
        async with self._moving:
            previous, live = self._journal.alias(name, "previous"), self._journal.alias(name, "live")
            if previous is not None:
                version = self._journal.get(previous)
                return (await self._make_live(version, "live again by roll-back", faults.ROLL_BACK)).ref
            if live is None:
                raise NotFound(f"{name}: the base answers, and no version ever did; there is nothing to roll back to")
            reach(Point.ROLL_BACK_BEGUN)
            self._journal.make_base_live(live, _retired(self._journal.get(live)))
            reach(Point.ROLL_BACK_JOURNALLED)
            await self._publish_table(faults.ROLL_BACK)
            logger.info("adapter.rolled_back ref=base instead_of=%s", live)
            return None

    async def discard(self, ref: AdapterRef, reason: str = "discarded by the federation") -> ShadowReport:
        """Unload a shadow and never use it again. Discarding it twice is no change."""
        async with self._moving:
            return await self._reject(self._journal.get(ref), reason)

    def table(self) -> AliasTable:
        """The alias table that the journal stands for."""
        adapters: dict[str, dict[str, str | None]] = {}
        for section in self._config.adapter:
            shadows = [v.ref for v in self._journal.versions(Lifecycle.SHADOW) if v.ref.name == section.name]
            aliases = {alias: self._journal.alias(section.name, alias) for alias in ("live", "previous")}
            aliases["shadow"] = shadows[-1] if shadows else None
            adapters[section.name] = {alias: str(ref) if ref else None for alias, ref in aliases.items()}
        served = [adapters[name][alias] for name in adapters for alias in ("live", "previous")]
        return AliasTable.model_validate(
            {
                "base": self._config.model.served_name,
                "adapters": adapters,
                "addressable": [ref for ref in served if ref],
            }
        )

    def serving(self) -> dict[AdapterRef, Path]:
        """The versions an engine must have from its start, their files checked against the journal."""
        refs = [AdapterRef.parse(text) for text in self.table().addressable]
        return {ref: verify(self._config, self._journal.get(ref)) for ref in refs}

    def what_to_serve(self) -> tuple[AliasTable, dict[AdapterRef, Path]]:
        """`table` and `serving`, after what is damaged was forgotten: what is left always answers."""
        self._forget_damaged()
        return self.table(), self.serving()

    async def close(self) -> None:
        for task in self._background.values():
            task.cancel()
        await asyncio.gather(*self._background.values(), return_exceptions=True)

    def _forget_damaged(self) -> None:
        forgotten = forget_damaged(self._config, self._journal)
        if forgotten:
            self._known.clear()
        self.recovered += forgotten

    def _validate(self, name: str, manifest: AdapterManifest, blob: bytes) -> None:
        if manifest.name != name or name not in {section.name for section in self._config.adapter}:
            raise AdapterError(f"{manifest.ref}: this site serves {', '.join(s.name for s in self._config.adapter)}")
        if manifest.base != self._fingerprint.digest:
            raise BaseMismatch(
                f"{manifest.ref} was trained on the base {manifest.base[:12]}…, this site holds "
                f"{self._fingerprint.digest[:12]}…; copy the same model directory to both"
            )
        if peft_dir.digest(blob) != manifest.digest:
            raise AdapterError(f"{manifest.ref}: its bytes are not those of its manifest; send it again")
        tensors = peft_dir.decode(blob)
        wrong = next((key for key, array in tensors.items() if str(array.dtype) != self._config.engine.dtype), None)
        if wrong is not None:
            raise AdapterError(
                f"{manifest.ref}: {wrong} is {tensors[wrong].dtype}, this site serves {self._config.engine.dtype}"
            )
        peft_dir.validate(tensors, self._shapes, rank=manifest.rank, max_rank=self._config.engine.max_lora_rank)

    async def _judge(self, ref: AdapterRef) -> None:
        """Load, warm and probe a candidate; whatever the engine does meanwhile, this ends with a verdict."""
        while True:
            engine = await self._supervisor.ready()
            try:
                return await self._load_and_probe(engine, ref)
            except EngineGone as gone:
                logger.warning("adapter.judge ref=%s interrupted: %s", ref, gone)
            except (AdapterError, EngineError, TrainingError) as error:
                await self.discard(ref, str(error))
                return None
            except httpx.HTTPError as error:
                await asyncio.sleep(NOTICE_S)  # a dead engine is noticed a moment after its connections break
                if self._supervisor.engine is engine:
                    await self.discard(ref, f"the engine does not answer: {error}")
                    return None
                logger.warning("adapter.judge ref=%s interrupted: %s", ref, error)

    async def _load_and_probe(self, engine: Engine, ref: AdapterRef) -> None:
        for older in self._journal.versions(Lifecycle.CANDIDATE, Lifecycle.SHADOW):
            if older.ref.name == ref.name and older.ref < ref:
                await self._supersede(older.ref, ref)
        began = time.monotonic()
        await self._ensure_loaded(engine, ref)
        loaded = time.monotonic()
        version = self._journal.get(ref)
        if version.state is Lifecycle.REJECTED:  # discarded while it was loading
            return await self._retire(ref)
        report = version.report.model_copy(update={"state": ShadowState.PROBING, "load_s": loaded - began})
        if version.state is Lifecycle.CANDIDATE:
            reach(Point.SHADOW_BEGUN)
            self._journal.move(ref, Lifecycle.SHADOW, report)
            reach(Point.SHADOW_JOURNALLED)
            await self._publish_table(faults.SHADOW)
        probe = await self._probe(ref)
        verdict = await asyncio.to_thread(judge, probe, self._config.shadow)
        seconds = time.monotonic() - loaded
        judged = {"state": ShadowState.JUDGED, "probe": probe.sums, "verdict": verdict, "probe_s": seconds}
        reach(Point.JUDGE_DECIDED)
        if self._journal.get(ref).state is Lifecycle.SHADOW:  # it may have been discarded meanwhile
            self._journal.report(ref, report.model_copy(update=judged))
            reach(Point.JUDGE_JOURNALLED)
            logger.info("adapter.judged ref=%s decision=%s %s", ref, verdict.decision, "; ".join(verdict.reasons))

        return None

    async def _supersede(self, older: AdapterRef, newer: AdapterRef) -> None:
        async with self._moving:
            version = self._journal.get(older)
            if version.state in (Lifecycle.CANDIDATE, Lifecycle.SHADOW):  # it may have been promoted just now
                await self._reject(version, f"superseded by {newer}")

    async def _ensure_loaded(self, engine: Engine, ref: AdapterRef) -> None:
        if ref not in self._supervisor.loaded:
            folder = verify(self._config, self._journal.get(ref))  # what SGLang is about to read was validated
            reach(Point.LOAD_BEGUN)
            await engine.client.load(ref, folder)
            await engine.client.warm(ref)
            self._supervisor.loaded.add(ref)
            reach(Point.LOAD_DONE)

    async def _probe(self, ref: AdapterRef) -> Probe:
        """Base, live and shadow on the held-out examples; on each guard the shadow and what answers users now."""
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
            return await self._probe(ref)
        self._known = {asked: scores for asked, scores in self._known.items() if asked[0] in subjects.values()}
        return probe

    async def _scores(self, subject: AdapterRef | None, guard: str | None = None) -> Scores:
        """What is known already is not asked again."""
        if (subject, guard) not in self._known:
            folder = directory(self._config, subject) if subject else None
            self._known[subject, guard] = await self._jobs.evaluate(folder, guard)
        return self._known[subject, guard]

    async def _make_live(self, version: Version, event: str, move: faults.Move) -> ShadowReport:
        ref, engine = version.ref, self._supervisor.engine
        if engine is not None:
            await self._ensure_loaded(engine, ref)
        old = self._journal.alias(ref.name, "live")
        dropped = self._journal.alias(ref.name, "previous")
        report = version.report.model_copy(update={"state": ShadowState.LIVE})
        old_report = _retired(self._journal.get(old)) if old else None
        reach(move.begun)
        self._journal.make_live(ref, report, old_report, event)
        reach(move.journalled)
        await self._publish_table(move)
        logger.info("adapter.%s ref=%s instead_of=%s", event.replace(" ", "_"), ref, old or "base")
        if dropped is not None and dropped != ref:
            self._spawn(f"retire {dropped}", self._retire(dropped))
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
        await self._publish_table(faults.REJECT)
        logger.info("adapter.rejected ref=%s %s", ref, reason)
        self._spawn(f"retire {ref}", self._retire(ref))
        return report

    async def _publish_table(self, move: faults.Move) -> None:
        self.table().write(self._config.site.state_dir / "aliases.json")
        reach(move.written)
        engine = self._supervisor.engine
        if engine is not None:  # else the next one reads the file at its start
            try:
                await engine.client.reload_aliases()
            except httpx.HTTPError:
                logger.warning("the engine went away during an alias change; the next one starts with the new table")
        reach(move.told)

    async def _retire(self, ref: AdapterRef) -> None:
        """Unload a version that nobody can ask for any more, once its last request has ended; then remove its files."""
        engine = self._supervisor.engine
        reach(Point.RETIRE_BEGUN)
        try:
            while engine is not None and (await engine.client.in_flight()).get(str(ref)):
                await asyncio.sleep(DRAIN_POLL_S)
            if engine is not None and ref in self._supervisor.loaded:
                await engine.client.unload(ref)
        except httpx.HTTPError:
            pass  # the engine is gone, and with it what it had loaded
        self._supervisor.loaded.discard(ref)
        reach(Point.RETIRE_UNLOADED)
        # SGLang would load a forgotten adapter again from its old path: there is none.
        shutil.rmtree(directory(self._config, ref), ignore_errors=True)
        reach(Point.RETIRE_REMOVED)
        logger.info("adapter.unloaded ref=%s", ref)

    def _spawn(self, name: str, work: object) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)  # type: ignore[arg-type]
        self._background[name] = task
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.pop(task.get_name(), None)
        if not task.cancelled() and task.exception() is not None:
            logger.error("%s failed", task.get_name(), exc_info=task.exception())


def _retired(version: Version) -> ShadowReport:
    return version.report.model_copy(update={"state": ShadowState.RETIRED})
