"""Metrics of blocks: attainment, goodput, latencies, publish lags, paired ratios."""

import math

import pytest

from serving.bench.metrics import (
    Publication,
    Request,
    Spent,
    attainment,
    gain_goodput,
    goodput,
    is_largest,
    paired_ratio,
    publish_lags,
    quality_goodput,
    quantile,
    values,
)
from serving.trainer_socket import CoTrainerStatus, QuantumStats
from tests.toys.serving.blocks import SLO, block, request


@pytest.mark.parametrize(
    ("one", "met"),
    [
        (request(), True),
        (request(ttft=0.1, tpot=0.02), True),
        (request(ttft=0.11), False),
        (request(tpot=0.021), False),
        (request(tpot=None), True),
        (request(ttft=None, tpot=None, error="no answer within the drain"), False),
        (request(error="3 of 5 tokens"), False),
    ],
)
def test_a_request_is_met_when_it_is_answered_in_time(one: Request, met: bool) -> None:
    assert one.met(SLO) is met
    assert goodput(block("ours", one), SLO) == met / 10


def test_attainment_is_over_all_requests_of_all_blocks() -> None:
    assert attainment([block("ours", request(), request(ttft=9.0)), block("ours", request(), request())], SLO) == 0.75


def test_a_failed_request_is_infinitely_late_in_the_quantiles() -> None:
    one = block("ours", *[request()] * 18, *[request(None, None, error="503")] * 2)
    assert quantile(values([one], "ttft"), 0.90) == 0.05
    assert math.isinf(quantile(values([one], "ttft"), 0.95))


def test_quality_counts_for_the_version_that_answered_and_only_in_time() -> None:
    quality = {"": 4.0, "better": 2.0, "worse": 5.0}
    one = block(
        "ours", request(), request(version="better"), request(version="worse"), request(ttft=9.0, version="better")
    )
    assert quality_goodput(one, SLO, quality) == pytest.approx((1 / 4 + 1 / 2 + 1 / 5) / 10)
    assert gain_goodput(one, SLO, quality) == pytest.approx(2.0 / 10)


def test_a_publish_lag_ends_with_the_first_token_for_a_user() -> None:
    served = Publication(digest="a", trained_at=1.0, live_at=1.5, first_token_at=1.75)
    never = Publication(digest="b", trained_at=2.0, live_at=2.5)
    assert publish_lags([block("ours", versions=(served, never))]) == [0.75]


def test_ratios_are_paired_by_round() -> None:
    ours = [block("ours", round=n, tokens=tokens) for n, tokens in enumerate([100, 300, 20, 7])]
    theirs = [block("training", round=n, tokens=tokens) for n, tokens in enumerate([200, 100, 10])]
    found = paired_ratio(ours, theirs, lambda one: one.training_rate)
    assert found.value == pytest.approx(3 ** (1 / 3)), "of 0.5, 3 and 2; the round without a partner does not count"
    assert found.low < 0.5 < 3.0 < found.high
    assert math.isnan(paired_ratio(ours, [], lambda one: one.training_rate).value)


@pytest.mark.parametrize(("count", "largest"), [(1, True), (60, True), (99, True), (100, False), (1000, False)])
def test_p99_of_few_is_the_largest(count: int, largest: bool) -> None:
    assert is_largest(count, 0.99) is largest
    assert (quantile(range(count), 0.99) == count - 1) is largest


def test_a_block_in_which_the_clients_core_was_too_busy_is_void() -> None:
    assert block("ours", cores=(1.0, 0.61)).void
    assert not block("ours", cores=(1.0, 0.59)).void


def test_what_was_spent_is_the_difference_of_two_statuses() -> None:
    def status(**seconds: float) -> CoTrainerStatus:
        return CoTrainerStatus(quanta={kind: QuantumStats(seconds=value) for kind, value in seconds.items()})

    found = Spent.between(status(mlp=3.0, hooks=1.0), status(mlp=4.0, head=0.5, hooks=1.25, jobless=0.1))
    assert (found.quanta_s, found.hooks_s, found.jobless_s) == pytest.approx((1.5, 0.25, 0.1))
