"""A real site that is killed at fault points, and the user who notices: for scripts/tools/kill/matrix.py."""

import itertools
import subprocess
import threading
import time
from pathlib import Path

import httpx

from scripts.tools.processes import ENGINE_BIN, ProcessError, Processes
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import LENIENT, TrialSite, random_adapter, wait_until
from umbel.adapter import AdapterRef, Personal

SLIGHT = 0.01
"""Of a pushed version's B: it changes what the base says by a little."""


class User:
    """Asks `support` again and again; every answer is kept with its time and the version that gave it."""

    def __init__(self, url: str) -> None:
        self._url, self._answers = url, list[tuple[float, str]]()
        threading.Thread(target=self._keep_asking, daemon=True).start()

    def answered_since(self, moment: float) -> list[tuple[float, str]]:
        """(time, version) of each answer that began after `moment`; `base` where no version gave it."""
        return [answer for answer in self._answers if answer[0] >= moment]

    def longest_silence(self, since: float, until: float) -> float:
        """Seconds between two answers, at most."""
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
                pass  # a silence; how long it lasts is what is measured
            time.sleep(0.2)


class Site(TrialSite):
    """`umbel serve` under `processes`, and its user."""

    def __init__(self, folder: Path, model: Path, processes: Processes) -> None:
        super().__init__(folder, model, extra=LENIENT)
        self._processes = processes
        self._process: subprocess.Popen[bytes] | None = None
        self.log = processes.logs / "serve.log"
        self.user = User(self.url)

    def start(self, die_at: str = "") -> None:
        """Start the daemon; it dies at a fault point, if one is given."""
        command = [str(ENGINE_BIN / "python"), "-m", "umbel.cli", "serve", str(self.file)]
        plan = {"UMBEL_DIE_AT": die_at} if die_at else {}
        self._process = self._processes.start("serve", command, PYTHONPATH=str(REPOSITORY), **plan)

    def wait_ready(self, starts: int = 1) -> None:
        """Until the engine answers, in at least its `starts`-th run under this daemon."""
        wait_until(lambda: self.dead() or self.starts() >= starts, "the engine")
        if self.dead():
            raise ProcessError(f"the site ended while it was starting; see {self.log}")

    def dead(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def wait_dead(self) -> None:
        """Until the daemon has died, which has to be by SIGKILL."""
        wait_until(self.dead, "the site's death")
        if self._process is None or self._process.returncode != -9:
            raise ProcessError(f"the site ended by itself; see {self.log}")

    def settled(self) -> bool:
        """Whether nothing is waiting for a verdict or its training."""
        status = self.status()
        states = {report["state"] for report in status["versions"].values()}
        return not status["open_rounds"] and not states & {"validating", "probing"}

    def offer(self, version: int) -> AdapterRef:
        """Push a version and wait for its verdict."""
        blob = random_adapter(self.model, version, SLIGHT)
        manifest = self.manifest(version, blob)
        require_done(self.push(manifest, blob))
        self.wait_judged(manifest.ref)
        return manifest.ref

    def train(self, number: int, personal: Personal | None = None) -> None:
        """Train a round and wait for its end."""
        key = f"test-{number}-r"
        require_done(self.submit(key, random_adapter(self.model, 0), number, steps=2, personal=personal))
        report = self.wait_round(key)
        if report["state"] != "done":
            raise ProcessError(f"round {key}: {report}")


def require_done(reply: httpx.Response) -> None:
    """Raise ProcessError unless the site did what it was asked for."""
    if reply.is_error:
        raise ProcessError(f"{reply.request.url.path}: {reply.text}")
