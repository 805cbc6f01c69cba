"""A real engine that is short of memory goes on; one that is stopped in its tracks is back by itself.

The round goes on, and users are answered.
"""

import os
import re
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from scripts.tools.trial_site import random_adapter, wait_until
from serving.cotrainer.memory import SCARCE
from tests.toys.sites.site_process import SiteProcess

pytestmark = pytest.mark.e2e

HANG_TIMEOUT_S = 10
MEMORY_MB = 4090
"""Of the 4096 MiB that KV cache and training share on a CPU."""
KV_TOKENS = 6 * (1 << 20) // 512
"""Tokens of the tiny base that fit into the rest."""


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        scarce = f'[engine.env]\n{SCARCE} = "{Path(folder) / "rows"}"'
        site = SiteProcess(Path(folder) / "site", tiny_llama, extra=scarce)
        text = site.file.read_text()
        for table, key in (("engine", f"hang_timeout_s = {HANG_TIMEOUT_S}"), ("training", f"memory_mb = {MEMORY_MB}")):
            assert text.count(f"[{table}]\n") == 1
            text = text.replace(f"[{table}]\n", f"[{table}]\n{key}\n")
        site.file.write_text(text)
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


def test_memory_that_is_kept_for_training_is_missing_from_the_kv_cache(site: SiteProcess) -> None:
    log = (site.folder / "state" / "engine.log").read_text()
    (held,) = map(int, re.findall(r"max_total_num_tokens=([0-9]+)", log))
    training = site.status()["training"]
    assert training["reserved_mb"] == MEMORY_MB
    assert held == KV_TOKENS == 20_000 - training["kv_tokens_given_up"]


def test_a_failed_allocation_costs_the_rung_then_the_job_and_nobodys_answer(site: SiteProcess) -> None:
    """torch is asked in vain for memory within a quantum, while users are answered."""
    enough_for, parent = site.folder.parent / "rows", random_adapter(site.model, seed=1, b_std=0.0)
    ended, asked = {}, list[int]()
    for rows, key in (("2", "fewer"), ("0", "none"), ("9", "enough")):
        enough_for.write_text(rows)
        assert site.submit(key, parent, steps=6).status_code == 200
        with ThreadPoolExecutor(1) as pool:
            report = pool.submit(site.wait_round, key)
            while not report.done():
                asked.append(ask(site, f"{len(asked)} while it trains").status_code)
        ended[key] = report.result(), site.status()["training"]["pieces"]
    (fewer, pieces), (none, smallest), (enough, _) = ended.values()
    assert (fewer["state"], fewer["steps"], pieces["micro_batch"]) == ("done", 6, 2), fewer
    assert (none["state"], none["steps"], smallest["micro_batch"]) == ("failed", 0, 1), none
    assert "[training].memory_mb" in none["error"]
    assert (enough["state"], enough["steps"]) == ("done", 6), enough
    assert set(asked) == {200}
    assert site.status()["engine"]["starts"] == 1
    assert "can't allocate memory" in (site.folder / "state" / "engine.log").read_text(), "it was a real one"


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
