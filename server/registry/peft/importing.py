"""`take_in`: begin an adapter with one that was trained elsewhere, so that the next run goes on with it."""

from pathlib import Path
from typing import Literal

import numpy as np

from server.registry import run_lock
from server.registry.pin import Pin
from server.registry.registry import HEAD, IMPORTED, LIVE, AdapterRegistry
from umbel import peft_dir, peft_import
from umbel.adapter import AdapterManifest
from umbel.base.fingerprint import BaseFingerprint
from umbel.base.origin import BaseOrigin
from umbel.base.shapes import adaptable, linear_shapes
from umbel.errors import Conflict
from umbel.peft_child import Order, look_in_child

LARGEST_RANK = 512
"""Largest rank that a site can be set to serve."""
SEED = 0
"""Seed that fills the modules and ranks which an adapter lacks, and the untrained version."""


def take_in(
    registry: AdapterRegistry,
    name: str,
    directory: Path,
    *,
    base: Path,
    target_modules: tuple[str, ...],
    dtype: Literal["float32", "bfloat16", "float16"],
    who: str,
    why: str,
) -> AdapterManifest:
    """Publish the adapter in a PEFT directory as v1, after the untrained v0; `head` and `live` point to it.

    `base` is the directory of the model that the sites serve in `dtype`, `target_modules` are the layers that they
    adapt. What the adapter lacks of those is filled so that it changes nothing and can be trained. An import that a
    kill cut short is finished by the next one. Raises Conflict where the registry has the adapter, ConfigError or
    UnsupportedModel for a base or modules that cannot be used, and AdapterError for an adapter that does not fit it.
    """
    target_modules = adaptable(target_modules)
    shapes = linear_shapes(base, target_modules)
    look_in_child(Order(path=directory, shapes=shapes, max_rank=LARGEST_RANK, target_modules=target_modules))
    found = peft_import.read(directory, shapes, LARGEST_RANK, target_modules, np.random.default_rng(SEED))
    blob = peft_dir.encode(found.tensors)
    with run_lock.exclusive(registry.root, name, run_lock.POLL_S):  # `under_way` holds it for a moment
        _require_new(registry, name, peft_dir.digest(blob))
        fingerprint = BaseFingerprint.of(base)
        origin = None if fingerprint.dense else BaseOrigin.read(base, fingerprint)
        pin = Pin(
            fingerprint=fingerprint, kin=origin.kin if origin else "", shapes=shapes, dtype=dtype, rank=found.rank
        )
        registry.begin(name, pin, SEED)
        source = {"directory": directory.resolve().name, "sha256": found.source}
        untrained, *later = registry.versions(name)
        facts = {"strategy": IMPORTED, "options": source}
        version = (
            later[0] if later else registry.publish(name, blob, round=0, run_id="", parent=untrained.digest, **facts)
        )
        registry.point(name, {HEAD: version.ref, LIVE: version.ref}, who=who, why=why)
    return version


def _require_new(registry: AdapterRegistry, name: str, digest: str) -> None:
    """Raise Conflict where a registry has an adapter, unless it is what an import of `digest` left half done."""
    later = [manifest for manifest in registry.versions(name) if manifest.version]
    begun = any(manifest.digest != digest or manifest.round for manifest in later)
    if begun or registry.rounds.all(name) or LIVE in registry.aliases(name):
        raise Conflict(f"{name} is in {registry.root} already; choose another name, or another registry")
