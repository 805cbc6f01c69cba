"""The site's memory: every change is whole, survives a kill, and nothing is used twice."""

import sqlite3
from pathlib import Path
from typing import Any

import pytest

from client.journal import LIVE_AGAIN, ROLLED_BACK, Journal, Promotion
from serving.traffic_report import VersionTraffic
from umbel.adapter import AdapterManifest, AdapterRef, Lifecycle
from umbel.errors import AdapterError, Conflict, NotFound
from umbel.messages import Evaluation, JobState, RoundOrder, ShadowReport, ShadowState, TrainPlan

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.sqlite3"


@pytest.fixture
def journal(path: Path) -> Journal:
    return Journal(path)


def manifest(ref: AdapterRef, **changes: Any) -> AdapterManifest:
    fields: dict[str, Any] = {
        "name": ref.name, "version": ref.version, "digest": f"{ref.version:064x}", "base": "0" * 64, "lineage": "l",
        "round": ref.version, "rank": 4, "target_modules": ("q_proj",),
    }  # fmt: skip
    return AdapterManifest(**{**fields, **changes})


def report(ref: AdapterRef, state: ShadowState = ShadowState.VALIDATING, **more: Any) -> ShadowReport:
    return ShadowReport(ref=str(ref), state=state, **more)


def make_live(journal: Journal, ref: AdapterRef, event: str = "promoted") -> None:
    journal.add(manifest(ref), report(ref))
    if journal.get(ref).state is Lifecycle.CANDIDATE:
        journal.move(ref, Lifecycle.SHADOW)
    journal.make_live(ref, report(ref, ShadowState.LIVE), None, event)


def aliases(journal: Journal) -> tuple[AdapterRef | None, AdapterRef | None]:
    return journal.alias("support", "live"), journal.alias("support", "previous")


def order(key: str, **changes: Any) -> RoundOrder:
    plan = TrainPlan(rank=4, steps=1, seconds=1.0)
    return RoundOrder(**{"key": key, "base": "b", "parent": "p", "round": 1, "plan": plan, **changes})


def test_what_was_entered_is_there_after_a_kill(path: Path, journal: Journal) -> None:
    """A second journal over the same file, while the first was never closed."""
    probe = {"shadow": Evaluation(loss_sum=1.5, loss_tokens=2, exact=1, examples=3)}
    make_live(journal, V1)
    journal.add(manifest(V2), report(V2))
    journal.move(V2, Lifecycle.SHADOW, report(V2, ShadowState.JUDGED, probe=probe))
    journal.rounds.add("support", order("r1"))
    other = Journal(path)
    assert other.versions() == journal.versions()
    assert [(v.ref, v.state) for v in other.versions()] == [(V1, Lifecycle.LIVE), (V2, Lifecycle.SHADOW)]
    assert other.get(V2).report.probe == probe
    assert aliases(other) == (V1, None)
    assert other.rounds.open() == [order("r1")]


def test_a_version_is_entered_once_and_never_with_other_weights(journal: Journal) -> None:
    journal.add(manifest(V1), report(V1))
    journal.move(V1, Lifecycle.SHADOW)
    journal.add(manifest(V1), report(V1))
    assert journal.get(V1).state is Lifecycle.SHADOW, "entering it again is no change"
    with pytest.raises(Conflict, match="support@v1 is already here with other weights"):
        journal.add(manifest(V1, digest="f" * 64), report(V1))
    assert journal.get(V1).manifest == manifest(V1)


def test_what_is_not_known_is_not_found(journal: Journal) -> None:
    assert journal.find(V1) is None
    for ask in (lambda: journal.get(V1), lambda: journal.move(V1, Lifecycle.SHADOW)):
        with pytest.raises(NotFound, match="push it as a shadow first"):
            ask()
    with pytest.raises(NotFound, match="submit it again"):
        journal.rounds.get("r1")
    assert aliases(journal) == (None, None)


def test_a_move_that_its_life_does_not_allow_changes_nothing(journal: Journal) -> None:
    journal.add(manifest(V1), report(V1))
    with pytest.raises(AdapterError, match="candidate version cannot become live"):
        journal.make_live(V1, report(V1, ShadowState.LIVE), None, "promoted")
    assert (journal.get(V1).state, aliases(journal)) == (Lifecycle.CANDIDATE, (None, None))
    assert [event for _, event, _ in journal.history("support")] == ["candidate"]


def test_promotions_and_roll_backs_keep_live_and_previous(journal: Journal) -> None:
    seen = []
    for ref in (V1, V2, V3, V2, V3):
        make_live(journal, ref, "promoted" if journal.find(ref) is None else "rolled back")
        seen.append(aliases(journal))
        assert [v.ref for v in journal.versions(Lifecycle.LIVE)] == [ref], "exactly one is live"
    assert seen == [(V1, None), (V2, V1), (V3, V2), (V2, V3), (V3, V2)]


