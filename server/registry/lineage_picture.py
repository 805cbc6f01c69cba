"""Draw the lineage of an adapter: versions from left to right, the path to `head` on one line, branches below."""

from pathlib import Path

from server.registry.lineage import Node, ancestry
from server.registry.registry import HEAD
from umbel.adapter import AdapterRef
from umbel.errors import ConfigError

COLOURS = {"promoted": "#2a7f4f", "rejected": "#b3402a", "": "#777777"}
"""State of the version's round → colour."""
OPEN = "#c78f1b"
"""Colour of a version whose round is not over."""


def draw(nodes: list[Node], into: Path) -> None:
    """Write the picture in the format of the file's suffix (.svg, .png, .pdf).

    Raises ConfigError where matplotlib is not installed or does not know the format.
    """
    try:
        from matplotlib.figure import Figure  # without pyplot: no display, no state that outlives the call
    except ModuleNotFoundError as error:
        raise ConfigError(f"a picture needs matplotlib ({error}); pip install 'umbel[plots]'") from error
    places = _places(nodes)
    depth = max(-y for _, y in places.values()) if places else 0
    figure = Figure(figsize=(max(4.0, 1.3 * len(nodes) + 1), 2.2 + 0.9 * depth), layout="constrained")
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.margins(0.12, 0.35)
    for node in nodes:
        x, y = places[node.ref]
        for parent in node.parents:
            if parent in places:
                px, py = places[parent]
                line = "-" if parent == node.parents[0] else ":"
                axes.plot((px, x), (py, y), line, color="#999999", zorder=1, gid=f"{parent}→{node.ref}")
        colour = COLOURS.get(node.state, OPEN)
        axes.scatter(x, y, s=220, color="white" if node.pruned else colour, edgecolors=colour, zorder=2)
        marks = ", ".join(node.pointers)
        axes.annotate(f"v{node.ref.version}\n{marks}", (x, y), (0, 12), textcoords="offset points", ha="center",
                      fontsize=8, fontweight="bold" if marks else "normal")  # fmt: skip
        sites = f"{len(node.manifest.weights)} sites" if node.manifest.weights else ""
        axes.annotate(f"{node.manifest.strategy}\n{sites}", (x, y), (0, -14), textcoords="offset points", ha="center",
                      va="top", fontsize=7, color="#555555")  # fmt: skip
    try:
        figure.savefig(into)
    except ValueError as error:
        raise ConfigError(f"{into}: {error}") from error
    except OSError as error:
        raise ConfigError(f"{into}: cannot be written ({error.strerror}); name a file in a folder") from error


def _places(nodes: list[Node]) -> dict[AdapterRef, tuple[int, int]]:
    """Version → (column, row): one column each; row 0 is the path to `head`, a branch has its parent's row − 1."""
    main = {node.ref for node in ancestry(nodes, {node.ref for node in nodes if HEAD in node.pointers})}
    places: dict[AdapterRef, tuple[int, int]] = {}
    for column, node in enumerate(nodes):
        above = [places[parent][1] for parent in node.parents[:1] if parent in places]
        onward = not above or node.ref in main
        places[node.ref] = (column, 0 if onward else above[0] - 1)
    return places
