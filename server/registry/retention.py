"""Garbage collection of a registry: plan it, and remove it. Only weights and left-overs go; manifests stay for ever."""

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from server.registry import lineage, version_dir
from server.registry.registry import PREVIOUS, AdapterRegistry
from server.registry.round_log import now
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import RegistryError
from umbel.faults import Point, reach
from umbel.transaction import transaction


@dataclass(frozen=True)
class Garbage:
    """The result of a collection, or the plan of one."""

    versions: tuple[AdapterRef, ...]
    """Versions that lose their weights; their manifests stay, with `pruned.json` beside them."""
    blobs: tuple[str, ...]
    """Names in the blob store that no version needs, those of `versions` included."""
    left_overs: tuple[Path, ...]
    """Half-written versions of killed publishers."""
    kept: tuple[str, ...] = ()
    """Damages because of which weights stay that no listed version needs."""
    freed: int = 0
    """Bytes of weights that were removed; 0 for a plan."""


def plan(registry: AdapterRegistry, *, drop_ancestors: bool = False) -> Garbage:
    """Return what can go: weights that no alias and no open round needs, and left-overs.

    Ancestors of needed versions are needed, too, unless `drop_ancestors`. Where something may be a version and cannot
    be read, weights that no listed version names stay; where an alias log is damaged, all of its adapter. Raises
    RegistryError while an alias or an open round points to a version that is gone or damaged.
    """
    hidden = list(registry.index.unexplained(registry.lineage).values())
    goes: list[AdapterRef] = []
    kept: set[str] = set()
    every: set[str] = set()
    for name in registry.names():
        nodes = lineage.graph(registry, name)
        every |= {node.manifest.digest for node in nodes}
        gone: set[AdapterRef] = set()
        try:
            pointers = registry.pointers(name)
            needed = set(pointers.values())
            gone = {ref for alias, ref in pointers.items() if alias != PREVIOUS} - {node.ref for node in nodes}
        except RegistryError as damage:
            hidden.append(str(damage))
            needed = {node.ref for node in nodes}
        _require_there(registry, gone)
        if not drop_ancestors:
            needed = {node.ref for node in lineage.ancestry(nodes, needed)}
        goes += [
            node.ref for node in nodes if node.ref not in needed and not (node.pruned and _gone(registry, node.ref))
        ]
        kept |= {node.manifest.digest for node in nodes if node.ref in needed}
    unused = {
        digest for digest in registry.blobs.digests() if digest not in kept and not (hidden and digest not in every)
    }
    return Garbage(tuple(goes), tuple(sorted(unused)), tuple(version_dir.unfinished(registry.root)), tuple(hidden))


def collect(registry: AdapterRegistry, *, who: str, why: str, drop_ancestors: bool = False) -> Garbage:
    """Remove what `plan` returns; publishers wait meanwhile. After a kill at any point the next call goes on."""
    with transaction(registry.index.database):
        garbage = plan(registry, drop_ancestors=drop_ancestors)
        record = version_dir.Pruned(at=now(), who=who, why=why).model_dump_json().encode()
        for ref in garbage.versions:
            peft_dir.replace_durably(registry.directory(ref) / version_dir.PRUNED, record)
            reach(Point.GC_MARKED)
            (registry.directory(ref) / peft_dir.WEIGHTS).unlink(missing_ok=True)
            reach(Point.GC_UNLINKED)
        freed = sum(_remove(registry, garbage))
    return replace(garbage, freed=freed)


def _require_there(registry: AdapterRegistry, gone: set[AdapterRef]) -> None:
    """Raise RegistryError where something points to versions that are `gone`: what they need is not known."""
    if not gone:
        return
    raise RegistryError(
        f"{registry.root}: an alias points to {', '.join(map(str, sorted(gone)))}, which is not here, so that what it "
        "needs is not known; restore it from your backup, or point the alias elsewhere with `umbel adapter alias`"
        + "".join(f"\n{registry.index.missing(ref)}" for ref in sorted(gone))
    )


def _gone(registry: AdapterRegistry, ref: AdapterRef) -> bool:
    """True when a pruned version's link to its weights is gone; a killed gc may have left it."""
    return not os.path.lexists(registry.directory(ref) / peft_dir.WEIGHTS)


def _remove(registry: AdapterRegistry, garbage: Garbage) -> Iterator[int]:
    for digest in garbage.blobs:
        yield registry.blobs.remove(digest)
        reach(Point.GC_REMOVED)
    for path in garbage.left_overs:
        shutil.rmtree(path)
