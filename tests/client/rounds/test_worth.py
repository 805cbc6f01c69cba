"""The worth of an adapter's rounds: their gains by their time, beside those of the site's other adapters."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.journal import Journal
from client.rounds.worth import LEAST, MOST, Brought, brought, worths
from tests.toys.sites.journal import manifest, order, report
from umbel.adapter import AdapterRef, Lifecycle
from umbel.messages import Evaluation, JobState, RoundReport

ROUNDS = st.lists(st.builds(Brought, st.floats(-5, 5), st.floats(0, 1e4)), max_size=6)


def test_who_gains_twice_as_much_for_the_same_time_is_worth_twice_as_much() -> None:
    found = worths({"a": [Brought(0.2, 10.0)], "b": [Brought(0.1, 10.0)], "c": []})
    assert found == {"a": pytest.approx(4 / 3), "b": pytest.approx(2 / 3), "c": 1.0}


def test_the_same_gain_for_half_the_time_is_worth_twice_as_much() -> None:
    found = worths({"a": [Brought(0.1, 5.0)], "b": [Brought(0.1, 10.0)]})
    assert found["a"] == pytest.approx(2 * found["b"])


def test_later_rounds_count_for_more() -> None:
    stalls = worths({"a": [Brought(0.4, 1.0), Brought(0.0, 1.0)], "b": [Brought(0.2, 1.0)]})
    grows = worths({"a": [Brought(0.0, 1.0), Brought(0.0, 1.0), Brought(0.4, 1.0)], "b": [Brought(0.2, 1.0)]})
    assert stalls["a"] == grows["a"] == pytest.approx(1.0)
    assert worths({"a": [Brought(0.4, 1.0), *3 * [Brought(0.0, 1.0)]], "b": [Brought(0.2, 1.0)]})["a"] < 0.5


@given(st.dictionaries(st.sampled_from("abcd"), ROUNDS))
def test_every_worth_is_within_its_bounds(rounds: dict[str, list[Brought]]) -> None:
    found = worths(rounds)
    assert found.keys() == rounds.keys()
    assert all(LEAST <= worth <= MOST for worth in found.values())
    assert all(found[adapter] == 1.0 for adapter, of_adapter in rounds.items() if not of_adapter)


@given(ROUNDS)
def test_a_single_adapter_is_worth_the_mean_whatever_it_brought(rounds: list[Brought]) -> None:
    assert worths({"support": rounds}) == {"support": 1.0}


def measured(loss: float) -> Evaluation:
    return Evaluation(loss_sum=100 * loss, loss_tokens=100, exact=0, examples=10)


def test_a_round_brought_the_gain_of_its_version_for_the_time_that_it_had_here(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal.sqlite3")
    for number, (seconds, share) in enumerate(((20.0, 0.5), (30.0, 0.1)), start=1):
        key = f"test-{number}-p"
        journal.rounds("support").add(order(key, round=number))
        journal.rounds("support").report(
            RoundReport(key=key, state=JobState.DONE, parent="p", seconds=seconds, share=share)
        )
    probes = (
        {"base": measured(3.0), "shadow": measured(2.0)},
        {"base": measured(3.0), "live": measured(2.0), "shadow": measured(2.5)},
        {"base": measured(3.0), "live": measured(2.0), "shadow": measured(1.5)},  # trained elsewhere only
    )
    for number, probe in enumerate(probes, start=1):
        ref = AdapterRef("support", number)
        journal.add(manifest(ref).model_copy(update={"round": number, "lineage": "test"}), report(ref))
        journal.move(ref, report(ref, Lifecycle.PROBING).model_copy(update={"probe": probe}))
    versions = [(version.manifest, version.report) for version in journal.versions()]
    assert brought(journal.rounds("support"), versions) == [Brought(1.0, 10.0), Brought(-0.5, 3.0)]
    assert brought(journal.rounds("billing"), versions) == [], "nothing was trained for them"
