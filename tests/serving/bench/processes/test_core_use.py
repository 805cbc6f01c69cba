"""Cores and processes are measured for as long as a context lasts."""

import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest

from serving.bench.processes.core_use import core_use


class CpuTimes(NamedTuple):
    """Seconds of a core, as the kernel counts them."""

    user: float
    system: float
    idle: float
    iowait: float


def test_a_core_is_busy_while_it_neither_idles_nor_waits_for_a_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, ended = [CpuTimes(10, 5, 100, 1)] * 2, [CpuTimes(12, 6, 106, 2), CpuTimes(10, 5, 100, 1)]
    readings = iter([begun, ended])
    monkeypatch.setattr(psutil, "cpu_times", lambda percpu: next(readings))
    with core_use() as use:
        assert use.cores == []
    assert use.cores == [pytest.approx(3 / 10), 0.0], "of a core whose counters stand still, nothing is known"


def test_a_process_has_used_what_it_has_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([CpuTimes(1.0, 0.5, 0.0, 0.0), CpuTimes(2.0, 1.5, 0.0, 0.0)])
    process: Any = SimpleNamespace(cpu_times=lambda: next(readings))
    moments = iter([10.0, 14.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(moments))
    with core_use(process) as use:
        pass
    assert use.processes == [pytest.approx(2 / 4)]
