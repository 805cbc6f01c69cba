"""Views of a registry as JSON values, the same for the command line and the REST API."""

from dataclasses import asdict
from typing import Any

from server.registry import diff as adapter_diff
from server.registry import identity, lineage, retention, run_lock
from server.registry.registry import HEAD, LIVE, SHADOW, AdapterRegistry
from server.registry.retention import Garbage
from server.registry.version_dir import inspect_signature, signature_of
from umbel.adapter import AdapterRef
from umbel.errors import NotFound, RegistryError
from umbel.signing import PublicKey


def ls(registry: AdapterRegistry) -> list[dict[str, Any]]:
    """List every version: its round, strategy, state and sites, and the aliases that point to it."""
    return [
        {
            "ref": str(node.ref),
            "round": node.manifest.round,
            "state": node.state,
            "strategy": node.manifest.strategy,
            "sites": sorted(node.manifest.weights),
            "aliases": list(node.pointers),
            "pruned": node.pruned,
            "created": node.manifest.created,
        }
        for name in registry.names()
        for node in lineage.graph(registry, name)
    ]


def show(registry: AdapterRegistry, ref: str) -> dict[str, Any]:
    """Return a version's manifest, as it was published; raise NotFound."""
    return registry.manifest(registry.resolve(ref)).model_dump(mode="json")


def diff(registry: AdapterRegistry, old: str, new: str) -> dict[str, Any]:
    """Compare two versions; raise NotFound, or RegistryError for a damaged one."""
    return asdict(adapter_diff.compare(registry.read(registry.resolve(old)), registry.read(registry.resolve(new))))


def fleet(registry: AdapterRegistry, name: str | None = None) -> list[dict[str, Any]]:
    """List every adapter, or the one with that name: its pointers, its last round, and whether a run is under way.

    `sites` is site → share in the last round's version, `reasons` site → why it was left out, skipped the round, or for
    its verdict; "*" is the round as a whole. `damage`, in a list of all, says why nothing else is known of one. Raises
    NotFound for an unknown name, RegistryError for a damaged one.
    """
    if name is None:
        return [_told(registry, one) for one in registry.names()]
    _require(registry, name)
    return [_adapter(registry, name)]


def _told(registry: AdapterRegistry, name: str) -> dict[str, Any]:
    """Return an adapter's row; the damage of one is not the end of a list of all."""
    try:
        return _adapter(registry, name)
    except (RegistryError, NotFound) as damage:
        unknown = dict.fromkeys((LIVE, HEAD, SHADOW, "round", "state", "at"))
        return {
            "adapter": name, "damage": str(damage), **unknown,
            "under_way": run_lock.under_way(registry.root, name), "sites": {}, "reasons": {},
        }  # fmt: skip


def _adapter(registry: AdapterRegistry, name: str) -> dict[str, Any]:
    pointers = {alias: str(ref) for alias, ref in registry.pointers(name).items()}
    last = next(reversed(registry.rounds.all(name)), None)
    version = None if last is None or last.version is None else registry.manifest(AdapterRef(name, last.version))
    return {
        "adapter": name,
        "damage": None,
        **{alias: pointers.get(alias) for alias in (LIVE, HEAD, SHADOW)},
        "under_way": run_lock.under_way(registry.root, name),
        "round": last.round if last else None,
        "state": str(last.state) if last else None,
        "at": last.at if last else None,
        "sites": dict(sorted(version.weights.items())) if version else {},
        "reasons": last.reasons if last else {},
    }


def history(registry: AdapterRegistry, name: str) -> list[dict[str, Any]]:
    """List every move of an adapter's aliases, oldest first: time, versions, person, reason and run."""
    _require(registry, name)
    return [move.model_dump(exclude={"seal"}) for move in registry.moves(name)]


def nodes(registry: AdapterRegistry, ref: str) -> list[lineage.Node]:
    """Return all versions of an adapter (`support`), or one with its ancestors (`support@v3`); raise NotFound."""
    name, at, _ = ref.partition("@")
    if not at:
        _require(registry, name)
        return lineage.graph(registry, name)
    return lineage.ancestry(lineage.graph(registry, name), {registry.resolve(ref)})


def verify(registry: AdapterRegistry, ref: str | None = None, key: PublicKey | None = None) -> dict[str, Any]:
    """Read one version, or everything, and return the number of versions and each damage, file by file.

    With `key`, a version that was signed with another key is damaged; versions without a signature are `unsigned`.
    `foreign`, where there is any, names what lies in the registry and is none of its files: no damage.
    """
    refs = [manifest.ref for name in registry.names() for manifest in registry.versions(name)]
    every = refs if ref is None else [registry.resolve(ref)]
    damages = [damage for one in every for damage in _damages(registry, one, key)]
    foreign: list[str] = []
    if ref is None:
        damages = registry.index.inspect() + list(registry.index.damaged().values()) + damages + _files(registry)
        foreign = identity.strangers(registry.root) + [
            f"{registry.blobs.where(name)}: no weights of a version; nothing reads it; move it elsewhere"
            for name in registry.blobs.foreign()
        ]
    unsigned = [str(one) for one in every if key is not None and not signature_of(registry.directory(one))]
    more = {**({} if key is None else {"unsigned": unsigned}), **({"foreign": foreign} if foreign else {})}
    return {"versions": len(every), "damages": damages, **more}


def gc(registry: AdapterRegistry, *, apply: bool, drop_ancestors: bool, who: str, why: str) -> dict[str, Any]:
    """Name the weights and left-overs that are not needed; with `apply`, remove them."""
    garbage: Garbage = (
        retention.collect(registry, who=who, why=why, drop_ancestors=drop_ancestors)
        if apply
        else retention.plan(registry, drop_ancestors=drop_ancestors)
    )
    return {
        "versions": [str(ref) for ref in garbage.versions],
        "blobs": list(garbage.blobs),
        "left_overs": [str(path) for path in garbage.left_overs],
        "kept": list(garbage.kept),
        "freed": garbage.freed,
        "removed": apply,
    }


def _damages(registry: AdapterRegistry, ref: AdapterRef, key: PublicKey | None) -> list[str]:
    if key is None:
        return registry.verify(ref)
    return registry.verify(ref) + inspect_signature(registry.directory(ref), registry.manifest(ref), key)


def _files(registry: AdapterRegistry) -> list[str]:
    """Name each damage of pins and alias logs."""
    damages = []
    for name in sorted({*registry.names(), *identity.adapters(registry.root)}):
        for read in (registry.pin, registry.moves):
            try:
                read(name)
            except RegistryError as error:
                damages.append(str(error))
        damages += _dangling(registry, name)
    return damages


def _dangling(registry: AdapterRegistry, name: str) -> list[str]:
    """Name the aliases whose versions are gone."""
    try:
        aliases = registry.aliases(name)
    except RegistryError:
        return []  # `_files` names a damaged log
    there = {manifest.ref for manifest in registry.versions(name)}
    return [
        f"{registry.root}: {name}@{alias} is {ref}, which is not here; restore it from your backup, or point {alias} "
        "to another version with `umbel adapter alias`"
        for alias, ref in aliases.items()
        if ref not in there
    ]


def _require(registry: AdapterRegistry, name: str) -> None:
    if name not in registry.names():
        raise NotFound(f"{name!r} is not in {registry.root}; there is {', '.join(registry.names()) or 'nothing'}")
