"""A real engine that is stopped in its tracks: it is back by itself, the round goes on, users are answered again."""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from scripts.tools.trial_site import random_adapter, wait_until
from tests.toys.sites.site_process import SiteProcess

pytestmark = pytest.mark.e2e

HANG_TIMEOUT_S = 10


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        site = SiteProcess(Path(folder) / "site", tiny_llama)
        text = site.file.read_text()
        assert text.count("[engine]\n") == 1
        site.file.write_text(text.replace("[engine]\n", f"[engine]\nhang_timeout_s = {HANG_TIMEOUT_S}\n"))
        with site:
            yield site


def ask(site: SiteProcess, prompt: str) -> httpx.Response:
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 4, "temperature": 0}
    return site.users.post("/v1/completions", json=body)


class Asked:
    """A user's request in flight; `failed` once it was broken off."""

    def __init__(self, site: SiteProcess, prompt: str) -> None:
        self.failed = False
        self._thread = threading.Thread(target=self._ask, args=(site, prompt))
        self._thread.start()

    def wait(self) -> None:
        self._thread.join(300)

    def _ask(self, site: SiteProcess, prompt: str) -> None:
        try:
            ask(site, prompt)
        except httpx.HTTPError:
            self.failed = True


def scheduler(site: SiteProcess) -> psutil.Process:
    return next(child for child in site.family() if "scheduler" in " ".join(child.cmdline()))


def hangs(site: SiteProcess) -> list[str]:
    return [line for line in site.log.read_text().splitlines() if "engine.hung" in line]


def test_a_stopped_scheduler_is_replaced_the_round_goes_on_and_its_last_request_is_refused(site: SiteProcess) -> None:
    assert ask(site, "before").status_code == 200
    reply = site.submit("r1", random_adapter(site.model, seed=1, b_std=0.0), steps=40, seconds=300)
    assert reply.status_code == 200, reply.text
    wait_until(lambda: site.status()["training"]["steps"] > 0, "the first step of the round")
    os.kill(scheduler(site).pid, signal.SIGSTOP)
    last = Asked(site, "the last words")
    site.wait_ready(starts=2)
    last.wait()
    assert last.failed
    assert len(hangs(site)) == 1
    assert "it has computed nothing for" in hangs(site)[0]
    again = ask(site, "the last words")
    assert (again.status_code, again.json()["error"]["code"]) == (400, "ended_the_engine")
    assert ask(site, "before").status_code == 200
    assert ask(site, "other words").status_code == 200
    report = site.wait_round("r1")
    assert (report["state"], report["steps"]) == ("done", 40), report
    assert "key=r1 attempt=not counted" in site.log.read_text()
    assert site.status()["engine"]["starts"] == 2


def test_a_http_server_that_does_not_get_on_is_replaced(site: SiteProcess) -> None:
    starts, before = site.status()["engine"]["starts"], len(hangs(site))
    stopped = site.engine_process()
    os.kill(stopped.pid, signal.SIGSTOP)
    site.wait_ready(starts=starts + 1)
    assert "its HTTP server has not answered" in hangs(site)[before]
    assert not stopped.is_running()
    assert ask(site, "after").status_code == 200
    assert site.status()["engine"]["starts"] == starts + 1
