"""`MeasuredRound`: one round in bursts, each of which is measured on rows that are set aside.

What was decided and what the bursts have come to is kept in the round's folder: a round that is cut off goes on there.
"""

import logging
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import numpy as np
from pydantic import ValidationError

from client.data.prepare import Prepared
from client.rounds.folder import CHECKPOINT, COURSE, RoundFolder
from client.rounds.following import counts
from client.worth.bursts import Bursts
from client.worth.decision import Decision, Seen, Taught, decide, learnt
from client.worth.gain import Losses
from client.worth.look import Look, by_domain
from client.worth.memory import Body, Memory
from client.worth.row_keys import Digests
from client.worth.worth_set import Numbers
from serving.scores import Scores
from serving.trainer_socket import CoTrainerStatus, EvaluateJob, TrainJob
from umbel.errors import TrainingError
from umbel.messages import JobState, RoundOrder
from umbel.peft_dir import replace_durably
from umbel.token_file import TokenFile, write_rows

EVALUATIONS = 6
"""Most evaluations of a round; its seconds leave room for them."""

Note = Callable[[CoTrainerStatus], None]
Follow = Callable[[TrainJob | EvaluateJob, Note], Coroutine[Any, Any, CoTrainerStatus]]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trained:
    """The end of a round's training."""

    state: JobState
    """DONE with what it sends in the job's output, SKIPPED, or how the co-trainer ended it otherwise."""
    error: str = ""
    """The reason, where it sends nothing."""
    counts: dict[str, int | float] = field(default_factory=dict)
    """Fields of the report, of what it sends; of a skipped round, of what was tried and thrown away."""
    told: str = ""
    """The measured gain, in words."""
    memory: Memory | None = None
    """The site's memory from now on; None where it learnt nothing."""
    content: Digests = field(default_factory=lambda: np.empty(0, np.uint64))
    """Content of the rows that it remembers."""

    @classmethod
    def of(cls, status: CoTrainerStatus) -> Self:
        """Make it of a job's end."""
        return cls(status.state, status.error, counts(status))


def skipped(why: str, tried: dict[str, int | float] | None = None) -> Trained:
    """Return the end of a round in which nothing was worth training."""
    told = f"nothing worth training: {why}"
    return Trained(JobState.SKIPPED, told, tried or {}, told)


class _Course(Body):
    """A round under way."""

    data: str
    """Name of the folder of its data."""
    seconds: float
    """Those that its bursts may take, without the evaluations."""
    seen: dict[str, Seen]
    decision: Decision
    before: tuple[float, ...]
    """Loss per token of each measured row under the parent."""
    taken: tuple[int, ...] = ()
    """Steps after each burst."""
    losses: tuple[tuple[float, ...], ...] = ()
    counts: tuple[dict[str, int | float], ...] = ()


