"""Whole federations in one process: the real ServerApp loop, ClientApp, strategies and registry, with toy sites."""

import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.supercore.task_identity import TaskIdentity

from scripts.tools.repository import REPOSITORY
from server.config import RunConfig
from server.exchange import Exchange
from server.federation import Federation
from server.loop import run
from server.registry.events import EVENTS, EventReader, Events
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from strategies import catalogue
from tests.toys.grid import Clock, ToyGrid
from tests.toys.site import ToySite
from umbel import peft_dir
from umbel.signing import read_private

_PYPROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
DEFAULTS: dict[str, object] = _PYPROJECT["tool"]["flwr"]["app"]["config"]
SETTINGS: dict[str, object] = {
    **{key: value for key, value in DEFAULTS.items() if key != "registry"},
    "adapter": "support", "strategy": "exact", "rounds": 2, "quorum": 2, "round-seconds": 60.0,
    "straggler-seconds": 20.0, "grace-seconds": 60.0, "rank": 2, "steps": 4, "batch-size": 4, "learning-rate": 1e-3,
    "schedule": "constant", "warmup-steps": 0, "weight-decay": 0.0, "clip-norm": 1.0, "seed": 0,
}  # fmt: skip


class World:
    """A centre and its sites; each `start` runs the ServerApp as a new process would, over the same registry."""

    def __init__(self, root: Path, sockets: Path, stack: ExitStack) -> None:
        self.root = root
        self._sockets = sockets
        self.clock = Clock()
        self.enter = stack.enter_context
        self.sites = {name: stack.enter_context(ToySite(name, sockets / f"{name}.sock")) for name in ("a", "b", "c")}
        self.grid = ToyGrid(self.clock, {1: self.sites["a"].socket, 2: self.sites["b"].socket})

    def start(self, run_id: str = "one", **settings: object) -> AdapterRegistry:
        config = RunConfig.of({**SETTINGS, "registry": str(self.root), **settings})
        key = read_private(config.signing_key) if config.signing_key else None
        registry = AdapterRegistry(self.root, create=True, key=key)
        exchange = Exchange(self.grid, config.adapter, clock=self.clock, sleep=self.clock.sleep)
        events, strategy = Events(self.root / EVENTS, clock=self.clock), catalogue.find(config.strategy)
        run(Federation(config, registry, exchange, events, run_id, strategy(**config.options)), self.clock.sleep)
        return registry

    def join_c(self) -> ToySite:
        self.grid.nodes[3] = self.sites["c"].socket
        return self.sites["c"]

    def join(self, *names: str) -> None:
        """Bring sites online: new ones, or known ones that come back."""
        for name in names:
            if name not in self.sites:
                self.sites[name] = self.enter(ToySite(name, self._sockets / f"{name}.sock"))
            self.grid.nodes[list(self.sites).index(name) + 1] = self.sites[name].socket

    def leave(self, name: str) -> None:
        """Take a site's SuperNode offline."""
        del self.grid.nodes[list(self.sites).index(name) + 1]

    @property
    def live(self) -> dict[str, str | None]:
        """Site → the version that is live there."""
        return {name: site.live for name, site in self.sites.items()}

    def told(self, event: str) -> list[dict]:
        """The events of one kind."""
        return [one for one in self.events if one["event"] == event]

    @property
    def events(self) -> list[dict]:
        return list(EventReader(self.root / EVENTS).read())


class Killed(BaseException):
    """Stands for kill -9: nothing below catches it."""


@contextmanager
def killed_after(monkeypatch: pytest.MonkeyPatch, when: Callable[[list[str]], bool]) -> Iterator[list[str]]:
    """Kill the ServerApp that is started inside, after a conversation with sites; yield the groups of all of them.

    It dies as soon as `when` is true of those groups.
    """
    groups: list[str] = []
    converse = Exchange.converse

    def dying(*args: Any, **more: Any) -> Any:
        groups.append(more["group"])
        outcome = converse(*args, **more)
        if when(groups):
            raise Killed
        return outcome

    with monkeypatch.context() as patched:
        patched.setattr(Exchange, "converse", dying)
        with pytest.raises(Killed):
            yield groups


@contextmanager
def a_world(root: Path, sockets: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    """A federation whose registry will be at `root`."""
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    with ExitStack() as stack:
        yield World(root, sockets, stack)


def poison(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
    return {name: np.full_like(array, np.nan) for name, array in tensors.items()}


def states(registry: AdapterRegistry) -> list[RoundState]:
    return [record.state for record in registry.rounds.all("support")]
