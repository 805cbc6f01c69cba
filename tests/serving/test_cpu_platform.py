"""SGLang's platform for any CPU. Each test asks a process of its own, since activating it changes torch for good."""

import json
import os
import subprocess
import sys
from typing import Any

SCRIPT = """
import json, pkgutil, sys, torch
torch.accelerator.is_available = lambda: sys.argv[1] == "accelerator"
from serving import cpu_platform
empty = torch.empty
name = cpu_platform.activate()
found = {"name": name, "torch": torch.empty is empty}
if name:
    platform = pkgutil.resolve_name(name)()
    pinned = torch.zeros(2, pin_memory=True)
    with torch.device("meta"):
        there = [torch.tensor([1]), torch.empty(2), torch.zeros(2), torch.ones(2), torch.arange(2), torch.full((2,), 7)]
    found |= {
        "device": platform.get_device(), "attention": platform.get_default_attention_backend(),
        "memory": platform.get_available_memory(), "total": platform.get_device_total_memory(),
        "used": platform.get_current_memory_usage(), "pinned": pinned.pin_memory() is pinned,
        "kept": torch.full((2,), 7, dtype=torch.int64, pin_memory=True).tolist(),
        "in context": [made.device.type for made in there],
    }
print("found:", json.dumps(found))
"""


def found(machine: str = "plain", **environment: str) -> dict[str, Any]:
    """Return what the script finds on a machine with or without an accelerator."""
    inherited = {name: value for name, value in os.environ.items() if name != "SGLANG_USE_CPU_ENGINE"}
    said = subprocess.run(
        [sys.executable, "-c", SCRIPT, machine],
        check=True, capture_output=True, text=True, env={**inherited, **environment},
    ).stdout  # fmt: skip
    line = next(line for line in said.splitlines() if line.startswith("found: "))
    return dict(json.loads(line.removeprefix("found: ")))


def test_it_steps_aside_for_an_accelerator_and_for_sglangs_own_cpu_engine() -> None:
    aside = {"name": None, "torch": True}
    assert found("accelerator") == aside
    assert found(SGLANG_USE_CPU_ENGINE="1") == aside


def test_without_an_accelerator_sglang_gets_main_memory_and_torch_pins_nothing() -> None:
    said = found()
    assert (said["name"], said["torch"]) == ("serving.cpu_platform.PortableCpuPlatform", False)
    assert (said["device"], said["attention"]) == ("cpu", "torch_native")
    free, total = said["memory"]
    assert 0 < free < total == said["total"]
    assert 0 < said["used"] < total
    assert (said["pinned"], said["kept"]) == (True, [7, 7])
    assert said["in context"] == ["meta"] * 6, "the device of a context holds for all of them"
