"""`slow_dtype`: say that a site's CPU has no instructions for its number format, without loading torch."""

from pathlib import Path

from umbel.site.config import SiteConfig

CPUINFO, DEVICES = Path("/proc/cpuinfo"), Path("/dev")
INSTRUCTIONS = {
    "bfloat16": {"avx512_bf16", "amx_bf16", "avx_ne_convert", "bf16"},
    "float16": {"avx512_fp16", "amx_fp16", "avx_ne_convert", "asimdhp"},
}
"""Number format → the flags of /proc/cpuinfo (x86-64 and ARM), one of which torch needs to compute it fast."""
ACCELERATORS = ("nvidia[0-9]*", "dxg", "kfd")
"""Files in /dev that a driver of NVIDIA, of WSL or of AMD makes."""


def slow_dtype(config: SiteConfig) -> str | None:
    """Return what is slow about `[engine].dtype` on this CPU and what to do; None if nothing is, or there is a GPU.

    None also where Linux does not say what the CPU can do.
    """
    engine = config.engine
    flags = _cpu_flags()
    needed = INSTRUCTIONS.get(engine.dtype, flags)
    if not on_cpu(engine.device) or not flags or needed & flags:
        return None
    return (
        f"[engine].dtype is {engine.dtype}, which this CPU has no instructions for: prompts and training take "
        'several times as long; set dtype = "float32" at every site of the federation (they must agree), or use a '
        f"machine with a GPU, or with {' or '.join(sorted(needed))} in /proc/cpuinfo"
    )


def on_cpu(device: str) -> bool:
    """Return whether an engine computes on the CPU if [engine].device says `device`."""
    found = any(next(DEVICES.glob(pattern), None) for pattern in ACCELERATORS)
    return device == "cpu" or (device == "auto" and not found)


def _cpu_flags() -> set[str]:
    """Return the flags of the first core; empty where Linux does not tell them."""
    if not CPUINFO.is_file():
        return set()
    pairs = (line.partition(":") for line in CPUINFO.read_text(errors="replace").splitlines())
    return next((set(value.split()) for key, _, value in pairs if key.strip() in ("flags", "Features")), set())
