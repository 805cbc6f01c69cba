"""A ServerApp in a process of its own, over sites that live on in another process, and a gc of a registry."""

from pathlib import Path

import pytest
from flwr.supercore.task_identity import TaskIdentity

from server.registry import retention
from server.registry.registry import AdapterRegistry
from tests.toys.federation import World
from tests.toys.grid import Clock, ToyGrid
from tests.toys.rehearsal import rehearse

SITES = ("a", "b")


class Centre(World):
    """A World whose sites run in another process."""

    def __init__(self, root: Path, sockets: Path) -> None:
        self.root, self.clock = root, Clock()
        self.grid = ToyGrid(self.clock, {node: sockets / f"{site}.sock" for node, site in enumerate(SITES, start=1)})


def collect(root: Path) -> None:
    """Do the work of `umbel adapter gc --drop-ancestors --yes`."""
    registry = AdapterRegistry(root)
    retention.collect(registry, who="eva", why="too many", drop_ancestors=True)
    registry.close()


def life(what: str, root: str, sockets: str) -> None:
    if what == "gc":
        return collect(Path(root))
    with pytest.MonkeyPatch.context() as patch:
        for field in ("_task_id", "_run_id", "_node_id"):
            patch.setattr(TaskIdentity, field, 1)
        return Centre(Path(root), Path(sockets)).start().close()


if __name__ == "__main__":
    rehearse(life)