class MeasuredRound:
    """A round with data of which enough is set aside; `follow` has the co-trainer do a job."""

    def __init__(
        self, order: RoundOrder, job: TrainJob, data: Prepared, look: Look, memory: Memory, follow: Follow, note: Note,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._order, self._job, self._data = order, job, data
        self._look, self._memory = look, memory
        self._follow, self._note, self._clock = follow, note, clock
        self._folder = Path(job.output).parent
        self._device_s = 0.0
        """Time of the device that evaluations took."""

    async def run(self) -> Trained:
        """Decide, train in bursts, and return the end."""
        course: _Course | Trained | None = self._kept()
        if course is None:
            RoundFolder(self._folder).forget_checkpoint()
            course = await self._begin()
        if isinstance(course, Trained):
            return course
        plan, tokens = self._job.plan, TokenFile.open(Path(self._job.data))
        rows, weights = self._look.to_measure(course.decision.train, course.decision.drifted)
        bursts = Bursts(
            np.array(course.before), plan.steps, course.decision.doubtful, plan.warmup_steps, weights,
            list(course.taken), [np.array(losses) for losses in course.losses],
        )  # fmt: skip
        np.save(self._folder / "rows.npy", self._look.to_train(course.decision, plan.seed))
        write_rows(self._folder / "measured.npy", tokens, rows.tolist())
        while until := bursts.until:
            job = self._burst(course, until)
            status = await self._follow(job, self._tell)
            if status.state is not JobState.DONE:
                return Trained.of(status)
            if bursts.taken and status.steps <= bursts.taken[-1]:
                break  # its seconds were over
            losses = await self._losses(job.output, "measured.npy", job.id)
            bursts.add(status.steps, losses)
            course = course.model_copy(
                update={
                    "taken": (*course.taken, status.steps),
                    "losses": (*course.losses, tuple(losses.tolist())),
                    "counts": (*course.counts, counts(status)),
                }
            )
            replace_durably(self._folder / COURSE, course.model_dump_json().encode())
            if status.steps < until:
                break
        return self._end(course, bursts, rows)

    def _kept(self) -> _Course | None:
        """Return the course of an earlier attempt; None where there was none, it was on other data, or is damaged."""
        try:
            course = _Course.model_validate_json((self._folder / COURSE).read_bytes())
        except (OSError, ValidationError):
            return None
        return course if course.data == self._data.folder.name else None

    async def _begin(self) -> "_Course | Trained":
        """Look at the data under the parent, and decide."""
        look, began = self._look, time.monotonic()
        write_rows(self._folder / "look.npy", TokenFile.open(Path(self._job.data)), look.rows.tolist())
        losses = await self._losses(self._job.parent, "look.npy", f"{self._job.id}.{self._data.folder.name[:8]}-0")
        seen = look.seen(self._memory, losses)
        decision = decide(self._memory, seen, self._clock())
        if not decision.train:
            memory = self._after(seen, {}, reason=decision.reason)
            return self._with_memory(skipped(decision.reason), memory)
        by_row = dict(zip(look.rows.tolist(), losses.tolist(), strict=True))
        rows, _ = look.to_measure(decision.train, decision.drifted)
        course = _Course(
            data=self._data.folder.name, seen=seen, decision=decision,
            seconds=max(1.0, self._job.plan.seconds - EVALUATIONS * (time.monotonic() - began)),
            before=tuple(by_row[row] for row in rows.tolist()),
        )  # fmt: skip
        replace_durably(self._folder / COURSE, course.model_dump_json().encode())
        return course

    def _burst(self, course: _Course, until: int) -> TrainJob:
        """Return the job of one burst; all of a round have one plan, and each goes on from the one before."""
        return self._job.model_copy(
            update={
                "id": f"{self._job.id}.{course.data[:8]}-{until}",
                "plan": self._job.plan.model_copy(update={"seconds": course.seconds}),
                "output": str(self._folder / f"burst-{until}.safetensors"),
                "until": until,
                "rows": str(self._folder / "rows.npy"),
                "checkpoint": self._job.checkpoint or str(self._folder / CHECKPOINT),
            }
        )

    def _tell(self, status: CoTrainerStatus) -> None:
        self._note(status.model_copy(update={"job": self._job.id}))

    async def _losses(self, adapter: str, data: str, name: str) -> Losses:
        """Return the loss per token of each row of a file in the round's folder, under an adapter's weights."""
        scores = self._folder / "scores.npy"
        job = EvaluateJob(
            id=f"{name}.loss", adapter=adapter, data=str(self._folder / data), output=str(scores)
        )  # fmt: skip
        status = await self._follow(job, lambda status: None)
        if status.state is not JobState.DONE:
            raise TrainingError(f"evaluation stopped: {status.error or status.state}")
        self._device_s += status.seconds * status.share
        found = Scores.read(scores)
        losses: Losses = found.loss / np.maximum(found.tokens, 1)
        return losses

    def _end(self, course: _Course, bursts: Bursts, rows: Numbers) -> Trained:
        """Hand the best burst over, if it pays."""
        pays, best = bursts.pays, bursts.best
        gain, before = bursts.gain(best), float(np.average(bursts.before, weights=bursts.weights))
        told = (
            f"{bursts.taken[best]} steps changed the loss of {gain.examples} examples that are set aside by "
            f"{-gain.mean:+.4f} ± {gain.error:.4f} nats per token, from {before:.4f}"
        )
        more = pays and not bursts.flat
        memory = self._after(course.seen, self._taught(course, bursts, rows, more), reason="")
        rests = all(memory.domain(key).needed for key in course.decision.train)
        memory = memory.model_copy(
            update={
                "reason": told if rests and not pays else "",
                "unadopted": self._memory.unadopted + pays,
                "round": self._order.round,
            }
        )
        logger.info(
            "worth.round key=%s domains=%d drifted=%d bursts=%s best=%d flat=%s evaluations_s=%.3g",
            self._order.key, len(course.decision.train), len(course.decision.drifted), list(bursts.taken),
            bursts.taken[best], bursts.flat, self._device_s,
        )  # fmt: skip
        if not pays:
            return self._with_memory(skipped(told, course.counts[-1]), memory)
        blob = (self._folder / f"burst-{bursts.taken[best]}.safetensors").read_bytes()
        replace_durably(Path(self._job.output), blob)
        fresh = course.decision.drifted if more else frozenset()
        return self._with_memory(Trained(JobState.DONE, counts=course.counts[best], told=told), memory, fresh)

    def _taught(self, course: _Course, bursts: Bursts, rows: Numbers, more: bool) -> dict[str, Taught]:
        """Return what the bursts have shown of each domain."""
        busy = [0.0, *(count["seconds"] * count["share"] for count in course.counts)]
        ends = [bursts.before, *bursts.losses]
        reached = bursts.losses[bursts.best] if bursts.pays else bursts.before
        content = self._look.keys.content[rows]
        return {
            key: Taught(
                rate=float(ends[-2][own].mean() - ends[-1][own].mean()) / max(busy[-1] - busy[-2], 1e-3),
                seconds=busy[-1], more=more,
                reached=dict(zip(content[own].tolist(), reached[own].tolist(), strict=True)),
            )
            for key, own in by_domain(self._look, course.decision.train, rows).items()
        }  # fmt: skip

    def _after(self, seen: dict[str, Seen], taught: dict[str, Taught], *, reason: str) -> Memory:
        marks = {"parent": self._order.parent, "data": self._data.folder.name, "reason": reason}
        return learnt(self._memory, seen, taught, self._clock()).model_copy(update=marks)

    def _with_memory(self, trained: Trained, memory: Memory, fresh: frozenset[str] = frozenset()) -> Trained:
        """Return the end with what is remembered; `fresh`: domains whose fresh rows stay fresh."""
        return Trained(
            trained.state, trained.error, trained.counts, trained.told, memory, self._look.known_after(fresh)
        )
