"""`SiteProcess`: a real site for tests, `umbel serve` in a process of its own that must leave nothing behind."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from scripts.tools.trial_site import TrialSite, wait_until
from umbel.adapter import AdapterRef


class SiteProcess(TrialSite):
    """`umbel serve` over a tiny base, as a context manager."""

    def __init__(
        self, folder: Path, model: Path, name: str = "clinic-a", data: str | None = None, extra: str = ""
    ) -> None:
        super().__init__(folder, model, name, data, extra)
        self.log = folder / "serve.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.users = httpx.Client(base_url=self.url, timeout=120)

    def __enter__(self) -> "SiteProcess":
        try:
            self.start()
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "umbel.cli", "serve", str(self.file)], stdout=log, stderr=log
            )
        self.wait_ready()

    def wait_ready(self, starts: int = 1) -> None:
        """Wait until the engine answers, in at least its `starts`-th run under this daemon."""

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            return self.starts() >= starts

        wait_until(ready, f"start {starts} of the engine; see {self.log}")

    def stop(self) -> None:
        """Stop the site as systemd would, and check that nothing of it is left."""
        if self.process is None:
            return
        family = self.family()
        self.process.send_signal(signal.SIGTERM)
        try:
            assert self.process.wait(60) == 0, self.log.read_text()[-3000:]
        finally:
            left = psutil.wait_procs(family, timeout=20)[1]
            self.process = None
            for process in left:
                process.kill()
            assert not left, left

    def end(self) -> None:
        """Kill the daemon and all that it started, whatever state they are in."""
        if self.process is None or self.process.poll() is not None:
            return
        for process in self.kill():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def kill(self) -> list[psutil.Process]:
        """Kill the daemon alone with SIGKILL; return the processes it had started."""
        assert self.process is not None
        family = self.family()
        self.process.kill()
        self.process.wait()
        self.process = None
        return family

    def family(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def engine_process(self) -> psutil.Process:
        return next(child for child in self.family() if "serving.launch" in " ".join(child.cmdline()))

    def deploy(self, version: int, blob: bytes, **changes: Any) -> AdapterRef:
        """Push a version, wait for its verdict, and promote it whatever the verdict is."""
        ref = self.offer(version, blob, **changes)
        reply = self.promote(ref)
        assert reply.status_code == 200, reply.text
        return ref


@contextlib.contextmanager
def first_in_each_python(folder: Path, code: str) -> Iterator[None]:
    """Have every Python that is started meanwhile run `code` first; `folder` keeps it."""
    (folder / "sitecustomize.py").write_text(code)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(folder), prepend=":")
        yield


def kill(process: psutil.Process) -> None:
    os.kill(process.pid, signal.SIGKILL)
