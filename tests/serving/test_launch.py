"""The engine's own process: it ends with the daemon, and a machine without an accelerator gets its flags."""

import os
import signal
import subprocess
import sys
import textwrap
from typing import Any

import psutil
import pytest

from serving.launch import CPU_FLAGS, NO_USE_ON_A_CPU, with_cpu_flags
from serving.run_dir import PARENT_VARIABLE
from tests.toys.serving.engine_flags import words


@pytest.mark.parametrize("flag", CPU_FLAGS)
def test_what_the_operator_has_set_stays_on_the_cpu(flag: str) -> None:
    given = ["--port", "1", flag, *([] if CPU_FLAGS[flag] is None else ["theirs"])]
    completed = with_cpu_flags(given)
    assert completed[: len(given)] == given
    assert completed.count(flag) == 1
    assert {other: words(completed, other) for other in CPU_FLAGS if other != flag} == {
        other: [] if value is None else [value] for other, value in CPU_FLAGS.items() if other != flag
    }
    assert with_cpu_flags(completed) == completed


def test_a_flag_that_the_operator_has_set_to_false_is_not_added_on_the_cpu() -> None:
    assert "--disable-overlap-schedule" in with_cpu_flags([])
    assert "--disable-overlap-schedule" not in with_cpu_flags(["--no-disable-overlap-schedule"])


def test_the_engine_ends_when_its_parent_is_killed() -> None:
    child = "from serving.launch import die_with_parent; die_with_parent(); print('ready', flush=True); input()"
    parent = textwrap.dedent(f"""
        import subprocess, sys
        child = subprocess.Popen([sys.executable, "-c", {child!r}], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        child.stdout.readline()
        print(child.pid, flush=True)
        input()
    """)
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", parent], **pipes) as process:
        assert process.stdout is not None
        engine = psutil.Process(int(process.stdout.readline()))
        os.kill(process.pid, signal.SIGKILL)
        assert psutil.wait_procs([engine], timeout=30)[1] == []


def test_an_engine_whose_daemon_died_before_it_looked_does_not_start() -> None:
    """The parent that it finds is not the one that started it: whoever adopts orphans is alive, and does not end."""
    script = "from serving.launch import die_with_parent; die_with_parent(); print('started')"
    for daemon, started in ((os.getpid(), True), (os.getppid(), False)):
        environment = {**os.environ, PARENT_VARIABLE: str(daemon)}
        ended = subprocess.run(
            [sys.executable, "-c", script], check=False, capture_output=True, text=True, env=environment
        )
        assert (ended.returncode, ended.stdout) == ((0, "started\n") if started else (1, ""))
        assert started or "the parent process is gone" in ended.stderr


def test_an_engine_looks_for_its_daemon_before_it_imports_anything_large() -> None:
    script = "import sys, serving.launch; print([name for name in ('torch', 'sglang') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout == "[]\n"


@pytest.mark.parametrize(("device", "left_out"), [("cpu", True), ("cuda", False)])
def test_a_process_of_an_engine_on_a_cpu_finds_no_packages_of_kernels(device: str, left_out: bool) -> None:
    script = textwrap.dedent(f"""
        import importlib.util, sys
        from serving.launch import NO_USE_ON_A_CPU, spare_imports
        spare_imports(["--dtype", "float32", "--device", {device!r}])
        print([importlib.util.find_spec(name) is None for name in NO_USE_ON_A_CPU])
    """)
    ended = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert ended.stdout == f"{[left_out] * len(NO_USE_ON_A_CPU)}\n"


def test_an_engine_whose_parent_is_dead_already_does_not_start() -> None:
    """The parent dies between the two questions for it, so that the kernel's signal would never come."""
    script = textwrap.dedent("""
        import os
        from serving import launch
        parents = iter([4711, 1])
        os.getppid = lambda: next(parents)
        launch.die_with_parent()
        print("started")
    """)
    ended = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert "the parent process is gone" in ended.stderr
