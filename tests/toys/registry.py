"""A registry of one small adapter, and publishers: in this process, or in one that is to be killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from scripts.tools.repository import REPOSITORY
from server.registry.pin import Pin
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.site import BASE, SHAPES
from umbel import peft_dir
from umbel.adapter import AdapterRef

PIN = Pin(fingerprint=BASE, shapes=SHAPES, dtype="float32", rank=2)
UNTRAINED = 1000
"""Seed of `support@v0`."""


def begun(root: Path, blobs: str = "") -> AdapterRegistry:
    """Make a registry with `support@v0`."""
    registry = AdapterRegistry(root, create=True, blobs=blobs)
    registry.begin("support", PIN, seed=UNTRAINED)
    return registry


def blob(seed: int) -> bytes:
    """Return weights that are different for every seed."""
    return peft_dir.encode(PIN.initial(seed))


def publish(registry: AdapterRegistry, number: int, parent: str = "p", **facts: object) -> AdapterRef:
    """Publish the version of round `number`."""
    manifest = registry.publish(
        "support", blob(number), round=number, run_id="r", parent=parent, **{"strategy": "exact", **facts}
    )
    return manifest.ref


def grow(registry: AdapterRegistry, verdicts: str) -> list[AdapterRef]:
    """Run one round per letter, each from `head`: `a`ccepted, `r`ejected, or `o`pen; return the versions they made."""
    made = []
    first = len(registry.versions("support"))
    for number, verdict in enumerate(verdicts, start=first):
        head = registry.manifest(registry.resolve("support@head"))
        ref = publish(registry, number, head.digest, weights={"a": 0.25, "b": 0.75})
        made.append(ref)
        if verdict == "a":
            registry.accept("support", number, "r", {})
        elif verdict == "r":
            registry.rounds.record("support", number, "r", RoundState.REJECTED, reasons={"a": "worse"})
    return made


def forked(root: Path) -> AdapterRegistry:
    """Make v0 → v1 → (v2 rejected, v3 → v4); v5 is open, from v4 and a late update on v1."""
    registry = begun(root)
    grow(registry, "araa")
    parents = [registry.manifest(v(version)).digest for version in (4, 1)]
    publish(registry, 5, parents[0], parents=tuple(parents), weights={"a": 1.0}, strategy="geometric_median")
    return registry


def v(version: int) -> AdapterRef:
    return AdapterRef("support", version)


def flip(path: Path, at: int, bit: int = 1) -> None:
    """Change one bit of a file, where it lies."""
    content = bytearray(path.read_bytes())
    content[at] ^= bit
    path.write_bytes(content)


def publisher(root: Path, first: int, rounds: int, *, die_before: int = 0) -> subprocess.Popen[str]:
    """Start a process that publishes and accepts rounds, and prints each version after it is published.

    `die_before` n: it kills itself, as `kill -9` does, before its n-th call that changes the disk.
    """
    command = [sys.executable, "-m", "tests.toys.registry", str(root), str(first), str(rounds), str(die_before)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def _main(root: Path, first: int, rounds: int, die_before: int) -> None:
    registry = AdapterRegistry(root)
    calls = 0

    def counted(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object, **named: object) -> object:
            nonlocal calls
            calls += 1
            if calls == die_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        setattr(os, name, call)

    for name in ("fsync", "rename", "replace", "symlink", "mkdir"):
        counted(name)
    for number in range(first, first + rounds):
        ref = publish(registry, number)
        print(ref, flush=True)
        registry.accept("support", number, "r", {})
    print(f"calls {calls}", flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
