"""One site under load and under fire: promotions, kills, bad input. Bounds are counted, never timed."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from client.rounds.folder import RoundFolder
from scripts.tools.processes import free_port
from scripts.tools.trial_site import RANK, random_adapter, wait_until
from serving.engine import require_free_port
from tests.toys.exposition import counters, lint, samples
from tests.toys.sites.site_process import SiteProcess, kill
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import EngineError

pytestmark = pytest.mark.e2e

REQUESTS, AT_A_TIME = 500, 16
METRICS_PORT = free_port()
EXTRA = f"""
checkpoint_s = 0.05
[slo]
ttft_ms = 60000
tpot_ms = 60000
[metrics]
port = {METRICS_PORT}
"""
"""Checkpoints every few steps, and targets under which pieces always have their largest size: bits can be compared."""


@pytest.fixture(scope="module")
def site(tiny_llama: Path) -> Iterator[SiteProcess]:
    with (
        tempfile.TemporaryDirectory(prefix="umbel-") as folder,
        SiteProcess(Path(folder), tiny_llama, extra=EXTRA) as site,
    ):
        yield site


def scrape() -> str:
    return httpx.get(f"http://127.0.0.1:{METRICS_PORT}/metrics", trust_env=False, timeout=60).text


def test_only_the_users_routes_answer(site: SiteProcess) -> None:
    paths = (
        "/server_info",
        "/get_model_info",
        "/generate",
        "/docs",
        "/openapi.json",
        "/v1/embeddings",
        "/api/chat",
        "/",
    )
    for path in paths:
        for method in ("GET", "POST"):
            assert site.users.request(method, path, json={}).status_code == 404, path
    admin = ("/load_lora_adapter", "/unload_lora_adapter", "/flush_cache", "/umbel/aliases", "/umbel/drain")
    for path in admin:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic x"}):
            assert site.users.post(path, json={}, headers=headers).status_code == 404, path
    assert site.users.get("/health").status_code == 200
    assert site.users.get("/ready").status_code == 200
    models = [card["id"] for card in site.users.get("/v1/models").json()["data"]]
    assert models[:2] == ["tiny", "support"]
    assert site.users.get("/v1/models/support").json()["id"] == "support"
    unknown = site.users.post("/v1/chat/completions", json={"model": "suport", "messages": []})
    assert unknown.status_code == 404
    assert "support" in unknown.json()["error"]["message"]


def test_the_key_is_in_no_log_and_no_command_line(site: SiteProcess) -> None:
    key = (site.folder / "state" / "admin.key").read_text()
    for log in (site.log, site.folder / "state" / "engine.log"):
        assert key not in log.read_text()
    assert all(key not in " ".join(process.cmdline()) for process in site.family())
    assert (site.folder / "state").stat().st_mode & 0o077 == 0
    for name in ("site.sock", "operator.sock"):
        assert (site.folder / "state" / name).stat().st_mode & 0o077 == 0
    forced = site.control.post("/adapters/support@v1/promote", params={"forced": "true"})
    assert (forced.status_code, forced.json()["error"]["type"]) == (404, "NotFound"), "only the operator's has it"


def test_the_trainer_has_no_base_of_its_own(site: SiteProcess) -> None:
    training = site.status()["training"]
    assert training["frozen_tensors"] > 0
    assert training["shared_tensors"] == training["frozen_tensors"]


def test_no_process_on_a_cpu_loads_kernels_of_an_accelerator(site: SiteProcess) -> None:
    engine = [process for process in site.family() if "python" in process.name() or "sglang" in process.name()]
    mapped = {Path(part.path).name for process in engine for part in process.memory_maps()}
    assert {"libtorch_cpu.so"} <= mapped, "these are the engine's processes"
    assert not [name for name in mapped if "cute_dsl" in name], "flashinfer's"


def test_training_while_serving_runs_one_quantum_at_a_time(site: SiteProcess) -> None:
    parent = random_adapter(site.model, seed=7, b_std=0.0)
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(stream, site.url, "tiny", 64) for _ in range(24)]
        assert site.submit("train-1", parent, steps=30).status_code == 200
        assert site.submit("train-1", parent, steps=30).status_code == 200, "the same order again is no change"
        assert site.submit("train-1", random_adapter(site.model, seed=8), steps=30).status_code == 409
        report = site.wait_round("train-1")
        assert all(future.result()["status"] == 200 for future in futures)
    assert (report["state"], report["steps"]) == ("done", 30), report
    assert report["num_loss_tokens"] > 0
    update = site.control.get("/adapters/support/rounds/train-1/update").content
    assert peft_dir.digest(update) == report["update"]
    assert update != parent
    training = site.status()["training"]
    assert training["hook_calls"]["busy"] > 0
    assert training["most_quanta_while_waiting"] <= 1


def test_what_it_does_can_be_scraped_and_read_on_one_screen(site: SiteProcess) -> None:
    text = scrape()
    assert lint(text) == []
    seen = samples(text)
    assert (seen["umbel_engine_up"], seen["umbel_cotrainer_up"]) == (1, 1)
    assert seen['umbel_rounds_total{state="done"}'] >= 1
    assert seen["umbel_trained_tokens_total"] > 0
    assert sum(value for name, value in seen.items() if name.startswith("umbel_quanta_total")) > 0
    assert seen["umbel_requests_total"] >= 24, "the streams of the test before, and the measurements"
    assert seen['umbel_slo_target_seconds{kind="ttft"}'] > 0
    command = [sys.executable, "-m", "umbel.cli", "status", str(site.file)]
    screen = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"engine ready at {site.url}" in screen
    assert "support: the base answers users" in screen
    assert "\x1b" not in screen
    assert max(map(len, screen.splitlines())) <= 80


def test_promotions_under_load_lose_and_mix_nothing(site: SiteProcess) -> None:
    """Three promotions under 500 streamed requests; each response is one version's own answer."""
    blobs = {version: random_adapter(site.model, seed=version) for version in (1, 2, 3)}
    replies: list[dict[str, Any]] = []
    stop = threading.Event()

    def keep_asking() -> None:
        while not stop.is_set() or len(replies) < REQUESTS:
            replies.append(stream(site.url, "support", 16))

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        askers = [pool.submit(keep_asking) for _ in range(AT_A_TIME)]
        for version, blob in blobs.items():
            site.deploy(version, blob)
            while len(replies) < REQUESTS * version // 4:
                stop.wait(0.1)
        stop.set()
        for asker in askers:
            asker.result()
    assert len(replies) >= REQUESTS
    assert [reply for reply in replies if reply["status"] != 200 or not reply["complete"]] == []
    # Greedy decoding: all answers of one version are the same text, and no two versions answer alike.
    texts: dict[str, set[str]] = {}
    for reply in replies:
        texts.setdefault(reply["version"], set()).add(reply["text"])
    assert set(texts) == {"base", "support@v1", "support@v2", "support@v3"}
    assert all(len(answers) == 1 for answers in texts.values()), texts
    assert len({next(iter(answers)) for answers in texts.values()}) == 4
    aliases = site.status()["aliases"]["support"]
    assert aliases == {"live": "support@v3", "previous": "support@v2", "shadow": None}


