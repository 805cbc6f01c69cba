"""`core_use`: how busy the cores were, and how much of one each process has computed."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psutil


@dataclass
class Use:
    """CPU time of cores and processes; the lists are empty until the measurement has ended."""

    cores: list[float] = field(default_factory=list)
    """Busy share of each core."""
    processes: list[float] = field(default_factory=list)
    """Share of one core that each process has computed."""


@contextmanager
def core_use(*processes: psutil.Process) -> Iterator[Use]:
    """Measure cores and processes until the context is left."""
    before, computed = psutil.cpu_times(percpu=True), [_computed(process) for process in processes]
    began, use = time.perf_counter(), Use()
    yield use
    seconds = time.perf_counter() - began
    use.cores += [_busy(old, new) for old, new in zip(before, psutil.cpu_times(percpu=True), strict=True)]
    use.processes += [(_computed(one) - old) / seconds for one, old in zip(processes, computed, strict=True)]


def _computed(process: psutil.Process) -> float:
    """Return the seconds that a process has computed."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _busy(before: Any, after: Any) -> float:
    total = sum(after) - sum(before)
    idle = after.idle + after.iowait - before.idle - before.iowait
    return 1 - idle / total if total else 0.0
