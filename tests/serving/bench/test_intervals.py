"""Intervals cover the truth as often as they say, and outcomes follow from the whole interval."""

import math

import numpy as np
import pytest

from serving.bench.intervals import (
    Interval,
    Outcome,
    agreed,
    binomial,
    enough,
    mean_ratio,
    paired,
    ratio_of_shares,
    resampled,
)

RUNS = 4000
ERROR = 3 * (0.95 * 0.05 / RUNS) ** 0.5
"""Three standard errors of a coverage of 0.95 over `RUNS`: 0.010."""


@pytest.mark.parametrize("rounds", [2, 3, 4, 6, 16])
def test_the_interval_of_a_ratio_covers_it_with_95_percent(rounds: int) -> None:
    rng = np.random.default_rng(0)
    found = [mean_ratio(list(np.exp(rng.normal(0, 0.1, rounds)))) for _ in range(RUNS)]
    assert np.mean([one.low <= 1 <= one.high for one in found]) == pytest.approx(0.95, abs=ERROR)


@pytest.mark.parametrize("share", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("of", [22, 60, 400])
def test_the_exact_interval_covers_a_share_with_at_least_95_percent(share: float, of: int) -> None:
    rng = np.random.default_rng(0)
    found = [binomial(int(hits), of) for hits in rng.binomial(of, share, RUNS)]
    assert np.mean([one.low <= share <= one.high for one in found]) >= 0.95 - ERROR


@pytest.mark.parametrize(("ours", "theirs"), [(0.99, 0.99), (0.95, 0.94), (0.99, 1.0), (0.2, 0.3)])
@pytest.mark.parametrize("of", [60, 400])
def test_the_interval_of_a_ratio_of_shares_covers_it_with_at_least_95_percent(
    ours: float, theirs: float, of: int
) -> None:
    rng = np.random.default_rng(0)
    drawn = zip(rng.binomial(of, ours, RUNS), rng.binomial(of, theirs, RUNS), strict=True)
    found = [ratio_of_shares(binomial(int(a), of), binomial(int(b), of)) for a, b in drawn]
    assert np.mean([one.low <= ours / theirs <= one.high for one in found]) >= 0.95 - ERROR


def test_the_bootstrap_over_pairs_of_blocks_holds_what_blocks_have_in_common() -> None:
    rng = np.random.default_rng(0)
    load = [rng.lognormal(0, 0.5) for _ in range(12)]
    theirs = [list(one * rng.lognormal(0, 0.02, 20)) for one in load]
    ours = [list(1.5 * one * rng.lognormal(0, 0.02, 20)) for one in load]
    paired_, alone = resampled(ours, theirs, 0.5), resampled(ours[::-1], theirs, 0.5)
    assert paired_.low < 1.5 < paired_.high
    assert paired_.high - paired_.low < 0.2 * (alone.high - alone.low)
    assert resampled([[3.0]] * 2, [[2.0]] * 2, 0.95) == Interval(1.5, 1.5, 1.5)


def test_known_intervals() -> None:
    share = binomial(59, 60)
    assert (share.low, share.high) == pytest.approx((0.911, 0.9996), abs=5e-4)
    assert ratio_of_shares(share, binomial(10**9, 10**9)).low == pytest.approx(share.low, abs=1e-6)
    assert math.isnan(binomial(0, 0).value)
    four = mean_ratio([math.exp(x) for x in (-0.1, 0.1, -0.1, 0.1)])
    assert math.log(four.high) == pytest.approx(3.182 * 0.11547 / 2, abs=1e-3)


def test_0_99_takes_368_requests_without_a_miss() -> None:
    assert enough(0.99) == 368
    assert enough(0.99, confidence=0.90) == 299
    assert binomial(368, 368).low >= 0.99 > binomial(367, 367).low


def test_a_round_without_a_ratio_is_said_and_never_dropped() -> None:
    lost = paired([(1.0, 1.0), (1.0, 0.0), (1.0, math.inf), (1.0, 1.0)])
    assert math.isnan(lost.value)
    assert lost.text() == "– (no ratio in 2 of 4 rounds)"
    assert lost.outcome(least=0.1) is Outcome.UNKNOWN
    assert ratio_of_shares(binomial(3, 4), binomial(0, 4)).outcome(least=0.1) is Outcome.UNKNOWN


def test_rounds_in_which_ours_is_0_count() -> None:
    assert paired([(0.0, 1.0)] * 4) == Interval(0.0, 0.0, 0.0)
    some = paired([(0.0, 1.0), (0.2, 1.0)])
    assert (some.value, some.low) == (0.1, 0.0)


def test_one_round_has_no_interval() -> None:
    one = paired([(2.0, 1.0)])
    assert one.text() == "2.00 (one round, no interval)"
    assert one.outcome(least=1.0) is Outcome.UNKNOWN


@pytest.mark.parametrize(
    ("interval", "outcome"),
    [
        (Interval(1.0, 0.985, 1.015), Outcome.MET),
        (Interval(0.97, 0.947, 0.990), Outcome.UNKNOWN),
        (Interval(1.0, 0.97, 1.03), Outcome.UNKNOWN),
        (Interval(0.96, 0.94, 0.979), Outcome.MISSED),
        (Interval(1.04, 1.021, 1.06), Outcome.MISSED),
        (Interval(math.nan, math.nan, math.nan), Outcome.UNKNOWN),
    ],
)
def test_the_whole_interval_decides_at_both_ends(interval: Interval, outcome: Outcome) -> None:
    assert interval.outcome(0.98, 1.02) is outcome


def test_two_intervals_of_a_claim_must_agree() -> None:
    assert agreed([Outcome.MET, Outcome.MET]) is Outcome.MET
    assert agreed([Outcome.MISSED, Outcome.MET]) is agreed([Outcome.UNKNOWN, Outcome.MET]) is Outcome.UNKNOWN
