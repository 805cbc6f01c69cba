"""`scripts/gpu_check` on a CPU whose device lags: it runs, checks what it says, and finds nothing wrong."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from scripts.tools.repository import REPOSITORY

pytestmark = pytest.mark.e2e


def test_every_check_passes_on_a_device_that_lags(tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [REPOSITORY / "scripts" / "gpu_check", "--base", tiny_llama, "--without", "coexec", "--out", out]
    done = subprocess.run(command, env={**os.environ, "UMBEL_LAG": "1.5"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    report: dict[str, Any] = json.loads(out.read_text())
    outcomes = {check["name"]: (check["outcome"], check["reason"]) for check in report["checks"]}
    assert outcomes == {
        "memory counted once": ("passed", ""),
        "streams": ("skipped", "no CUDA device: nothing has a stream here"),
        "tokens of the base": ("passed", ""),
        "adapter loaded": ("passed", ""),
        "tokens of the adapter": ("passed", ""),
        "job while idle": ("passed", ""),
        "users alone": ("passed", ""),
        "job beside users": ("passed", ""),
        "coexec": ("skipped", "left out by --without coexec"),
    }
    figures = {check["name"]: check["figures"] for check in report["checks"]}
    assert report["lag"] == "1.5"
    assert {"umbel", "sglang", "torch", "transformers", "peft"} <= report["machine"].keys()
    assert figures["tokens of the base"]["clear"] > 0
    assert figures["tokens of the adapter"]["tokens_that_the_base_would_not_choose"] > 0
    for name in ("job while idle", "job beside users"):
        quanta = figures[name]["quanta"]
        assert quanta["attention"]["count"] == quanta["attention_backward"]["count"] > 0
        assert figures[name]["launch_s"] > 0, "it ran on the lagging device"
    beside = figures["job beside users"]
    assert beside["most_quanta_while_waiting"] <= 1
    for each in ("0", "1"):
        seen = beside["by_quanta_per_iteration"][each]
        assert (seen["failed"], seen["requests"] >= 24) == (0, True)
