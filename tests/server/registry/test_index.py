"""The index: made from the files, anew where it is lost, and taken up where a publisher was killed."""

from pathlib import Path

import pytest

from server.registry import views as registry_views
from server.registry.events import Events
from server.registry.index import VersionIndex
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.registry import begun, blob, flip, grow, publish, v
from umbel.adapter import AdapterRef
from umbel.errors import NotFound, RegistryError


def test_a_version_written_before_a_crash_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = begun(tmp_path)
    registry.rounds.record("support", 1, "r", RoundState.TRAINING)

    def killed(self: VersionIndex, manifest: object, sums: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(VersionIndex, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, 1)
    assert len(registry.versions("support")) == 1
    reopened = AdapterRegistry(tmp_path)
    assert [manifest.version for manifest in reopened.versions("support")] == [0, 1]
    record = reopened.rounds.find("support", 1)
    assert (record.state, record.version) == (RoundState.PUBLISHED, 1)
    assert publish(reopened, 2) == AdapterRef("support", 2)


def test_the_index_is_made_anew_with_versions_aliases_and_rounds(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "araao")
    events = Events(tmp_path / "events.jsonl")
    registry.rounds.record("support", 6, "r", RoundState.FAILED, reasons={"*": "no quorum"})
    events.emit("round.rejected", adapter="support", round=2, run_id="r", version=2, reasons={"a": "worse"})
    events.emit("round.failed", adapter="support", round=6, run_id="r", reasons={"*": "no quorum"})
    events.emit("round.started", adapter="support", round=7, run_id="r")
    said = (registry.lineage, registry.versions("support"), registry.pointers("support"), registry.pin("support"))
    rounds = [(one.round, one.state, one.version, one.reasons) for one in registry.rounds.all("support")]
    registry.close()
    for leftover in tmp_path.glob("registry.sqlite*"):
        leftover.unlink()
    again = AdapterRegistry(tmp_path)
    assert (again.lineage, again.versions("support"), again.pointers("support"), again.pin("support")) == said
    assert [(one.round, one.state, one.version, one.reasons) for one in again.rounds.all("support")] == rounds
    assert again.lost == ["round 7 of support was under way; the next run begins it again"]
    assert again.rounds.begin_run("next", "support", "plan") == 7
    assert publish(again, 8) == v(6)
    assert again.reindex() == ["round 7 of support was under way; the next run begins it again"]


def test_what_cannot_be_restored_is_said_and_never_taken_for_something_else(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    grow(registry, "aaa")
    registry.close()
    (tmp_path / "registry.sqlite").unlink()
    flip(tmp_path / "support" / "v000003" / "manifest.json", 0)
    for _ in range(2):  # the second time from the index that was made
        again = AdapterRegistry(tmp_path)
        assert [manifest.version for manifest in again.versions("support")] == [0, 1, 2]
        assert any("v000003" in damage for damage in registry_views.verify(again)["damages"])
        with pytest.raises(NotFound):
            again.read(again.resolve("support@head"))
        again.close()
    again = AdapterRegistry(tmp_path)
    assert publish(again, 9) == v(4), "a damaged version's number is not given away"
    flip(tmp_path / "support" / "v000003" / "manifest.json", 0)
    assert not [line for line in again.reindex() if "v000003" in line]
    assert again.read(again.resolve("support@head"))[0] == blob(3)


def test_a_file_that_is_no_index_is_said_to_be_one(tmp_path: Path) -> None:
    begun(tmp_path).close()
    for leftover in tmp_path.glob("registry.sqlite*"):
        leftover.unlink()
    (tmp_path / "registry.sqlite").write_text("not a database, and long enough to be seen as such" * 10)
    with pytest.raises(RegistryError, match=r"not a database; end what uses the registry, delete .*registry.sqlite"):
        AdapterRegistry(tmp_path)
