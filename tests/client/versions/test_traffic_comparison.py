"""Comparing versions by users' traffic: worse on any count, with confidence, is found; chance is not."""

from typing import Any

import numpy as np
import pytest

from client.versions.traffic_comparison import Finding, compare
from serving.traffic_report import MirrorTraffic, UserTraffic, VersionTraffic
from umbel.site.sections import ShadowSection

ALPHA = 0.0125
NEW = range(100, 130)
NOW = range(200, 470)


def traffic(users: range = range(0), seed: int = 0, slow: float = 1.0, **each: int) -> VersionTraffic:
    """Users of whom each has the counts `each`, and five streams, `slow` times as long as those of others."""
    if "requests" not in each:
        return VersionTraffic()
    waits = np.random.default_rng(seed).normal(np.log(0.1 * slow), 0.2, len(users))
    return VersionTraffic(
        requests=len(users) * each["requests"],
        users=len(users),
        by_user={
            code: UserTraffic(streams=5, paced=5, log_ttft=5 * wait, log_tpot=5 * wait - 10, **each)
            for code, wait in zip(users, waits, strict=True)
        },
    )


def failing(users: range, failed: int, requests: int = 1) -> VersionTraffic:
    """Users without streams, of whom the first `failed` get errors only."""
    by_user = {
        code: UserTraffic(requests=requests, errors=requests * (number < failed)) for number, code in enumerate(users)
    }
    return VersionTraffic(requests=len(users) * requests, by_user=by_user)


def found(
    candidate: VersionTraffic, incumbent: VersionTraffic, mirror: MirrorTraffic | None = None,
    before: VersionTraffic | None = None, **policy: Any,
) -> Finding:  # fmt: skip
    section = ShadowSection.model_validate({"watch_s": 60, "canary_share": 0.1, **policy})
    return compare(candidate, incumbent, "live", section, ALPHA, mirror, before or VersionTraffic())


def test_nothing_seen_says_that_there_is_nothing_to_tell() -> None:
    nobody = "cannot tell latencies and ratings: 0 users of it and 0 of live's meanwhile, min_users = 20"
    assert found(traffic(), traffic()) == Finding(False, (nobody,), few_users=True)
    mirrored = found(traffic(), traffic(), MirrorTraffic(dropped=5), canary_share=0.0, mirror_share=0.1)
    assert mirrored.reasons == (), "where there is only a mirror nobody expects users"


@pytest.mark.parametrize(
    ("failed", "failed_now", "worse"),
    [(0, 0, False), (1, 0, False), (3, 0, True), (4, 40, False), (20, 180, False), (30, 0, True), (0, 180, False)],
)
def test_more_errors_are_worse_unless_chance_explains_them(failed: int, failed_now: int, worse: bool) -> None:
    finding = found(failing(NEW, failed), failing(NOW, failed_now))
    assert finding.worse is worse
    word = "more, with confidence" if worse else "not clearly more"
    assert finding.reasons[0] == f"errors: {failed} of 30 against live's {failed_now} of 270: {word}"


def test_a_user_whose_requests_all_fail_is_no_more_than_one_user() -> None:
    assert not found(failing(NEW, 1, requests=50), failing(NOW, 0, requests=50)).worse


@pytest.mark.parametrize(("before", "meanwhile", "worse"), [(0, 0, True), (2, 0, False), (0, 9, False)])
def test_of_few_users_errors_are_held_against_what_they_had_before_and_what_others_have(
    before: int, meanwhile: int, worse: bool
) -> None:
    few, others = range(2), range(10, 19)
    finding = found(
        failing(few, 2, requests=10), failing(others, meanwhile, requests=10),
        before=failing(few, before, requests=20),
    )  # fmt: skip
    assert (finding.worse, finding.few_users) == (worse, True)
    assert finding.reasons[0].startswith(
        f"errors: 20 of 20 against the same users' {20 * before} of 40 before and live's {10 * meanwhile} of 90: "
    )


def test_of_few_users_nothing_else_can_be_told_unless_the_operator_asks_for_fewer() -> None:
    new = traffic(range(6), requests=9, down=9, slow=9.0)
    now = traffic(range(10, 60), requests=9, up=9)
    finding = found(new, now)
    assert (finding.worse, finding.few_users) == (False, True)
    assert finding.reasons[1] == (
        "cannot tell latencies and ratings: 6 users of it and 50 of live's meanwhile, min_users = 20"
    )
    assert found(new, now, min_users=6).worse
    assert found(now, new).few_users, "either side may have too few"


@pytest.mark.parametrize(("down", "up", "worse"), [(4, 1, True), (1, 9, False), (1, 4, False)])
def test_bad_ratings_are_worse(down: int, up: int, worse: bool) -> None:
    finding = found(traffic(NEW, requests=10, up=up, down=down), traffic(NOW, requests=10, up=8, down=2))
    assert finding.worse is worse
    reason = f"bad ratings: {30 * down} of {30 * (up + down)} against live's 540 of 2700: "
    assert next(each for each in finding.reasons if each.startswith("bad")).startswith(reason)


@pytest.mark.parametrize(("slow", "ratio", "worse"), [(3.0, 1.5, True), (1.0, 1.5, False), (1.3, 1.5, False),
                                                     (3.0, 4.0, False), (1.4, 1.0, True)])  # fmt: skip
def test_slower_than_the_ratio_allows_is_worse(slow: float, ratio: float, worse: bool) -> None:
    new, now = traffic(NEW, seed=1, slow=slow, requests=5), traffic(NOW, seed=2, requests=5)
    finding = found(new, now, max_latency_ratio=ratio)
    assert finding.worse is worse
    assert sum("slower, with confidence" in reason for reason in finding.reasons) == (2 if worse else 0)
    assert any(f"against {ratio:g} × live's" in reason and "30 and 270 users" in reason for reason in finding.reasons)


def test_who_only_rates_an_earlier_answer_is_no_user_of_the_incumbent_meanwhile() -> None:
    new, now = traffic(NEW, requests=5), traffic(NOW, requests=5)
    rated = {code: UserTraffic(up=9) for code in NEW}
    assert found(new, now.model_copy(update={"by_user": now.by_user | rated})) == found(new, now)


def test_a_shadow_that_answers_nothing_where_live_does_is_worse() -> None:
    mute = MirrorTraffic(compared=10, empty=8, agreement=2.0, words=20, live_words=100)
    alone: dict[str, float] = {"canary_share": 0.0, "mirror_share": 1.0}
    finding = found(traffic(), traffic(), mute, **alone)
    assert finding.worse
    assert finding.reasons == (
        "mirrored requests without an answer: 8 of 10 against live's 0 of 10: more, with confidence",
        "mirror: 20.0% of the leading words as live's, 0.20 × as long, refusals 0 against 0, 10 requests",
    )
    assert found(traffic(), traffic(), MirrorTraffic(failed=10), **alone).worse
    other = MirrorTraffic(compared=10, agreement=0.0, refusals=10, words=9, live_words=100)
    assert not found(traffic(), traffic(), other, **alone).worse, "another answer is no worse one"


def test_what_is_worse_is_said_first() -> None:
    new, now = traffic(NEW, requests=5, down=1), traffic(NOW, requests=5, up=1)
    finding = found(new, now, MirrorTraffic(compared=1))
    assert finding.worse
    assert finding.reasons[0].startswith("bad ratings: 30 of 30")
