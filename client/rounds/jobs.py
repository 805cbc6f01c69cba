"""`Jobs`: train and evaluate an adapter at a site. Rounds are journalled, and idempotent by their key."""

import asyncio
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from client.data.fresh import FreshData
from client.data.prepare import Prepared
from client.disk import require_room
from client.held_base import HeldBase
from client.keys import SiteKeys
from client.rounds.attempts import MAX_ATTEMPTS, Attempts
from client.rounds.folder import CHECKPOINTS, JOINED, PARENT, RoundFolder
from client.rounds.following import Following, counts
from client.rounds.journal import RoundJournal, lineage_of
from client.rounds.measured import Measured
from client.rounds.measured_round import Trained
from client.rounds.personal import PersonalPart
from serving.scores import Scores
from serving.supervisor import Supervisor
from serving.trainer_socket import CoTrainerClient, CoTrainerStatus, EvaluateJob, TrainJob
from umbel import peft_dir
from umbel.adapter import Personal
from umbel.errors import AdapterError, EngineGone, NoRoom, NotFound, TrainingError
from umbel.faults import Point, reach
from umbel.messages import JobState, RoundOrder, RoundReport, Submit

KEPT_ROUNDS = 3
"""Number of finished rounds whose files stay; the centre has long fetched older ones."""
NO_ROOM_S = 60.0
"""Seconds before a round goes on that met a full disk."""

PersonalParts = Callable[[str, Personal], PersonalPart]
"""Makes the adapter's personal part, by its lineage and kind."""

logger = logging.getLogger(__name__)


