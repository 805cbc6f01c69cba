"""The benchmark's machine: two cores, and priorities that can be raised again."""

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.bench.processes import testbed
from serving.bench.processes.testbed import CLIENT_CORE, ENGINE_CORE, require_machine, site_config
from serving.bench.world import MICRO_BATCH, RANK, SEQ_LEN, World
from serving.trainer_socket import CoTrainerSettings
from umbel.errors import ConfigError


@pytest.fixture
def enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cores, and the right to raise a priority."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {ENGINE_CORE, CLIENT_CORE, 7})
    monkeypatch.setattr(os, "geteuid", lambda: 0)


@pytest.mark.usefixtures("enough")
def test_two_cores_are_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    require_machine(with_priorities=True)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {CLIENT_CORE, 7})
    with pytest.raises(ConfigError, match="cores 0 and 1 are needed"):
        require_machine(with_priorities=False)


@pytest.mark.usefixtures("enough")
def test_priorities_need_a_right_to_raise_them_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (0, 0))
    require_machine(with_priorities=False)
    with pytest.raises(ConfigError, match="ulimit -e 20"):
        require_machine(with_priorities=True)
    monkeypatch.setattr(resource, "getrlimit", lambda which: (20, 20))
    require_machine(with_priorities=True)


def test_the_site_file_fits_the_world(tmp_path: Path) -> None:
    config = site_config(tmp_path, World.at(tmp_path / "world"))
    assert config.model.path == tmp_path / "world" / "model"
    assert "umbel_bench" in config.engine.env["SGLANG_PLUGINS"]
    settings = CoTrainerSettings.of(config)
    assert (settings.max_rank, settings.micro_batch, settings.seq_len) == (RANK, MICRO_BATCH, SEQ_LEN)


@pytest.fixture
def sleeper() -> Iterator[psutil.Process]:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield psutil.Process(process.pid)
    process.kill()
    process.wait()


@pytest.mark.parametrize("grouped", [False, True])
def test_the_separate_trainers_priority_is_set_for_its_session_too(
    sleeper: psutil.Process, grouped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switch = tmp_path / "sched_autogroup_enabled"
    switch.write_text(f"{int(grouped)}\n")
    monkeypatch.setattr(testbed, "AUTOGROUP", switch)
    written: list[str] = []
    real = Path.write_text

    def note(path: Path, text: str) -> int:
        if path.name != "autogroup":
            return real(path, text)
        written.append(text)
        return len(text)

    monkeypatch.setattr(Path, "write_text", note)
    unused: Any = None
    bed = testbed.Testbed(unused, tmp_path, unused, unused, unused, unused, sleeper, unused, None)
    bed.set_nice(5)
    assert sleeper.nice() == 5
    assert written == (["5"] if grouped else [])


def test_figures_come_with_their_machine() -> None:
    assert {"cpu", "cores", "memory", "python", "umbel", "sglang", "torch"} <= testbed.describe().keys()
