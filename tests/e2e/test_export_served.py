"""A version, exported or as it lies in the registry, answers in stock SGLang with the tokens of transformers + peft."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import peft
import pytest
import torch
import transformers

from scripts.tools.processes import free_port
from scripts.tools.trial_site import PATIENCE_S, RANK, random_adapter
from server.registry.peft import export as adapter_export
from server.registry.pin import Pin
from server.registry.registry import AdapterRegistry
from tests.e2e.test_served_tokens import next_ids
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.shapes import LINEARS, linear_shapes

pytestmark = pytest.mark.e2e

TOKENS = 32
PROMPTS = ("Return the number of", "import os", "The quick brown fox", "one two three four")


@pytest.fixture(scope="module")
def directories(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name in the engine → directory: `support@v1` exported, and as it lies in the registry."""
    folder = tmp_path_factory.mktemp("registry")
    shapes = linear_shapes(tiny_llama, LINEARS)
    registry = AdapterRegistry(folder / "r", create=True)
    registry.begin(
        "support", Pin(fingerprint=BaseFingerprint.of(tiny_llama), shapes=shapes, dtype="float32", rank=RANK), 0
    )
    ref = registry.publish("support", random_adapter(tiny_llama, seed=1), round=1, run_id="r", parent="p").ref
    exported = adapter_export.export(registry, ref, folder / "out", base=str(tiny_llama))
    return {"exported": exported, "registered": registry.directory(ref)}


@pytest.fixture(scope="module")
def engine(tiny_llama: Path, directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of SGLang without umbel's router; of our plugins it has only the one that lets it run on a CPU."""
    port = free_port()
    command = [
        sys.executable, "-m", "serving.launch", "--model-path", str(tiny_llama), "--port", str(port),
        "--dtype", "float32", "--enable-lora", "--max-lora-rank", str(RANK), "--max-running-requests", "8",
        "--lora-target-modules", *LINEARS, "--lora-paths", *(f"{name}={path}" for name, path in directories.items()),
    ]  # fmt: skip
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    environment = {**os.environ, "SGLANG_PLUGINS": "umbel_cpu", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + PATIENCE_S
        while not _ready(url):
            assert process.poll() is None, log.read_text(errors="replace")[-3000:]
            assert time.monotonic() < deadline, log.read_text(errors="replace")[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("name", ["exported", "registered"])
def test_greedy_tokens_equal_the_reference(
    engine: str, tiny_llama: Path, directories: dict[str, Path], name: str
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = [next_ids(base, tokenizer, prompt, TOKENS) for prompt in PROMPTS]
    adapted = peft.PeftModel.from_pretrained(base, directories[name])
    expected = [next_ids(adapted, tokenizer, prompt, TOKENS) for prompt in PROMPTS]
    assert expected != plain
    sampling = {"temperature": 0, "max_new_tokens": TOKENS, "ignore_eos": True}
    for prompt, wanted in zip(PROMPTS, expected, strict=True):
        ids = tokenizer(prompt, add_special_tokens=False).input_ids
        body = {"input_ids": ids, "sampling_params": sampling, "lora_path": name}
        reply = httpx.post(f"{engine}/generate", json=body, timeout=120).raise_for_status().json()
        assert reply["output_ids"] == wanted, prompt


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False