@pytest.mark.parametrize("statement", range(1, 12))
def test_a_kill_within_a_promotion_leaves_the_state_before_it(
    path: Path, journal: Journal, statement: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is gone at the n-th statement that writes: nothing of the promotion is there."""
    make_live(journal, V1)
    journal.add(manifest(V2), report(V2))
    journal.move(V2, Lifecycle.SHADOW)
    before = (aliases(journal), journal.versions(), journal.history("support"))
    dying = Dying(journal._db, statement)
    monkeypatch.setattr(journal, "_db", dying)
    try:
        journal.make_live(V2, report(V2, ShadowState.LIVE), None, "promoted")
    except sqlite3.OperationalError:
        journal = Journal(path)
        assert (aliases(journal), journal.versions(), journal.history("support")) == before
    else:
        assert dying.left > 0, "all statements went through"
        assert aliases(Journal(path)) == (V2, V1)


class Dying:
    """A connection that breaks, for good, at its n-th statement that changes something."""

    def __init__(self, database: sqlite3.Connection, statements: int) -> None:
        self.database, self.left = database, statements

    def execute(self, sql: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        if sql.split()[0] in ("INSERT", "UPDATE", "COMMIT"):
            self.left -= 1
            if self.left <= 0:
                self.database.close()
        if sql == "ROLLBACK" and self.left <= 0:
            raise sqlite3.OperationalError("killed")
        try:
            return self.database.execute(sql, values)
        except sqlite3.ProgrammingError as error:
            raise sqlite3.OperationalError("killed") from error


def test_history_is_newest_first_and_limited(journal: Journal) -> None:
    for ref in (V1, V2):
        make_live(journal, ref)
    events = [(event, version) for _, event, version in journal.history("support", limit=3)]
    assert events == [("promoted", 2), ("live", 2), ("retired", 1)]
    assert journal.history("other") == []


def test_a_round_is_found_again_by_its_key_and_only_with_the_same_order(journal: Journal) -> None:
    first = journal.rounds.add("support", order("r1"))
    assert (first.state, first.parent) == (JobState.QUEUED, "p")
    journal.rounds.report(first.model_copy(update={"state": JobState.RUNNING, "steps": 3}))
    assert journal.rounds.add("support", order("r1")).steps == 3
    for changes in ({"parent": "q"}, {"round": 2}, {"plan": TrainPlan(rank=4, steps=2, seconds=1.0)}):
        with pytest.raises(Conflict, match="r1 is already here with another parent or plan"):
            journal.rounds.add("support", order("r1", **changes))
    assert journal.rounds.get("r1")[0] == order("r1")


def test_open_rounds_are_those_that_have_not_ended_oldest_first(journal: Journal) -> None:
    for key, state in (("a", JobState.RUNNING), ("b", JobState.DONE), ("c", JobState.QUEUED), ("d", JobState.FAILED)):
        journal.rounds.report(journal.rounds.add("support", order(key)).model_copy(update={"state": state}))
    assert [open_round.key for open_round in journal.rounds.open()] == ["a", "c"]


def test_attempts_are_counted_across_kills(path: Path, journal: Journal) -> None:
    journal.rounds.add("support", order("r1"))
    assert [
        journal.rounds.begin_attempt("r1"),
        Journal(path).rounds.begin_attempt("r1"),
        journal.rounds.begin_attempt("r1"),
    ] == [1, 2, 3]


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_probe_that_brought_no_number_can_be_read_back(journal: Journal, loss: float) -> None:
    """As an adapter of finite but huge weights brings it; after this `umbel serve` does not even start again."""
    journal.add(manifest(V1), report(V1))
    probe = {"shadow": Evaluation(loss_sum=loss, loss_tokens=2, exact=0, examples=3)}
    journal.report(V1, report(V1, ShadowState.JUDGED, probe=probe))
    assert journal.versions()[0].ref == V1


def test_a_promotion_is_remembered_as_long_as_it_is_compared(path: Path, journal: Journal) -> None:
    before = VersionTraffic(requests=7, errors=1, streams=2, ttft_s=(0.1, 0.2), tpot_s=(0.01, 0.02))
    first = Promotion(V1, None, 1.0, before)
    journal.begin_window(first)
    assert Journal(path).windows() == [first]
    second = Promotion(V2, V1, 2.0, before, already=before)
    journal.begin_window(second)
    assert Journal(path).windows() == [Promotion(V2, V1, 2.0, before)], "what an engine had counted dies with it"
    journal.end_window(V1)
    assert len(journal.windows()) == 1, "only the last one of an adapter is compared"
    journal.end_window(V2)
    assert journal.windows() == []


def test_where_the_base_answered_nothing_is_previous(journal: Journal) -> None:
    make_live(journal, V1)
    journal.make_base_live(V1, report(V1, ShadowState.RETIRED))
    assert aliases(journal) == (None, V1)
    make_live(journal, V2)
    assert aliases(journal) == (V2, None)


def test_what_the_site_went_back_from_does_not_answer_again_by_a_damage(journal: Journal) -> None:
    for ref in (V1, V2):
        make_live(journal, ref)
    journal.make_live(V1, report(V1, ShadowState.LIVE), None, LIVE_AGAIN, left=ROLLED_BACK)
    assert aliases(journal) == (V1, V2)
    journal.forget(V1, "forgotten: its files are damaged")
    assert aliases(journal) == (None, V2), "the base"
