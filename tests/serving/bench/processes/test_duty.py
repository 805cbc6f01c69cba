"""Two processes have the core by turns, and both run again at the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil
import pytest

from serving.bench.processes.duty import DutyCycle

SERVER, TRAINER = 11, 12


class Turns:
    """A clock that time passes on in sleeps only, and the signals that are sent; the cycle ends after some turns."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, turns: int) -> None:
        self.now, self.left = 0.0, turns
        self.sent: list[tuple[float, int, signal.Signals]] = []
        self.cycle: DutyCycle | None = None
        self.late = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.sleep)
        monkeypatch.setattr(os, "kill", lambda pid, sent: self.sent.append((round(self.now, 6), pid, sent)))

    def sleep(self, seconds: float) -> None:
        self.now += seconds + self.late
        self.left -= 1
        if self.left == 0:
            assert self.cycle is not None
            self.cycle._over.set()

    def run(self, share: float) -> None:
        self.cycle = DutyCycle(SERVER, TRAINER, share, period_s=0.01)
        self.cycle._run()

    def seconds(self, of: int) -> float:
        """Return for how long a process ran."""
        ran, since = 0.0, None
        for at, pid, sent in self.sent:
            if pid == of and sent == signal.SIGCONT and since is None:
                since = at
            elif pid == of and sent == signal.SIGSTOP and since is not None:
                ran, since = ran + at - since, None
        return ran


def test_each_has_its_share_and_never_both(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(monkeypatch, 20)
    turns.run(share=0.3)
    assert turns.seconds(TRAINER) == pytest.approx(10 * 0.003)
    stopped = {SERVER: False, TRAINER: False}
    for _, pid, sent in turns.sent[:-2]:
        stopped[pid] = sent == signal.SIGSTOP
        assert any(stopped.values()), "one is stopped before the other goes on"
    assert [(pid, sent) for _, pid, sent in turns.sent[-2:]] == [(SERVER, signal.SIGCONT), (TRAINER, signal.SIGCONT)]


def test_late_turns_change_no_share(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = Turns(monkeypatch, 200)
    turns.late = 0.0005
    turns.run(share=0.3)
    assert turns.seconds(TRAINER) / turns.now == pytest.approx(0.3, abs=0.01)


@pytest.fixture
def sleepers() -> Iterator[list[psutil.Process]]:
    processes = [subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for _ in range(2)]
    yield [psutil.Process(process.pid) for process in processes]
    for process in processes:
        process.kill()
        process.wait()


def test_processes_are_really_stopped_and_run_again_at_the_end(sleepers: list[psutil.Process]) -> None:
    server, trainer = sleepers
    with DutyCycle(server.pid, trainer.pid, share=0.5, period_s=0.02):
        until, seen = time.monotonic() + 60, set[int]()
        while len(seen) < 2 and time.monotonic() < until:
            seen |= {one.pid for one in sleepers if one.status() == psutil.STATUS_STOPPED}
    assert seen == {server.pid, trainer.pid}
    assert psutil.STATUS_STOPPED not in {one.status() for one in sleepers}


def test_a_process_that_has_ended_ends_no_turns(sleepers: list[psutil.Process]) -> None:
    server, trainer = sleepers
    server.kill()
    server.wait()
    with DutyCycle(server.pid, trainer.pid, share=0.5):
        pass
    assert trainer.status() != psutil.STATUS_STOPPED
