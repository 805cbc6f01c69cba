"""`Training`: checks of what trains: memory, streams, a job while nobody asks, and one beside users, as they saw it."""

import asyncio
from typing import Any

from scripts.tools.gpu_check import latency
from scripts.tools.gpu_check.findings import Figures, Finding
from scripts.tools.gpu_check.site import CheckedSite
from serving.trainer_socket import CoTrainerStatus, QuantumStats
from umbel.messages import JobState

STEPS = 6
"""Optimizer steps of a job that has to end."""
REQUESTS = 24
"""Requests that are measured alone, and at least beside a job."""
NO_SECOND = "cannot be: one quantum is outstanding at a time, so a request that comes meets at most one"


class Training:
    """The checks, in their order."""

    def __init__(self, site: CheckedSite, ready: CoTrainerStatus) -> None:
        self.site, self._ready = site, ready
        self._alone: Figures = {}

    async def memory(self) -> Finding:
        """Require that every frozen tensor of the trainer is one of the engine's."""
        status = self._ready
        figures = {
            "frozen_tensors": status.frozen_tensors, "shared_tensors": status.shared_tensors,
            "state_bytes": status.state_bytes, "kv_tokens_given_up": status.kv_tokens_given_up,
            "private_bytes": status.memory,
        }  # fmt: skip
        counted_once = 0 < status.frozen_tensors == status.shared_tensors
        return Finding(figures, failed="" if counted_once else "the trainer holds weights that are not the engine's")

    async def streams(self) -> Finding:
        """Require that the engine's stream goes before training's; which one that is was settled when it was made."""
        if self.site.device.kind != "cuda":
            return Finding(skipped="no CUDA device: nothing has a stream here")
        streams = self._ready.streams
        in_order = "training" in streams and streams.get("forward_stream", 0) < streams["training"]
        return Finding({"priorities": streams}, failed="" if in_order else "forward_stream does not go before training")

    async def idle(self) -> Finding:
        """Train while nobody asks."""
        return self._of_job(self._ready, await self._job("idle"))

    async def alone(self) -> Finding:
        """Measure users' latencies while nothing trains: no quantum per iteration."""
        users = latency.Users(self.site)
        try:
            self._alone = latency.figures(await users.ask(REQUESTS))
        finally:
            await users.close()
        return Finding(self._alone, failed=_of_users(self._alone))

    async def busy(self) -> Finding:
        """Train while users ask, and measure their latencies: at most one quantum per iteration."""
        users, before = latency.Users(self.site), await self.site.trainer.status()
        asking = asyncio.create_task(users.ask(REQUESTS))
        jobs = 0
        try:
            while not jobs or not asking.done():  # a job is over in a second; the next one begins at once
                jobs += 1
                status = await self._job(f"busy-{jobs}")
            seen = latency.figures(await asking)
        finally:
            asking.cancel()
            await users.close()
        of_job = self._of_job(before, status, jobs)
        busy = status.hook_calls.get("busy", 0) - before.hook_calls.get("busy", 0)
        figures = {
            **of_job.figures, "jobs": jobs, "hook_calls_while_busy": busy,
            "most_quanta_while_waiting": status.most_quanta_while_waiting,
            "targets": status.slo.model_dump() if status.slo else None, "preemption": status.preemption.model_dump(),
            "by_quanta_per_iteration": {"0": self._alone, "1": seen, "2": NO_SECOND},
        }  # fmt: skip
        failed = of_job.failed or _of_users(seen)
        if not failed and not busy:
            failed = "the co-trainer was never asked while the engine was busy"
        if not failed and status.most_quanta_while_waiting > 1:
            failed = f"a request that waited met {status.most_quanta_while_waiting} quanta"
        return Finding(figures, failed=failed)

    async def _job(self, name: str) -> CoTrainerStatus:
        """Run a job to its end; return the status then."""
        job = self.site.job(name, STEPS)
        await self.site.trainer.start(job)
        return await self.site.ended(job)

    def _of_job(self, before: CoTrainerStatus, after: CoTrainerStatus, jobs: int = 1) -> Finding:
        """Judge jobs that have ended, by the last one: all steps were taken, all quanta have ended and were counted."""
        quanta = {kind: _since(before.quanta.get(kind), stats) for kind, stats in after.quanta.items()}
        device_s, launch_s = (sum(stats[key] for stats in quanta.values()) for key in ("seconds", "launch_s"))
        figures: dict[str, Any] = {
            "state": after.state, "steps": after.steps, "seconds": after.seconds, "share": after.share,
            "loss": after.loss_sum / max(after.loss_tokens, 1), "longest_quantum_s": after.longest_quantum_s,
            "pieces": after.pieces, "device_and_launch_s": device_s, "launch_s": launch_s, "quanta": quanta,
        }  # fmt: skip
        optimizer = quanta.get("optimizer", {"count": 0})["count"]
        if after.state is not JobState.DONE or after.steps != STEPS:
            return Finding(figures, failed=f"{after.state} after {after.steps} of {STEPS} steps: {after.error}")
        if not optimizer or optimizer % (STEPS * jobs):
            return Finding(figures, failed=f"{optimizer} quanta of the optimizer ended in {jobs} × {STEPS} steps")
        asynchronous = self.site.device.kind == "cuda" or self.site.device.lag is not None
        if asynchronous and not launch_s:
            return Finding(figures, failed="no quantum ran on a stream of its own: none has a time of its launch")
        return Finding(figures)


def _since(before: QuantumStats | None, after: QuantumStats) -> dict[str, float]:
    """Return the count and seconds of one kind of quantum since an earlier status, and its longest ever."""
    then = before or QuantumStats()
    return {
        "count": after.count - then.count,
        "seconds": after.seconds - then.seconds,
        "launch_s": after.launch_s - then.launch_s,
        "longest_s": after.longest_s,
    }


def _of_users(figures: Figures) -> str:
    """Return the reason if a request was not answered."""
    return f"{figures['failed']} of {figures['requests']} requests were not answered" if figures["failed"] else ""
