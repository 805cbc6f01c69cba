"""The centre of the kill matrix: a death is counted only where the registry stands exactly between two steps."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.tools.kill.centre import Centre
from server.registry.events import EVENTS, Events
from umbel.faults import Point

P = Point
STEPS: list[tuple[Callable[["Registry"], object], set[Point]]] = [
    (lambda r: r.file("support/pin.json"), {P.BEGIN_PINNED}),
    (lambda r: r.file("blobs/x"), {P.BLOB_WRITTEN}),
    (lambda r: r.file("support/v000000/manifest.json"), {P.VERSION_RENAMED}),
    (lambda r: r.line("support/aliases.jsonl"), {P.ALIASES_MOVED, P.ROUND_RECORDED}),
    (lambda r: r.event("round.started"), set()),
    (lambda r: r.file("support/v000001/manifest.json"), {P.VERSION_PUBLISHED, P.VERDICT_RECORDED}),
    (lambda r: r.event("round.published"), {P.VERDICT_RECORDED}),
    (lambda r: r.event("round.judged"), set()),
    (lambda r: setattr(r, "live", "support@v1"), {P.SITES_PROMOTED}),
    (lambda r: r.line("support/aliases.jsonl"), {P.ROUND_ACCEPTED}),
    (lambda r: r.event("round.promoted"), set()),
    (lambda r: r.file("support/v000002/manifest.json"), {P.VERSION_LISTED}),
]
"""Steps of a run in their order, and the points at which a ServerApp may have died when the last step is that one."""


class Registry:
    """A registry's files, and the version that answers at the site."""

    def __init__(self, root: Path) -> None:
        self.root, self.live = root, "base"
        (root / "support").mkdir(parents=True)

    def file(self, name: str) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        (self.root / name).touch()

    def line(self, name: str) -> None:
        with (self.root / name).open("a") as file:
            file.write("{}\n")

    def event(self, kind: str) -> None:
        Events(self.root / EVENTS).emit(kind, adapter="support")


@pytest.fixture
def centre(tmp_path: Path) -> tuple[Centre, Registry]:
    """A centre without processes over a registry that is made up."""
    registry = Registry(tmp_path / "registry")
    made = Centre.__new__(Centre)
    made._registry = registry.root
    made._site = SimpleNamespace(live=lambda: registry.live)  # type: ignore[assignment]
    return made, registry


def test_a_death_is_at_its_point_only_between_the_steps_around_it(centre: tuple[Centre, Registry]) -> None:
    made, registry = centre
    for take, reached in STEPS:
        take(registry)
        assert {point for point in Centre.POINTS if made._reached(point)} == reached


def test_each_point_is_reached_at_some_step() -> None:
    assert set[Point]().union(*(reached for _, reached in STEPS)) == {*Centre.POINTS}
