"""The demo's events: every one that is shown has a line, and each broken promise is told."""

import copy
from typing import Any

import pytest

from scripts.tools.demo.events import ENDS, SHOWN, broken_promises, describe, probe_row, round_row

VERDICT = {"accepted": True, "reasons": ["held-out loss is lower"]}
EVENTS: dict[str, tuple[dict[str, Any], str]] = {
    "run.started": ({"rounds": 3, "strategy": "exact"}, "flwr run: 3 rounds, strategy exact"),
    "round.started": (
        {"sites": ["a", "b"], "parent": "0123456789abcdef"}, "round 7: a, b train, beginning with 0123456789ab",
    ),
    "site.trained": (
        {"site": "a", "steps": 80, "share": 0.25, "seconds": 12.4},
        "round 7: a took 80 steps; 25% of 12 s went into training, the rest into serving",
    ),
    "round.published": (
        {"version": 2, "relative_error": 0.001, "change_error": 0.031},
        "round 7: published support@v2 (3% of what the round changed is beyond its rank in the worst module)",
    ),
    "site.judged": ({"site": "a", "verdict": VERDICT}, "round 7: a judges the shadow: held-out loss is lower"),
    "round.promoted": ({"version": 2, "sites": ["a", "b"]}, "[bold]round 7: v2 answers users at a, b[/bold]"),
    "round.rejected": ({"reasons": {"a": "worse"}}, "[red]round 7: rejected[/red] a: worse"),
    "site.skipped": ({"site": "a", "reason": "the loss is flat"}, "round 7: a does not train: the loss is flat"),
    "round.idle": ({"reasons": {"*": "nothing to train at 2 sites"}}, "round 7: nothing to train at 2 sites"),
    "round.failed": ({}, "[red]round 7: failed[/red] "),
    "run.finished": ({"head": "support@v2"}, "the run is over; support@v2 is where the next one would begin"),
}  # fmt: skip
SCORE = {"loss": 3.0, "exact_match": 0.1}
SUMMARY: dict[str, Any] = {
    "users": {"a": {"requests": 9, "failed": 0, "failures": []}, "b": {"requests": 9, "failed": 0, "failures": []}},
    "rounds": [{"end": "promoted", "reasons": {}}, {"end": "rejected", "reasons": {"a": "worse"}}],
    "sites": {"a": {"live": "support@v1"}, "b": {"live": "support@v1"}},
    "quality": {
        "base": {"clinic": SCORE, "shop": SCORE},
        "support@v1": {"clinic": {"loss": 2.0, "exact_match": 0.1}, "shop": {"loss": 1.0, "exact_match": 0.5}},
    },
    "answers": {"a": [{"right": "Room 7", "base": "No.", "adapter": "Room 7"}]},
}


@pytest.mark.parametrize("kind", SHOWN)
def test_every_event_that_is_shown_has_its_line(kind: str) -> None:
    fields, line = EVENTS[kind]
    assert describe({"event": kind, "adapter": "support", "round": 7, **fields}) == line


def test_a_site_without_a_verdict_says_so() -> None:
    event = {"event": "site.judged", "round": 1, "site": "a", "ref": "support@v1", "verdict": None, "probe": {}}
    assert describe(event).endswith("a judges the shadow: no verdict")
    assert probe_row(event)["verdict"] == "no verdict"


def test_a_probes_row_has_the_loss_per_token_of_each_role_that_was_measured() -> None:
    probe = {"base": {"loss_sum": 30.0, "loss_tokens": 10}, "shadow": {"loss_sum": 5.0, "loss_tokens": 10},
             "live": {"loss_sum": 0.0, "loss_tokens": 0}}  # fmt: skip
    row = probe_row({"round": 2, "site": "a", "ref": "support@v2", "verdict": VERDICT, "probe": probe})
    assert row == {"round": 2, "site": "a", "version": "support@v2", "base": 3.0, "shadow": 0.5, "verdict": "accepted"}


@pytest.mark.parametrize("kind", ENDS)
def test_a_rounds_row_says_how_it_ended(kind: str) -> None:
    row = round_row({"event": kind, "round": 1, "seconds": {"train": 2.0}, "messages": {"a": 3}})
    assert row == {"round": 1, "end": ENDS[kind], "seconds": {"train": 2.0}, "messages": {"a": 3}, "reasons": {}}


def test_a_demo_that_kept_its_promises_has_nothing_to_tell() -> None:
    assert broken_promises(SUMMARY, rounds=2) == []


def spoiled(*keys: str, value: Any) -> dict[str, Any]:
    summary = copy.deepcopy(SUMMARY)
    place: Any = summary
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return summary


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        (spoiled("users", "a", value={"requests": 9, "failed": 2, "failures": ["Timeout", "x"]}),
         "a: 2 of 9 requests failed: Timeout"),
        (spoiled("users", "b", value={"requests": 0, "failed": 0, "failures": []}), "b: no user was answered"),
        (spoiled("rounds", value=[{"end": "promoted", "reasons": {}}, {"end": "rejected", "reasons": {}}]),
         "only 1 of 2 rounds were promoted, or rejected or idle for a stated reason"),
        (spoiled("sites", "b", "live", value=None),
         "the sites do not serve one federated version: ['None', 'support@v1']"),
        (spoiled("quality", "support@v1", "shop", value=SCORE),
         "the federated adapter does not beat the base on the shop task"),
        (spoiled("quality", "support@v1", "clinic", "exact_match", value=0.0),
         "the federated adapter does not beat the base on the clinic task"),
        (spoiled("answers", "a", value=[{"right": "Room 7", "base": "Room 7", "adapter": "Room 7"}]),
         "a: the adapter answers 1 of 1 questions rightly, the base 1"),
    ],
)  # fmt: skip
def test_each_broken_promise_is_told(summary: dict[str, Any], told: str) -> None:
    (line,) = broken_promises(summary, rounds=2)
    assert line.startswith(told)
