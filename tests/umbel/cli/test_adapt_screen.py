"""The lines of `umbel adapt`, from the events of its rounds."""

from pathlib import Path
from typing import Any

import pytest

from umbel.cli.adapt_screen import STALLED, AdaptScreen
from umbel.site.config import SiteConfig
from umbel.site.template import Tables, site_toml

URL = "http://127.0.0.1:30000"


@pytest.fixture
def screen(tmp_path: Path) -> AdaptScreen:
    return make(tmp_path)


def make(folder: Path, tables: Tables | None = None) -> AdaptScreen:
    file = folder / "my site.toml"
    file.write_text(site_toml(tables))
    config = SiteConfig.load(file)
    return AdaptScreen(config, "support", Path("my site.toml"), URL, learning_rate=2e-3, head=lambda: "v2")


def judged(decision: str, number: int = 3) -> dict[str, Any]:
    verdict = {"accepted": decision == "promote", "decision": decision, "reasons": ["held-out loss 1.0 against 2.0"]}
    return {"event": "site.judged", "round": number, "site": "clinic-a", "verdict": verdict}


def rejected(number: int = 3, **reasons: str) -> dict[str, Any]:
    return {"event": "round.rejected", "round": number, "version": number, "reasons": reasons}


def promoted(number: int = 3) -> dict[str, Any]:
    return {"event": "round.promoted", "round": number, "version": number, "sites": ["clinic-a"]}


def test_training_and_verdict_are_told_in_words(screen: AdaptScreen) -> None:
    assert screen.lines({"event": "round.started", "round": 3, "parent": "f" * 64}) == ["round 3: trains from v2"]
    trained = {"event": "site.trained", "round": 3, "steps": 40, "seconds": 12.4, "share": 0.5, "loss_sum": 30.0,
               "num_loss_tokens": 20}  # fmt: skip
    (line,) = screen.lines(trained)
    assert line == "round 3: 40 steps in 12 s, 50% of them spent on training; training loss 1.5000 nats per token"
    assert "nan" in screen.lines({**trained, "loss_sum": "NaN"})[0], "as JSON has it"
    assert screen.lines(judged("promote")) == ["round 3: better: held-out loss 1.0 against 2.0"]
    assert screen.lines(judged("keep"))[0].startswith("round 3: undecided: ")
    assert screen.lines(judged("reject"))[0].startswith("round 3: worse: ")
    assert screen.lines({"event": "run.started", "rounds": 3}) == []


def test_the_first_promotion_says_how_to_ask_and_how_to_go_back(screen: AdaptScreen) -> None:
    first, ask, back = screen.lines(promoted())
    assert first == "round 3: v3 answers users of 'support' now"
    assert f"curl -s {URL}/v1/chat/completions" in ask
    assert '"model": "support"' in ask
    assert "KEY" not in ask
    assert back.endswith("umbel rollback 'my site.toml' support"), "as a shell takes it"
    assert screen.lines(promoted(4)) == ["round 4: v4 answers users of 'support' now"]


@pytest.mark.parametrize(
    "tables", [{"engine": {"api_keys": "keys"}}, {"adapter": [{"name": "support", "api_keys": "keys"}]}]
)
def test_a_site_with_keys_is_asked_with_one(tmp_path: Path, tables: Tables) -> None:
    assert "-H 'authorization: Bearer KEY'" in make(tmp_path, tables).lines(promoted())[1]


@pytest.mark.parametrize(
    ("decision", "helps"), [("keep", "more held-out ones"), ("reject", "--set learning-rate=0.001"), ("", "no verdict")]
)
def test_rounds_without_a_promotion_end_with_what_would_help(screen: AdaptScreen, decision: str, helps: str) -> None:
    for number in range(1, 2 * STALLED + 1):
        screen.lines({"event": "round.started", "round": number, "parent": "f" * 64})
        if decision:
            screen.lines(judged(decision, number))
        lines = screen.lines(rejected(number, **{"clinic-a": "no answer by the deadline", "*": "0 of 1"}))
        assert lines[0].startswith(f"round {number}: v{number} is discarded")
        assert ("no answer by the deadline" in lines[0]) == (not decision), "a verdict was told before"
        if number % STALLED:
            assert len(lines) == 1
        else:
            assert f"no version was promoted in the last {number} rounds" in lines[1]
            assert helps in lines[1]
    screen.lines(promoted())
    assert len(screen.lines(rejected())) == 1, "a promotion begins the count anew"


def test_a_failed_round_says_what_the_site_said_first(screen: AdaptScreen) -> None:
    failed = {"event": "round.failed", "round": 1, "reasons": {"*": "0 of 1 updates", "clinic-a": "no memory"}}
    assert screen.lines(failed) == ["round 1: it made no version: no memory"]
    assert screen.lines({**failed, "reasons": {"*": "damaged"}}) == ["round 1: it made no version: damaged"]


def test_a_site_that_is_brought_to_the_registrys_version_is_told_and_one_that_refuses(screen: AdaptScreen) -> None:
    event = {
        "event": "fleet.reconciled",
        "live": "support@v2",
        "brought": {"a": "support@v1"},
        "kept": {},
        "missed": {},
    }
    assert screen.lines(event) == ["a: support@v2 answers users, as the registry says, instead of support@v1"]
    (line,) = screen.lines({**event, "brought": {}, "kept": {"a": "it has rejected support@v2"}})
    assert line.endswith("does not answer users here: it has rejected support@v2")


def test_rounds_in_which_nothing_is_worth_training_are_told_once(screen: AdaptScreen) -> None:
    def told(number: int) -> list[str]:
        skipped = {"event": "site.skipped", "site": "clinic-a", "reason": f"nothing worth training: flat at {number}"}
        events = {"event": "round.started"}, skipped, {"event": "round.idle", "reasons": {}}
        return [line for event in events for line in screen.lines({**event, "round": number})]

    assert told(3) == [
        "round 3: trains from v2",
        "round 3: nothing worth training: flat at 3; nothing is trained, and the site is asked again and again",
    ]
    assert told(4) == told(5) == []
    trained = {"event": "site.trained", "steps": 40, "seconds": 12.4, "share": 0.5, "loss_sum": 30.0}
    assert len(screen.lines({**trained, "round": 6, "num_loss_tokens": 20})) == 1
    assert len(told(7)) == 2, "it has trained meanwhile"
