"""Rounds told from manifests, alias moves and events, for an index that was lost."""

from pathlib import Path

from server.registry.events import EVENTS, Events
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.registry import begun, grow

LOST = "the index was made anew, and its verdict is not in the files"


def reopened(root: Path, registry: AdapterRegistry) -> AdapterRegistry:
    """The registry without its index."""
    registry.close()
    for file in root.glob("registry.sqlite*"):
        file.unlink()
    return AdapterRegistry(root)


def states(registry: AdapterRegistry) -> dict[int, RoundState]:
    return {record.round: record.state for record in registry.rounds.all("support")}


def test_without_events_a_version_that_was_live_was_promoted_and_one_before_the_newest_was_not(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "arao")
    again = reopened(tmp_path, registry)
    assert states(again) == {
        1: RoundState.PROMOTED, 2: RoundState.REJECTED, 3: RoundState.PROMOTED, 4: RoundState.PUBLISHED,
    }  # fmt: skip
    assert LOST in again.rounds.find("support", 2).reasons["*"]
    assert any(f"{EVENTS} is missing" in line for line in again.lost)


def test_the_reasons_of_a_verdict_come_from_the_events_and_those_of_other_adapters_are_not_taken(
    tmp_path: Path,
) -> None:
    registry = begun(tmp_path)
    grow(registry, "ra")
    events = Events(tmp_path / EVENTS)
    events.emit("round.rejected", adapter="support", round=1, run_id="r", version=1, reasons={"a": "worse"})
    events.emit("round.failed", adapter="other", round=7, run_id="r", reasons={"*": "no quorum"})
    events.emit("run.finished", adapter="support", run_id="r")
    again = reopened(tmp_path, registry)
    assert states(again) == {1: RoundState.REJECTED, 2: RoundState.PROMOTED}
    assert again.rounds.find("support", 1).reasons == {"a": "worse"}
    assert again.lost == []


def test_what_the_index_still_knows_is_not_told_anew(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "a")
    Events(tmp_path / EVENTS).emit("round.failed", adapter="support", round=1, run_id="r", reasons={"*": "no"})
    assert registry.reindex() == []
    assert states(registry) == {1: RoundState.PROMOTED}
