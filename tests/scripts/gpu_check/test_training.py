"""The checks of training fail on whatever is not as promised."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.tools.gpu_check.training import STEPS, Training
from serving.trainer_socket import CoTrainerStatus, QuantumStats
from umbel.messages import JobState


def training(status: CoTrainerStatus, kind: str = "cuda", lag: str | None = None) -> Training:
    site: Any = SimpleNamespace(device=SimpleNamespace(kind=kind, lag=lag))
    return Training(site, status)


@pytest.mark.parametrize(("frozen", "shared", "outcome"), [(21, 21, "passed"), (21, 20, "failed"), (0, 0, "failed")])
def test_every_frozen_tensor_is_the_engines(frozen: int, shared: int, outcome: str) -> None:
    status = CoTrainerStatus(frozen_tensors=frozen, shared_tensors=shared)
    finding = asyncio.run(training(status).memory())
    assert finding.outcome == outcome
    assert finding.figures["shared_tensors"] == shared


@pytest.mark.parametrize(
    ("kind", "streams", "outcome"),
    [
        ("cuda", {"forward_stream": -1, "copy_stream": 0, "training": 0}, "passed"),
        ("cuda", {"forward_stream": 0, "training": 0}, "failed"),
        ("cuda", {"forward_stream": -1}, "failed"),
        ("cuda", {}, "failed"),
        ("cpu", {}, "skipped"),
    ],
)
def test_the_engines_stream_goes_first(kind: str, streams: dict[str, int], outcome: str) -> None:
    assert asyncio.run(training(CoTrainerStatus(streams=streams), kind).streams()).outcome == outcome


def ended(launch_s: float = 0.01, optimizer: int = 2 * STEPS, **fields: Any) -> CoTrainerStatus:
    quanta = {
        "attention": QuantumStats(count=9, seconds=0.2, launch_s=launch_s, longest_s=0.03),
        "optimizer": QuantumStats(count=optimizer, seconds=0.1),
    }
    return CoTrainerStatus(**{"job": "idle", "state": JobState.DONE, "steps": STEPS, "quanta": quanta, **fields})


@pytest.mark.parametrize(
    ("after", "kind", "why"),
    [
        (ended(), "cuda", ""),
        (ended(launch_s=0.0), "cpu", ""),
        (ended(launch_s=0.0), "cuda", "no quantum ran on a stream of its own"),
        (ended(optimizer=2 * STEPS - 1), "cuda", "quanta of the optimizer ended in"),
        (ended(optimizer=0), "cuda", "0 quanta of the optimizer ended in"),
        (ended(state=JobState.FAILED, error="a bug"), "cuda", "failed after 6 of 6 steps: a bug"),
        (ended(steps=STEPS - 1), "cuda", f"done after {STEPS - 1} of {STEPS} steps"),
    ],
    ids=["good", "a CPU", "no stream", "one lost", "none", "failed", "too few steps"],
)
def test_a_job_has_taken_all_steps_and_lost_no_quantum(after: CoTrainerStatus, kind: str, why: str) -> None:
    finding = training(CoTrainerStatus(), kind)._of_job(CoTrainerStatus(), after)
    assert why in finding.failed
    assert bool(finding.failed) == bool(why)


def test_only_quanta_since_the_job_began_are_counted() -> None:
    finding = training(CoTrainerStatus())._of_job(ended(), ended(optimizer=5 * STEPS, launch_s=0.05))
    assert finding.figures["quanta"]["optimizer"]["count"] == 3 * STEPS
    assert finding.figures["quanta"]["attention"]["launch_s"] == pytest.approx(0.04)
    assert finding.outcome == "passed"


def test_on_a_lagging_device_quanta_have_a_launch_as_well() -> None:
    finding = training(CoTrainerStatus(), "cpu", lag="1.5")._of_job(CoTrainerStatus(), ended(launch_s=0.0))
    assert "no quantum ran on a stream of its own" in finding.failed