class Jobs:
    """The rounds of one adapter, one after the other, and its evaluations, which wait for none of them.

    `run` works through the rounds; all other methods only add to them or read them. The co-trainer gives each adapter's
    jobs their turns, a round's by `share`.
    """

    def __init__(
        self,
        *,
        adapter: str,
        rounds: RoundJournal,
        supervisor: Supervisor,
        cotrainer: CoTrainerClient,
        fresh: FreshData,
        base: HeldBase,
        shapes: peft_dir.Shapes,
        max_rank: int,
        personal: PersonalParts,
        measured: Callable[[Following], Measured],
        directory: Path,
        keys: SiteKeys,
        share: Callable[[], float],
        checkpoint_s: float,
        checkpoint_bytes: int,
    ) -> None:
        self.adapter = adapter
        self._rounds = rounds
        self._supervisor = supervisor
        self._cotrainer = cotrainer
        self._fresh, self.data = fresh, fresh.data
        self._following = Following(supervisor, cotrainer)
        self.measured = measured(self._following)
        self._base = base
        self._shapes = shapes
        self._max_rank = max_rank
        self._personal = personal
        self._directory = directory
        self._keys = keys
        self._share = share
        self._checkpoint_s, self._checkpoint_bytes = checkpoint_s, checkpoint_bytes
        self._submitted = asyncio.Event()
        self._progress: dict[str, RoundReport] = {}
        self._serial = 0

    def submit(self, order: RoundOrder, parent: bytes, signature: str = "") -> RoundReport:
        """Queue a round, or find it again; return its report. Raises AdapterError, BaseMismatch, Conflict, NoRoom."""
        self._keys.require(Submit(adapter=self.adapter, order=order), signature)
        self._base.require(f"round {order.key} is for", order.base, order.kin)
        if peft_dir.digest(parent) != order.parent:
            raise AdapterError(f"round {order.key}: the parent is not the adapter that was announced; send it again")
        tensors = peft_dir.decode(parent)
        peft_dir.validate(tensors, self._shapes, rank=order.plan.rank, max_rank=self._max_rank)
        known = self._rounds.find(order)
        if known is not None:
            return self._progress.get(order.key, known)
        room = 5 * len(parent) + CHECKPOINTS * self._checkpoint_bytes  # all of its files
        require_room(self._directory.parent.parent, room, f"round {order.key}")
        files = {PARENT: parent}
        if order.plan.personal is not None:
            part = self._personal(lineage_of(order), order.plan.personal)
            files[JOINED] = peft_dir.encode(part.begin(tensors, order.plan.seed))
        self._folder(order.key).begin(files)
        reach(Point.SUBMIT_WRITTEN)
        report = self._rounds.add(order)
        reach(Point.SUBMIT_JOURNALLED)
        for old in self._rounds.finished()[KEPT_ROUNDS:]:
            shutil.rmtree(self._folder(old).path, ignore_errors=True)
        self._submitted.set()
        return report

    def report(self, key: str) -> RoundReport:
        """Return how a round stands; raise NotFound."""
        return self._progress.get(key) or self._rounds.get(key)[1]

    @property
    def running(self) -> RoundReport | None:
        """The report of the round that is trained now; None where none is."""
        return next(iter(self._progress.values()), None)

    def update(self, key: str) -> bytes:
        """Return the trained adapter of a finished round as safetensors bytes.

        Raises TrainingError while the round is not done, NotFound once its files are gone.
        """
        report = self.report(key)
        if report.state is not JobState.DONE:
            raise TrainingError(f"round {key} is {report.state}{': ' + report.error if report.error else ''}")
        file = self._folder(key).update
        if not file.exists():
            raise NotFound(f"the update of round {key} is not kept any more; submit the round again under a new key")
        return file.read_bytes()

    async def supersede(self, order: RoundOrder) -> None:
        """Stop open earlier rounds of the same registry: a centre that starts a new round does not wait for them."""
        for older in self._rounds.open():
            if older.round < order.round and lineage_of(older) == lineage_of(order):
                await self.cancel(older.key, f"superseded by round {order.round}")

    async def cancel(self, key: str, reason: str = "cancelled") -> RoundReport:
        """Stop a round, and return its report; one that has ended stays as it is. Raises NotFound."""
        report = self.report(key)
        if not report.state.final:
            report = report.model_copy(update={"state": JobState.CANCELLED, "error": reason})
            self._finish(report)
            job = self.measured.stop(self._id(key))
            try:
                if self._supervisor.engine is not None:
                    await self._cotrainer.cancel(job)
            finally:
                self._folder(key).forget_checkpoint()
        return report

    async def run(self) -> None:
        """Work through the queue until cancelled; a round that a crash cut off goes on."""
        for key in self._rounds.finished():
            self._settle(key)
        while True:
            self._submitted.clear()
            try:
                for order in self._rounds.open():
                    await self._train(order)
                await self._submitted.wait()
            except (NoRoom, OSError) as error:  # users are answered meanwhile
                logger.error("round.delayed %s; again in %.0f s", error, NO_ROOM_S)
                await asyncio.sleep(NO_ROOM_S)

    async def evaluate(self, data: Prepared, adapter: Path | None, guard: str | None = None) -> Scores:
        """Score an adapter's folder (None: the base) on each held-out example of `data`, or on each of a guard.

        Raises EngineGone when the engine dies meanwhile, TrainingError when it stops for another reason.
        """
        await self._supervisor.ready()
        self._serial += 1
        name = f"evaluate-{self._serial}"
        scores = self._directory / f"{name}.npy"
        self._directory.mkdir(parents=True, exist_ok=True)
        asked = data.guards[guard] if guard else data.eval
        weights = str(adapter / peft_dir.WEIGHTS) if adapter else None
        job = EvaluateJob(id=self._id(name), adapter=weights, data=str(asked), output=str(scores))
        try:
            status = await self._following.follow(job)
            if status.state is not JobState.DONE:
                raise TrainingError(f"evaluation stopped: {status.error or status.state}")
            return Scores.read(scores).grouped(data.clusters.get(asked.stem))
        finally:
            scores.unlink(missing_ok=True)

    async def _train(self, order: RoundOrder) -> None:
        await self._supervisor.ready()
        await self._fresh.settle()
        if not self.report(order.key).state.final:  # cancelled while it was waiting
            with self.data.held() as data:
                await self._attempt(order, data)

    async def _attempt(self, order: RoundOrder, data: Prepared) -> None:
        folder, plan, attempts = self._folder(order.key), order.plan, Attempts(self._rounds, order.key)
        step = folder.goes_on(data)
        attempt = attempts.begin(step)
        reach(Point.ATTEMPT_BEGUN)
        report = RoundReport(key=order.key, state=JobState.RUNNING, parent=order.parent)
        if attempt > MAX_ATTEMPTS:
            error = f"given up after {attempts.begun - 1} attempts; the site's log says what ended each"
            self._finish(report.model_copy(update={"state": JobState.FAILED, "error": error}))
            return self._settle(order.key)
        self._progress[order.key] = report
        job = TrainJob(
            id=self._id(order.key),
            plan=plan.model_copy(update={"rank": plan.joined_rank, "personal": None}),
            parent=str(folder.start(plan)),
            data=str(data.train),
            output=str(folder.output(plan)),
            share=self._share(),
            checkpoint=str(folder.checkpoint),
            checkpoint_s=self._checkpoint_s,
        )
        logger.info(
            "round.start adapter=%s key=%s attempt=%d share=%.3g step=%d",
            self.adapter, order.key, attempt, job.share, step,
        )  # fmt: skip
        deaths = self._supervisor.deaths_under_users
        try:
            trained = await self.measured.train(order, job, data, partial(self._note_progress, order.key))
        except (EngineGone, TrainingError) as error:  # the round stays open and goes on
            step = folder.steps()
            counted = attempts.cut_off(step, under_users=self._supervisor.deaths_under_users > deaths)
            logger.warning(
                "round.interrupted adapter=%s key=%s attempt=%s step=%d: %s",
                self.adapter, order.key, "counted" if counted else "not counted", step, error,
            )  # fmt: skip
            return self._submitted.set()
        if self.report(order.key).state is JobState.CANCELLED:
            return folder.forget_checkpoint()
        concluded = self._keys.sign_update(order, self._conclude(order, trained, data))
        reach(Point.UPDATE_WRITTEN)
        self._finish(concluded)
        self.measured.remember(trained)
        reach(Point.ROUND_DONE)
        return self._settle(order.key)

    def _conclude(self, order: RoundOrder, trained: Trained, data: Prepared) -> RoundReport:
        report = RoundReport(key=order.key, state=trained.state, parent=order.parent, error=trained.error)
        report = report.model_copy(update=trained.counts)
        if trained.state is not JobState.DONE:
            return report
        folder, plan = self._folder(order.key), order.plan
        blob = folder.output(plan).read_bytes()
        try:
            tensors = peft_dir.decode(blob)
            peft_dir.validate(tensors, self._shapes, rank=plan.joined_rank, max_rank=self._max_rank)
        except AdapterError as error:
            return report.model_copy(
                update={"state": JobState.FAILED, "error": f"what was trained is unusable: {error}"}
            )
        blob = folder.part(tensors, blob, plan)
        return report.model_copy(update={"update": peft_dir.digest(blob), "rank": plan.rank, **data.held})

    def _settle(self, key: str) -> None:
        """Remove the checkpoint of a round that the journal has as ended, and make its personal part the site's own.

        So a round that goes on, fails or is cancelled does not change the site's part. After a crash in here the next
        start does it.
        """
        folder = self._folder(key)
        folder.forget_checkpoint()
        if not folder.personal.exists():
            return
        order, report = self._rounds.get(key)
        if report.state is JobState.DONE and order.plan.personal is not None:
            part = self._personal(lineage_of(order), order.plan.personal)
            part.keep(peft_dir.decode(folder.parent.read_bytes()), folder.personal.read_bytes())
            reach(Point.PART_KEPT)
        folder.personal.unlink()

    def _note_progress(self, key: str, status: CoTrainerStatus) -> None:
        known = self._progress.get(key)
        if known is not None and not known.state.final and status.job == self._id(key):
            self._progress[key] = known.model_copy(update=counts(status))

    def _finish(self, report: RoundReport) -> None:
        self._rounds.report(report)
        self._progress.pop(report.key, None)
        logger.info(
            "round.%s adapter=%s key=%s steps=%d %s",
            report.state, self.adapter, report.key, report.steps, report.error,
        )  # fmt: skip

    def _folder(self, key: str) -> RoundFolder:
        return RoundFolder(self._directory / key)

    def _id(self, name: str) -> str:
        """Return the co-trainer's name of a round or an evaluation, which no other adapter has."""
        return f"{self.adapter}/{name}"
