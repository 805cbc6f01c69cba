"""The lineage of an adapter's versions, as a graph and as text."""

import logging
from collections import defaultdict
from dataclasses import dataclass

from server.registry import version_dir
from server.registry.registry import HEAD, IMPORTED, AdapterRegistry
from umbel.adapter import AdapterManifest, AdapterRef
from umbel.errors import RegistryError
from umbel.printable import one_line

log = logging.getLogger("umbel")


@dataclass(frozen=True)
class Node:
    """One version with its parents, aliases and state."""

    manifest: AdapterManifest
    parents: tuple[AdapterRef, ...]
    """The version that training started from, then those of late updates; only versions of this registry."""
    pointers: tuple[str, ...]
    state: str
    """State of the version's round: `promoted`, `rejected`, `published` …; empty for the untrained adapter."""
    pruned: bool
    """True when the weights were removed."""

    @property
    def ref(self) -> AdapterRef:
        return self.manifest.ref


def graph(registry: AdapterRegistry, name: str) -> list[Node]:
    """Return an adapter's versions, oldest first; without aliases, and with a warning, where their log is damaged."""
    pointers: defaultdict[AdapterRef, list[str]] = defaultdict(list)
    try:
        for alias, ref in registry.pointers(name).items():
            pointers[ref].append(alias)
    except RegistryError as damage:  # the versions are there all the same
        log.warning("registry.damaged the aliases of %s are not known: %s", name, damage)
    states = {record.version: str(record.state) for record in registry.rounds.all(name)}
    latest: dict[str, AdapterRef] = {}
    nodes = []
    for manifest in registry.versions(name):
        ref = manifest.ref
        parents = tuple(latest[digest] for digest in manifest.ancestors if digest in latest)
        pruned = (registry.directory(ref) / version_dir.PRUNED).is_file()
        nodes.append(Node(manifest, parents, tuple(pointers[ref]), states.get(ref.version, ""), pruned))
        latest[manifest.digest] = ref
    return nodes


def ancestry(nodes: list[Node], of: set[AdapterRef]) -> list[Node]:
    """Return the versions in `of` and all their ancestors, oldest first."""
    wanted = set(of)
    for node in reversed(nodes):
        if node.ref in wanted:
            wanted.update(node.parents)
    return [node for node in nodes if node.ref in wanted]


def text(nodes: list[Node]) -> str:
    """Format one line per version; children stand below their parent, indented unless they lead to `head`."""
    children: defaultdict[AdapterRef | None, list[Node]] = defaultdict(list)
    there = {node.ref for node in nodes}
    for node in nodes:
        children[next((parent for parent in node.parents if parent in there), None)].append(node)
    head = {node.ref for node in nodes if HEAD in node.pointers}
    main = {node.ref for node in ancestry(nodes, head)}
    lines: list[str] = []
    # A stack, not recursion: a chain is as long as there were rounds.
    stack = [(node, 0) for node in reversed(children[None])]
    while stack:
        node, depth = stack.pop()
        lines.append("  " * depth + ("└ " if depth else "") + describe(node))
        own = sorted(children[node.ref], key=lambda child: (child.ref in main, child.ref))
        stack += [(child, depth + (child is not own[-1])) for child in reversed(own)]
    return "\n".join(lines)


def describe(node: Node) -> str:
    """Format a version: round, strategy, sites with their shares, further parents, aliases, state."""
    manifest = node.manifest
    parts = [str(node.ref)]
    if manifest.round:
        parts.append(f"round {manifest.round} {manifest.strategy}")
    elif manifest.strategy == IMPORTED:
        parts.append(IMPORTED)
    parts += [f"{site} {share:.2f}" for site, share in sorted(manifest.weights.items())]
    parts += [f"also from {parent}" for parent in node.parents[1:]]
    parts += [f"[{mark}]" for mark in (*node.pointers, "pruned" if node.pruned else "") if mark]
    return one_line("  ".join([*parts, *([node.state] if node.state not in ("", "promoted") else [])]))
