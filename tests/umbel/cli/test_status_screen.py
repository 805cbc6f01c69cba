"""`umbel status` for people: one screen with the live version, since when, why, the candidates, and the way back."""

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from umbel.cli import status_screen

NOW = 1_800_000_000.0
HOUR = 3600.0
REASONS = [
    "held-out loss 1.2041 against live's 1.2712: lower, -0.0671 (-0.0803 to -0.0540) per token at 95 % confidence, "
    "400 examples",
    "held-out exact match 41.0% against live's 38.5%: no clear difference, +0.0250 (-0.0100 to +0.0600)",
]


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def version(state: str, decision: str | None) -> dict[str, Any]:
    verdict = {"accepted": decision == "promote", "decision": decision, "reasons": REASONS} if decision else None
    return {"state": state, "verdict": verdict, "probe": {}}


def running(**changes: Any) -> dict[str, Any]:
    """The report of a round that is trained now."""
    return {"key": "0123456789abcdef-14-fedcba98", "steps": 17, "share": 0.34, "seconds": 100.0,
            "num_loss_tokens": 51_200, **changes}  # fmt: skip


def data(**changes: Any) -> dict[str, Any]:
    """The figures about an adapter's examples."""
    return {"train": 1200, "held_out": 133, "withheld": 0, "cut": 3, "dropped": 1, "untold": 0, "files": {},
            "asked": {}, "will_bite": [], "refused": "", "rounds_wait": False, **changes}  # fmt: skip


def status(**changes: Any) -> dict[str, Any]:
    """The status of a site at work: serving, training, with a version on trial."""
    return {
        "site": "clinic-a",
        "running": True,
        "engine": {"ready": True, "starts": 2, "since": NOW - 26 * HOUR, "url": "http://127.0.0.1:30000"},
        "aliases": {"support": {"live": "support@v12", "previous": "support@v11", "shadow": "support@v13"}},
        "versions": {
            "support@v11": version("retired", "promote"),
            "support@v12": version("live", "promote"),
            "support@v13": version("probing", None),
        },
        "history": {"support": []},
        "answering": {"support": {"since": NOW - 2 * HOUR - 60, "event": "promoted"}},
        "roll_backs": {"support": [[NOW - 30 * HOUR, "live again by roll-back", 10]]},
        "open_rounds": ["support/0123456789abcdef-14-fedcba98"],
        "served": [],
        "in_flight": {"support@v12": 3, "base": 1},
        "training": {
            "job": "support/0123456789abcdef-14-fedcba98", "state": "running", "error": "",
            "longest_quantum_s": 0.0031, "latency_known": True,
            "quanta": {"mlp": {"count": 800}, "attention": {"count": 204}},
            "slo": {
                "ttft_ms": 400.0, "tpot_ms": 50.0, "quantile": 0.99, "debt_s": 0.0, "answered": 1204, "met": 1195,
            },
        },
        "running_rounds": {"support": running()},
        "training_shares": {"support": {"share": 1.0, "worth": 1.0}},
        "heldout_looks": {"support": {"verdicts": 31, "since_promotion": 5, "next_level": 0.000422, "due": False}},
        "data": {"support": data()},
        "worth": {"support": "nothing worth training: the loss is flat"},
        **changes,
    }  # fmt: skip


def shown(report: dict[str, Any], width: int = 80) -> str:
    out = io.StringIO()
    status_screen.show(report, "clinic a.toml", now=NOW, console=Console(file=out, width=width, highlight=False))
    return "\n".join(line.rstrip() for line in out.getvalue().splitlines())


GOLDEN = """\
clinic-a: engine ready at http://127.0.0.1:30000, since 2027-01-14 06:00:00 (1 d
2 h), start 2
  answering  1 by base, 3 by support@v12
  latency    targets: 400 ms to the first token, 50.0 ms per later one; met by
             99.3% of 1204 requests, 99% is promised
  training   support/0123456789abcdef-14-fedcba98: 17 steps, 34% of the time,
             512 tokens/s; 1004 quanta, the longest 3.1 ms (P99)
  rounds     waiting or running: support/0123456789abcdef-14-fedcba98

support: support@v12 answers users, since 2027-01-15 05:59:00 (2 h 1 min)
  why        promoted; held-out loss 1.2041 against live's 1.2712: lower,
             -0.0671 (-0.0803 to -0.0540) per token at 95 % confidence, 400
             examples
  shadow     support@v13 probing, no verdict yet
  looks      5 at the held-out examples since a promotion, 31 in all; the next
             verdict promotes at p = 0.0004 or less
  data       1,200 examples to train on, 133 held out, 3 cut at seq_len, 1 left
             out
  worth      nothing worth training: the loss is flat
  go back    to support@v11: umbel rollback 'clinic a.toml' support
  went back  2027-01-14 02:00:00 support@v10 live again by roll-back"""


def test_one_screen_says_it_all() -> None:
    assert shown(status()) == GOLDEN


@pytest.mark.parametrize("width", [60, 80, 200])
def test_no_line_is_wider_than_the_terminal_and_nothing_is_cut(width: int) -> None:
    text = shown(status(), width)
    assert max(map(len, text.splitlines())) <= width
    assert "".join(text.split()) == "".join(shown(status(), 1000).split())


