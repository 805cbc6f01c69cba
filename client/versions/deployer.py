"""`Deployer`: move adapter versions through their life: received, judged, promoted, rolled back, discarded.

Users are answered by the version that the alias `live` points to. Only `Switch` changes that; everything else happens
beside the users' requests.
"""

import logging
import shutil

from client.disk import require_room
from client.held_base import HeldBase
from client.journal import Journal, Version
from client.keys import SiteKeys
from client.versions.background import Background
from client.versions.judging import Evaluator, Evidence, Judging
from client.versions.loading import Loading
from client.versions.served import Served
from client.versions.switch import Switch
from client.versions.version_files import directory, to_load, validate
from client.versions.watch import Watch
from serving.supervisor import Supervisor
from umbel import faults, peft_dir
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.errors import AdapterError, Conflict, EngineError
from umbel.faults import Point, reach
from umbel.messages import Restored, ShadowReport
from umbel.site.config import SiteConfig

logger = logging.getLogger(__name__)


class Deployer:
    """The operations on versions of one adapter that the control API offers; the journal remembers their states.

    One version from its arrival to its roll-back:

        deployer.resume()                                     # once, before the engine is started
        deployer.receive(manifest, blob)                      # → candidate; it is judged in the background
        deployer.report(ref)                                  # → probing … judged, with the verdict
        await deployer.promote(ref)                           # → live
        await deployer.roll_back(instead_of=ref)              # → what answered before
    """

    def __init__(
        self,
        adapter: str,
        *,
        config: SiteConfig,
        journal: Journal,
        served: Served,
        supervisor: Supervisor,
        loading: Loading,
        background: Background,
        jobs: Evaluator,
        base: HeldBase,
        shapes: peft_dir.Shapes,
        keys: SiteKeys,
    ) -> None:
        self._adapter = adapter
        self._config = config
        self._journal = journal
        self._base = base
        self._shapes = shapes
        self._keys = keys
        self._background = background
        policy = config.policy(adapter)
        self._switch = Switch(journal, supervisor, loading, background)
        self._watch = Watch(policy, journal, supervisor, self._switch)
        evidence = Evidence(config, policy, journal, served, jobs)
        self._judging = Judging(policy, journal, supervisor, loading, evidence, self._watch, self._switch)

    def resume(self) -> None:
        """Continue after a restart: judge versions without a verdict, and guard those that were promoted lately."""
        unjudged = (Lifecycle.CANDIDATE, Lifecycle.PROBING, Lifecycle.WATCHING)
        for version in self._journal.versions(*unjudged, adapter=self._adapter):
            self._judge(version.ref)
        for promotion in self._journal.windows.open():
            if promotion.ref.name == self._adapter:
                self._background.start(f"guard {promotion.ref}", self._watch.guard(promotion))

    def receive(self, manifest: AdapterManifest, blob: bytes, signature: str = "") -> ShadowReport:
        """Validate and store a version, then judge it in the background. The same version again: return its report.

        Raises AdapterError, BaseMismatch, Conflict or NoRoom before anything is stored.
        """
        self._keys.require(manifest, signature)
        ref = manifest.ref
        known = self._journal.find(ref)
        again = known is not None and known.manifest.digest == manifest.digest
        if known is not None and again and not self._is_gone(known):
            return known.report
        validate(self._config, self._base, self._shapes, self._adapter, manifest, blob)
        require_room(self._config.site.state_dir, len(blob), str(ref))
        stored, weights = to_load(self._config, manifest, blob)
        report = ShadowReport(ref=str(ref), state=Lifecycle.CANDIDATE)
        if known is None or again:
            shutil.rmtree(directory(self._config, ref), ignore_errors=True)  # files that a crash left unrecorded
            peft_dir.write(directory(self._config, ref), weights, stored, base=str(self._config.model.path))
        if known is not None and again:  # it was live here before, and only lacked its files
            return known.report
        reach(Point.RECEIVE_WRITTEN)
        self._journal.add(manifest, report)
        reach(Point.RECEIVE_JOURNALLED)
        logger.info("adapter.candidate ref=%s digest=%s", ref, manifest.digest[:12])
        self._judge(ref)
        return report

    def report(self, ref: AdapterRef, nonce: str = "") -> ShadowReport:
        """Return a version's state, measurements and verdict, signed for the question `nonce`; raises NotFound."""
        version = self._journal.get(ref)
        return self._keys.sign_verdict(version.manifest, version.report, nonce)

    async def promote(self, ref: AdapterRef, *, forced: bool = False) -> ShadowReport:
        """Make a judged shadow answer the users. Promoting the live version again is no change.

        Raises NotFound, and Conflict where the site's own verdict is against it, unless the site's operator has
        `forced` it.
        """
        async with self._switch.moving:
            version = self._journal.get(ref)
            if version.state is Lifecycle.LIVE:
                await self._switch.publish(faults.PROMOTE)
                return version.report
            if version.state is not Lifecycle.JUDGED:
                raise Conflict(f"{ref} is {version.state}; only a judged shadow can be promoted")
            if not forced:
                _require_in_favour(version)
            event = "promoted" if _is_in_favour(version) else "promoted by the operator"
            return await self._promote(version, event)

    async def roll_back(self, instead_of: AdapterRef | None = None, *, forced: bool = False) -> str | None:
        """Make what answered before answer the users again; see `Switch.roll_back`. Raises NotFound, Conflict."""
        return await self._switch.roll_back(self._adapter, instead_of, forced=forced)

    async def restore(self, ref: AdapterRef | None) -> Restored:
        """Let users be answered by the federation's version, None for the base. Doing it twice is no change.

        A version that was live here is live again at once, a shadow once this site is in favour of it. Raises Conflict
        for a version that this site has rejected or rolled back from.
        """
        if ref is not None and ref.name != self._adapter:
            raise AdapterError(f"{ref} is no version of {self._adapter}")
        async with self._switch.moving:
            live = self._journal.alias(self._adapter, "live")
            if ref is None:
                await self._restore_base(live)
                return Restored(live=None, state=None)
            version = self._journal.find(ref)
            state = version.state if version is not None else None
            if version is None or state is Lifecycle.LIVE:
                await self._switch.publish(faults.ROLL_BACK)
            elif ref in self._journal.refused(self._adapter, limit=-1):
                raise Conflict(f"{ref} was rejected here, or this site went back from it; {live or 'the base'} stays")
            elif state is Lifecycle.RETIRED:
                if self._switch.is_retiring(ref):
                    raise EngineError(f"{ref} is just being unloaded; ask again")
                state = None
                if not self._is_gone(version):
                    event = "live again, as in the federation"
                    state = (await self._switch.make_live(version, event, faults.ROLL_BACK)).state
            elif state is Lifecycle.JUDGED:
                _require_in_favour(version)
                state = (await self._promote(version, "promoted")).state
            return Restored(live=str(ref) if state is Lifecycle.LIVE else str(live) if live else None, state=state)

    async def discard(self, ref: AdapterRef, reason: str = "discarded by the federation") -> ShadowReport:
        """Unload a shadow and never use it again; see `Switch.discard`. Raises NotFound, Conflict."""
        return await self._switch.discard(ref, reason)

    def _judge(self, ref: AdapterRef) -> None:
        self._background.start(f"judge {ref}", self._judging.judge(ref))

    async def _promote(self, version: Version, event: str) -> ShadowReport:
        """Make a version live, and guard it afterwards where the site has a roll-back window."""
        ref = version.ref
        promotion = await self._watch.before(ref, self._journal.alias(ref.name, "live"))
        if promotion is not None:
            self._journal.windows.begin(promotion)
        report = await self._switch.make_live(version, event, faults.PROMOTE)
        if promotion is not None:
            self._background.start(f"guard {ref}", self._watch.guard(promotion))
        return report

    async def _restore_base(self, live: AdapterRef | None) -> None:
        if live is None:
            await self._switch.publish(faults.ROLL_BACK)
        else:
            await self._switch.make_base_live(live, "the base answers again, as in the federation")
            logger.info("adapter.restored ref=base instead_of=%s", live)

    def _is_gone(self, version: Version) -> bool:
        """True for a version that was live here and whose files were removed since."""
        files = directory(self._config, version.ref) / peft_dir.WEIGHTS
        retiring = self._switch.is_retiring(version.ref)
        return version.state is Lifecycle.RETIRED and not retiring and not files.is_file()


def _is_in_favour(version: Version) -> bool:
    return version.report.verdict is not None and version.report.verdict.accepted


def _require_in_favour(version: Version) -> None:
    """Raise Conflict unless this site judged for the version: a rollout never overrules a site's own verdict."""
    verdict = version.report.verdict
    if not _is_in_favour(version):
        why = f"{verdict.decision}: {'; '.join(verdict.reasons)}" if verdict else "not given yet"
        raise Conflict(
            f"{version.ref}: this site's own verdict is {why}; only its operator promotes it all the same, while it is "
            f"a shadow, with `umbel promote SITE_FILE {version.ref}`"
        )
