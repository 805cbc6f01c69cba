"""`packed_base`: a base of demo, benchmarks and checks packed in 4 bits, made once beside itself."""

import shutil
from pathlib import Path
from typing import Any

from serving.four_bit.library import bitsandbytes
from serving.four_bit.pack import pack
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import BaseOrigin
from umbel.base.packed import packing_of
from umbel.base.shapes import read_config
from umbel.errors import UmbelError


def packed_base(base: Path) -> Path:
    """Pack a base unless that was done before; return the packed directory."""
    packed = base.with_name(f"{base.name}-nf4")
    if not _is_of(packed, base):
        shutil.rmtree(packed, ignore_errors=True)
        pack(base, packed)
    return packed


def _is_of(packed: Path, base: Path) -> bool:
    """Return whether a directory is whole and was packed from this base."""
    try:
        origin = BaseOrigin.read(packed, BaseFingerprint.of(packed))
    except UmbelError:  # none is there, or one of another release
        return False
    return origin is not None and origin.base == BaseFingerprint.of(base)


def reference(base: Path, dtype: Any) -> Any:
    """Load a base with `transformers`, and with bitsandbytes where it is packed, to compare with."""
    import transformers

    if packing_of(read_config(base)):
        bitsandbytes()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # or its layers repack their bytes at first use, and round the scales
    return model.eval()