def test_it_is_plain_where_there_is_no_terminal_and_coloured_where_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    status_screen.show(status(), "site.toml", now=NOW)
    assert "\x1b" not in capsys.readouterr().out
    out = io.StringIO()
    console = Console(file=out, width=80, force_terminal=True, color_system="standard", no_color=False)
    status_screen.show(status(), "site.toml", now=NOW, console=console)
    assert "\x1b[1;32mengine ready\x1b[0m" in out.getvalue()


def test_without_a_daemon_it_says_what_would_answer_and_how_to_start_it() -> None:
    engine = {"ready": False, "starts": 0, "since": None, "url": None}
    text = shown(status(running=False, engine=engine, training=None, in_flight={}, data={}, heldout_looks={},
                        running_rounds={}, training_shares={}), 200)  # fmt: skip
    assert "clinic-a: not running; this is what its journal says. To start it: umbel serve 'clinic a.toml'" in text
    assert "support@v12 will answer users" in text
    assert "umbel rollback 'clinic a.toml' support" in text
    assert not {"answering", "latency", "training", "data", "looks"} & {
        line.split()[0] for line in text.splitlines() if line
    }


def test_a_site_on_its_first_day_has_nothing_to_go_back_to() -> None:
    none = {"live": None, "previous": None, "shadow": None}
    text = shown(
        status(
            aliases={"support": none}, answering={"support": {"since": None, "event": None}},
            roll_backs={"support": []}, open_rounds=[], in_flight={}, training={"job": None, "error": "", "slo": None},
            running_rounds={},
            heldout_looks={"support": {"verdicts": 0, "since_promotion": 0, "next_level": 0.015, "due": False}},
        )
    )  # fmt: skip
    assert "the base answers users\n  why        no version was promoted yet" in text
    assert "rollback" not in text
    assert "training   paused: no round is open" in text
    assert "latency    no targets yet" in text
    assert "looks" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"aliases": {"support": {"live": "support@v1", "previous": None, "shadow": None}}}, "to the base: umbel"),
        ({"aliases": {"support": {"live": None, "previous": "support@v1", "shadow": None}},
          "answering": {"support": {"since": NOW, "event": "taken back: the base answers"}}},
         "taken back: the base answers"),
        ({"versions": {"support@v11": {**version("retired", "promote"), "taken_back": "worse than v9, errors"}}},
         "support@v11 was rolled back by itself: worse than v9, errors; promoted"),
        ({"versions": {"support@v11": {**version("retired", "promote"), "taken_back": "x"}}}, "support --force"),
        ({"data": {"support": data(will_bite=["99 of 100 are left out; raise it", "0 held-out examples"])}},
         "will bite: 99 of 100 are left out; raise it\n             will bite: 0 held-out examples"),
        ({"data": {"support": data(refused="train.jsonl:7: not JSON; expected")}},
         "refused: train.jsonl:7: not JSON; expected; the data of before stays in use"),
        ({"data": {"support": data(rounds_wait=True)}}, "rounds wait: an example that a user had deleted"),
        ({"recovered": ["support@v12 is damaged and was forgotten"]}, "recovered  support@v12 is damaged"),
        ({"versions": {"support@v13": version("judged", "keep")}}, "judged: keep; held-out loss 1.2041"),
        ({"engine": {"ready": False, "starts": 1, "since": None, "url": None}, "training": None, "running_rounds": {}},
         "paused: the engine is starting"),
        ({"training": {"job": None, "error": "the co-trainer could not be built", "slo": None}, "running_rounds": {}},
         "paused: the co-trainer could not be built"),
        ({"training": {**status()["training"], "slo": {**status()["training"]["slo"], "ttft_ms_per_token": 0.456}}},
         "targets: 400 ms and 0.456 ms per prompt token to the first token, 50.0 ms per later one"),
        ({"training": {**status()["training"], "reserved_mb": 2615, "kv_tokens_given_up": 20920}},
         "memory     2,615 MB are kept for training, 20,920 tokens of KV cache"),
        ({"running_rounds": {"support": running(share=0.001)}}, "held up: the latency targets leave no room now"),
        ({"training": {**status()["training"], "latency_known": False, "slo": None},
          "running_rounds": {"support": running(share=0.001)}}, "held up: only while nobody is served"),
        ({"served": [{"name": "legal", "digest": "0123456789abcdef" + 48 * "0", "path": "/srv/legal", "since": NOW}]},
         "served     legal@sha256:0123456789abcdef; never trained"),
        ({"running_rounds": {"support": running(), "triage": running(key="r2", share=0.001, seconds=0.0)}},
         "r2: 17 steps, 0% of the time; 1004 quanta"),
        ({"training_shares": {"support": {"share": 3.0, "worth": 0.5}, "triage": {"share": 1.0, "worth": 1.5}}},
         "share      50% of the training while all train: share 3 × 0.5 for what it brought"),
        ({"heldout_looks": {"support": {"verdicts": 12, "since_promotion": 12, "next_level": 9e-05, "due": True}}},
         "since a promotion; the next verdict promotes at p = 9e-05 or less; renew them"),
        ({"training": {**status()["training"], "state": "failed", "error": "no memory"}, "open_rounds": [],
          "running_rounds": {}},
         "is failed: no memory"),
    ],
)  # fmt: skip
def test_what_is_unusual_is_said(change: dict[str, Any], said: str) -> None:
    assert said in shown(status(**change), 300)
