"""Checks umbel on a machine with a GPU: starts one engine on a base, runs named checks, writes one JSON.

    scripts/gpu_check --base /models/Llama-3.1-8B-Instruct --out gpu.json

Without --base it makes a tiny one. It needs torch, transformers, peft, an SGLang that this torch allows, and umbel
(`pip install -e . --no-deps`); nothing of Flower. Its status is 1 if a check failed.
"""

import argparse
import asyncio
import os
import platform
import sys
import tempfile
import time
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.tools.gpu_check.coexec import coexec
from scripts.tools.gpu_check.findings import Finding, Report
from scripts.tools.gpu_check.parity import Parity
from scripts.tools.gpu_check.site import CheckedSite, Device
from scripts.tools.gpu_check.training import Training
from scripts.tools.packed_base import packed_base
from scripts.tools.repository import REPOSITORY
from umbel.errors import UmbelError

RELEASES = ("umbel", "sglang", "torch", "transformers", "peft")
CACHE = REPOSITORY / ".cache"
TINY, SMOLLM2 = "tiny", "smollm2"


def main() -> None:
    """Parse the options, run the checks, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default=TINY, help=f"a model directory, {TINY} (default), or {SMOLLM2} (needs pip)")
    parser.add_argument("--four-bit", action="store_true", help="pack the base in 4 bits first, and check that one")
    parser.add_argument("--device", choices=("cuda", "any"), default="cuda", help="any: the CPU, where there is no GPU")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--seconds", type=float, default=60.0, help="of the blocks of the check coexec, in all")
    parser.add_argument("--without", choices=("coexec",), action="append", default=[], help="leave a check out")
    parser.add_argument("--out", type=Path, help="the JSON file; default: stdout")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        device = Device.find(options.device, options.dtype)
        base = find_base(options.base)
        base = packed_base(base) if options.four_bit else base
        report = Report(_say)
        facts = run(report, base, device, None if "coexec" in options.without else options.seconds)
    except UmbelError as error:
        sys.exit(f"{type(error).__name__}: {error}")
    text = report.json(facts)
    if options.out:
        options.out.write_text(f"{text}\n")
    else:
        print(text)
    sys.exit(1 if report.failed else 0)


def run(report: Report, base: Path, device: Device, coexec_s: float | None) -> dict[str, Any]:
    """Run all checks on a base; return the facts of the run. Without `coexec_s`, that check is left out.

    Raises EngineError if the engine does not start, TrainingError if it cannot train.
    """
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        site = CheckedSite(Path(folder), base, device)
        started_s = asyncio.run(_with_engine(report, site))
        left_out = Finding(skipped="left out by --without coexec")
        report.run_now("coexec", lambda: coexec(site, coexec_s, _say) if coexec_s is not None else left_out)
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "machine": machine(device), "base": str(base),
        "dtype": device.dtype, "lag": device.lag, "engine_start_s": round(started_s, 1),
    }  # fmt: skip


async def _with_engine(report: Report, site: CheckedSite) -> float:
    """Run the checks of one engine; return the seconds of its start."""
    began = time.perf_counter()
    try:
        ready = await site.start()
        started_s = time.perf_counter() - began
        parity, training = Parity(site), Training(site, ready)
        for name, check in {
            "memory counted once": training.memory,
            "streams": training.streams,
            "tokens of the base": parity.tokens_of_base,
            "adapter loaded": parity.load,
            "tokens of the adapter": parity.tokens_of_adapter,
            "job while idle": training.idle,
            "users alone": training.alone,
            "job beside users": training.busy,
        }.items():
            await report.run(name, check)
    finally:
        await site.stop()
    return started_s


def find_base(wanted: str) -> Path:
    """Return the directory of a base: a path, or the name of one that is made in the cache.

    Raises ConfigError for a directory that holds no model.
    """
    from umbel.base.shapes import read_config

    if wanted == TINY:
        from scripts.tools import tiny_base

        # In 4 bits transformers, the reference, computes wrong numbers where a width is no multiple of 64.
        return tiny_base.build(CACHE / "gpu-check-base", replace(tiny_base.TINY, family="llama", inner=192))
    if wanted == SMOLLM2:
        from scripts.tools import real_base

        return real_base.build()
    base = Path(wanted).resolve()
    read_config(base)
    return base


def machine(device: Device) -> dict[str, Any]:
    """Return the machine and the releases that the figures belong to."""
    import torch

    facts: dict[str, Any] = {
        "python": platform.python_version(), "processor": platform.machine(), "cores": os.cpu_count(),
        **{name: metadata.version(name) for name in RELEASES},
    }  # fmt: skip
    if device.kind == "cuda":
        gpu = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": gpu.name, "gpu_bytes": gpu.total_memory, "multiprocessors": gpu.multi_processor_count,
            "cuda": torch.version.cuda,
        }  # fmt: skip
    return facts


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