def test_roll_back_and_forth(site: SiteProcess) -> None:
    assert site.control.post("/adapters/support/rollback").json() == {"live": "support@v2"}
    assert stream(site.url, "support", 4)["version"] == "support@v2"
    assert site.control.post("/adapters/support/rollback").json() == {"live": "support@v3"}
    assert stream(site.url, "support", 4)["version"] == "support@v3"


def test_bad_adapters_are_refused_and_serving_goes_on(site: SiteProcess) -> None:
    good = random_adapter(site.model, seed=40)
    tensors = peft_dir.decode(good)
    first = next(iter(tensors))

    def changed(array: np.ndarray[Any, Any]) -> bytes:
        return peft_dir.encode({**tensors, first: array})

    nan = changed(np.full_like(tensors[first], np.nan))
    cases = [
        (site.manifest(40, nan), nan, "NaN"),
        (site.manifest(40, changed(tensors[first][:1])), changed(tensors[first][:1]), "shape"),
        (site.manifest(40, good, base="0" * 64), good, "base"),
        (site.manifest(40, good, rank=RANK + 1), good, "rank"),
        (site.manifest(40, good, name="other"), good, "trains no adapter"),
        (site.manifest(40, good, digest="0" * 64), good, "bytes"),
        (site.manifest(40, b"junk"), b"junk", "safetensors"),
        (site.manifest(3, good), good, "already"),
    ]
    for manifest, blob, reason in cases:
        reply = site.push(manifest, blob)
        assert reply.status_code in (404, 409, 422), (reason, reply.text)
        assert reason in reply.json()["error"]["message"]
    wrong_base = site.control.post("/adapters/support/rounds/k", content=good, headers={"x-umbel-order": "bm9wZQ=="})
    assert wrong_base.status_code == 422
    assert site.control.post("/adapters/support@v99/promote").status_code == 404
    assert stream(site.url, "support", 4)["version"] == "support@v3"


