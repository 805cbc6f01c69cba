"""`Site`: a real site that is killed at fault points, and its `User`, for scripts/tools/kill/matrix.py."""

import itertools
import subprocess
import threading
import time
from pathlib import Path

import httpx

from scripts.tools.processes import ENGINE_BIN, ProcessError, Processes
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import LENIENT, TrialSite, random_adapter, require_done, wait_until
from umbel.adapter import AdapterRef, Personal

SLIGHT = 0.01
"""Standard deviation of a pushed version's B: it changes the base's answers only a little."""


class User:
    """Asks `support` again and again, and keeps every answer's time and version."""

    def __init__(self, url: str) -> None:
        self._url, self._answers = url, list[tuple[float, str]]()
        threading.Thread(target=self._keep_asking, daemon=True).start()

    def answered_since(self, moment: float) -> list[tuple[float, str]]:
        """Return (time, version) of each answer that began after `moment`; `base` where no version gave it."""
        return [answer for answer in self._answers if answer[0] >= moment]

    def longest_silence(self, since: float, until: float) -> float:
        """Return the longest time between two answers, in seconds."""
        times = [since, *(at for at, _ in self._answers if since <= at <= until), until]
        return max(after - before for before, after in itertools.pairwise(times))

    def _keep_asking(self) -> None:
        body = {"model": "support", "prompt": "Return a list of", "max_tokens": 2, "temperature": 0}
        while True:
            began = time.monotonic()
            try:
                reply = httpx.post(f"{self._url}/v1/completions", json=body, timeout=30).raise_for_status()
                self._answers.append((began, reply.headers.get("x-umbel-adapter", "base")))
            except httpx.HTTPError:
                pass  # a silence, whose length is measured
            time.sleep(0.2)


class Site(TrialSite):
    """A trial site whose `umbel serve` is started, and dies, again and again; it has one user."""

    def __init__(self, folder: Path, model: Path, processes: Processes) -> None:
        super().__init__(folder, model, extra=LENIENT)
        self._processes = processes
        self._process: subprocess.Popen[bytes] | None = None
        self.log = processes.logs / "serve.log"
        self.user = User(self.url)

    def start(self, die_at: str = "") -> None:
        """Start the daemon; if a fault point is given, it dies there."""
        command = [str(ENGINE_BIN / "python"), "-m", "umbel.cli", "serve", str(self.file)]
        plan = {"UMBEL_DIE_AT": die_at} if die_at else {}
        self._process = self._processes.start("serve", command, PYTHONPATH=str(REPOSITORY), **plan)

    def wait_ready(self, starts: int = 1) -> None:
        """Wait until the engine answers, in at least its `starts`-th run under this daemon."""
        wait_until(lambda: self.dead() or self.starts() >= starts, "the engine")
        if self.dead():
            raise ProcessError(f"the site ended while it was starting; see {self.log}")

    def dead(self) -> bool:
        """Tell whether the daemon has ended."""
        return self._process is not None and self._process.poll() is not None

    def wait_dead(self) -> None:
        """Wait until the daemon has died; raise ProcessError unless SIGKILL did it."""
        wait_until(self.dead, "the site's death")
        if self._process is None or self._process.returncode != -9:
            raise ProcessError(f"the site ended by itself; see {self.log}")

    def settled(self) -> bool:
        """Tell whether no version waits for its verdict and no round for its training."""
        status = self.status()
        states = {report["state"] for report in status["versions"].values()}
        return not status["open_rounds"] and not states & {"candidate", "probing"}

    def offer_slight(self, version: int) -> AdapterRef:
        """Offer a version that changes the base's answers only a little."""
        return self.offer(version, random_adapter(self.model, version, SLIGHT))

    def train(self, number: int, personal: Personal | None = None) -> None:
        """Train a round and wait for its end; raise ProcessError if it failed."""
        key = f"test-{number}-r"
        require_done(self.submit(key, random_adapter(self.model, 0), number, steps=2, personal=personal))
        report = self.wait_round(key)
        if report["state"] != "done":
            raise ProcessError(f"round {key}: {report}")
