"""Comparing versions by users' traffic: worse on any count, with confidence, is found; chance is not."""

import numpy as np
import pytest

from client.versions.traffic_comparison import FIRST_LOOK, Finding, Looks, compare
from serving.traffic_report import MirrorTraffic, VersionTraffic
from umbel.site.sections import ShadowSection

ALPHA = 0.0125


def traffic(requests: int = 0, errors: int = 0, up: int = 0, down: int = 0, seed: int = 0, slow: float = 1.0,
            streams: int = 0) -> VersionTraffic:  # fmt: skip
    """Streams whose latencies are as different as requests are, `slow` times as long."""
    ttft = slow * np.random.default_rng(seed).lognormal(-2.0, 0.5, streams)
    return VersionTraffic(
        requests=requests, errors=errors, up=up, down=down, streams=streams,
        ttft_s=tuple(ttft), tpot_s=tuple(ttft / 10),
    )  # fmt: skip


def found(
    candidate: VersionTraffic, incumbent: VersionTraffic, mirror: MirrorTraffic | None = None, **policy: float
) -> Finding:
    return compare(candidate, incumbent, "live", ShadowSection.model_validate(policy), ALPHA, mirror)


def test_nothing_seen_says_nothing() -> None:
    assert found(traffic(), traffic()) == Finding(False, ())
    assert found(traffic(), traffic(), MirrorTraffic(dropped=5)) == Finding(False, ())


@pytest.mark.parametrize(
    ("errors", "requests", "errors_now", "requests_now", "worse"),
    [(0, 40, 0, 400, False), (1, 40, 0, 400, False), (3, 8, 0, 72, True), (4, 40, 4, 400, True), (8, 8, 0, 0, False),
     (20, 40, 200, 400, False), (0, 40, 200, 400, False), (2, 2, 0, 400, True)],
)  # fmt: skip
def test_more_errors_are_worse_unless_chance_explains_them(
    errors: int, requests: int, errors_now: int, requests_now: int, worse: bool
) -> None:
    finding = found(traffic(requests, errors), traffic(requests_now, errors_now))
    assert finding.worse is worse
    word = "more, with confidence" if worse else "not clearly more"
    assert finding.reasons == (f"errors: {errors} of {requests} against live's {errors_now} of {requests_now}: {word}",)


@pytest.mark.parametrize(("down", "up", "worse"), [(9, 1, True), (2, 8, False), (1, 0, False)])
def test_bad_ratings_are_worse(down: int, up: int, worse: bool) -> None:
    finding = found(traffic(40, up=up, down=down), traffic(400, up=36, down=4))
    assert finding.worse is worse
    reason = f"bad ratings: {down} of {up + down} against live's 4 of 40: "
    assert next(each for each in finding.reasons if each.startswith("bad")).startswith(reason)


@pytest.mark.parametrize(("slow", "ratio", "worse"), [(3.0, 1.5, True), (1.0, 1.5, False), (1.3, 1.5, False),
                                                     (3.0, 4.0, False), (1.4, 1.0, True)])  # fmt: skip
def test_slower_than_the_ratio_allows_is_worse(slow: float, ratio: float, worse: bool) -> None:
    new, now = traffic(60, seed=1, slow=slow, streams=60), traffic(300, seed=2, streams=300)
    finding = found(new, now, max_latency_ratio=ratio)
    assert finding.worse is worse
    assert sum("slower, with confidence" in reason for reason in finding.reasons) == (2 if worse else 0)
    assert any(f"against {ratio:g} × live's" in reason for reason in finding.reasons)


def test_a_few_slow_requests_decide_nothing() -> None:
    new, now = traffic(60, seed=1, streams=60), traffic(300, seed=2, streams=300)
    stuck = new.model_copy(update={"ttft_s": (60.0,) * 5 + new.ttft_s[5:]})
    assert not found(stuck, now).worse


def test_latencies_that_are_all_the_same_are_no_slower() -> None:
    same = VersionTraffic(requests=9, streams=9, ttft_s=(0.1,) * 9, tpot_s=(0.0,) * 9)
    assert not found(same, same, max_latency_ratio=1.0).worse


def test_a_shadow_that_answers_nothing_where_live_does_is_worse() -> None:
    mute = MirrorTraffic(compared=10, empty=8, agreement=2.0, words=20, live_words=100)
    finding = found(traffic(), traffic(), mute)
    assert finding.worse
    assert finding.reasons == (
        "mirrored requests without an answer: 8 of 10 against live's 0 of 10: more, with confidence",
        "mirror: 20.0% of the leading words as live's, 0.20 × as long, refusals 0 against 0, 10 requests",
    )
    assert found(traffic(), traffic(), MirrorTraffic(failed=10)).worse
    other = MirrorTraffic(compared=10, agreement=0.0, refusals=10, words=9, live_words=100)
    assert not found(traffic(), traffic(), other).worse, "another answer is no worse one"


def test_what_is_worse_is_said_first() -> None:
    finding = found(traffic(40, up=0, down=20), traffic(400, up=36, down=4), MirrorTraffic(compared=1))
    assert finding.worse
    assert finding.reasons[0].startswith("bad ratings: 20 of 20")


def test_looks_come_at_doubled_counts_and_may_err_less_and_less() -> None:
    looks, seen, spent = Looks(0.95), [], []
    for requests in range(1000):
        if looks.due(requests):
            seen.append(requests)
            spent.append(looks.spend(requests))
    assert seen == [FIRST_LOOK * 2**k for k in range(7)]
    assert spent == pytest.approx([0.025 / 2**k for k in range(1, 8)])
    jump = Looks(0.95)
    jump.spend(500)
    assert (jump.due(511), jump.due(512)) == (False, True)


def test_looking_often_finds_no_more_than_the_confidence_allows() -> None:
    """Two versions that fail one request in ten each: how often is one called worse, over all looks?"""
    generator, alarms, runs = np.random.default_rng(0), 0, 300
    for _ in range(runs):
        new, now = generator.random(256) < 0.1, generator.random(1024) < 0.1
        looks = Looks(0.9)
        for seen in range(257):
            if looks.due(seen):
                other = 4 * seen
                finding = compare(
                    traffic(seen, int(new[:seen].sum())), traffic(other, int(now[:other].sum())), "live",
                    ShadowSection(), looks.spend(seen),
                )  # fmt: skip
                if finding.worse:
                    alarms += 1
                    break
    assert alarms / runs <= 0.05