def test_a_discarded_shadow_is_gone(site: SiteProcess) -> None:
    blob = random_adapter(site.model, seed=50)
    manifest = site.manifest(50, blob)
    site.push(manifest, blob)
    site.wait_judged(manifest.ref)
    assert site.control.post("/adapters/support@v50/discard").json()["state"] == "rejected"
    assert site.control.post("/adapters/support@v50/promote").status_code == 409
    assert site.users.post("/v1/completions", json={"model": "support@v50", "prompt": "x"}).status_code == 404


def test_a_second_site_on_the_same_port_or_state_is_told_so(site: SiteProcess) -> None:
    with pytest.raises(EngineError, match=str(site.port)):
        require_free_port("127.0.0.1", site.port)
    second = subprocess.run(
        [sys.executable, "-m", "umbel.cli", "serve", str(site.file)], capture_output=True, text=True
    )
    assert second.returncode == 1
    assert "another `umbel serve`" in second.stderr
    assert "Traceback" not in second.stderr


def test_killed_engine_and_killed_daemon_come_back_with_the_live_version_and_the_round(site: SiteProcess) -> None:
    parent, steps = random_adapter(site.model, seed=7, b_std=0.0), 400
    assert site.submit("train-2", parent, steps=steps).status_code == 200
    checkpoint = RoundFolder(site.state_dir / "rounds" / "support" / "train-2")
    reached = wait_until(checkpoint.steps, "a checkpoint of the round")
    before = counters(scrape())
    kill(site.engine_process())
    site.wait_ready(starts=2)
    after = counters(scrape())
    assert {name: value for name, value in before.items() if after[name] < value} == {}, "no counter went back"
    assert after["umbel_engine_starts_total"] == 2
    assert stream(site.url, "support", 4)["version"] == "support@v3"
    left = site.kill()
    assert psutil.wait_procs(left, timeout=30)[1] == [], "the engine dies with its daemon"
    site.start()
    assert stream(site.url, "support", 4)["version"] == "support@v3"
    assert stream(site.url, "support@previous", 4)["version"] == "support@v2"
    report = site.wait_round("train-2")
    assert (report["state"], report["steps"]) == ("done", steps), "a round that was cut off goes on"
    assert site.status()["training"]["quanta"].get("step", {"count": 0})["count"] <= steps - reached
    assert not checkpoint.checkpoint.exists()
    assert site.submit("train-3", parent, steps=steps).status_code == 200
    assert site.wait_round("train-3")["update"] == report["update"], "to the bytes of one that was not cut off"
    ref = site.deploy(60, random_adapter(site.model, seed=60))
    assert ref == AdapterRef("support", 60)
    assert stream(site.url, "support", 4)["version"] == "support@v60"


def stream(url: str, model: str, tokens: int) -> dict[str, Any]:
    """One streamed answer: its status, version, text, and whether it came to its end."""
    body = {"model": model, "prompt": "Return a list of", "max_tokens": tokens, "temperature": 0, "stream": True}
    body |= {"ignore_eos": True, "skip_special_tokens": False}
    text, complete = "", False
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as reply:
        for line in reply.iter_lines():
            payload = line.removeprefix("data:").strip()
            if payload == "[DONE]":
                complete = True
            elif payload:
                text += json.loads(payload)["choices"][0]["text"]
        version = reply.headers.get("x-umbel-adapter")
        return {"status": reply.status_code, "version": version, "text": text, "complete": complete}
