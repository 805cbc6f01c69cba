"""Counts of quanta are those that ran, and a preemption is a stop for which a request came."""

from serving.cotrainer.counts import KEPT_PREEMPTIONS, Counts
from serving.cotrainer.lanes.lane import Took
from serving.trainer_socket import PreemptionStats, QuantumStats
from tests.toys.scheduler import Make


def test_the_counts_that_are_reported_are_those_that_were_counted(make: Make) -> None:
    scheduler = make()
    assert scheduler.cotrainer.counts.quanta == {}, "the calibration is not counted"
    scheduler.tell(scheduler.train_job())
    scheduler.load(running=1)
    for _ in range(5):
        scheduler.busy()
    status = scheduler.finish()
    counted = {kind: scheduler.labels.count(kind) for kind in scheduler.labels}
    assert {kind: stats.count for kind, stats in status.quanta.items()} == {"open": 1, **counted}
    assert status.hook_calls["busy"] == 5
    assert status.shared_tensors == status.frozen_tensors > 0


def test_a_stop_counts_as_a_preemption_only_if_a_request_had_come() -> None:
    counts = Counts()
    for seconds, by_arrival, requests_came in ((0.01, True, True), (0.02, True, False), (0.03, False, True)):
        counts.ran("mlp", Took(seconds))
        counts.stopped(by_arrival=by_arrival)
        counts.settle(requests_came)
    counts.settle(requests_came=True)
    found = counts.preemption(arrivals=7)
    assert (found.arrivals, found.count, found.longest_s) == (7, 1, 0.01)


def test_quantiles_of_preemptions_are_those_of_the_latest() -> None:
    counts = Counts()
    assert counts.preemption(0) == PreemptionStats()
    for number in range(KEPT_PREEMPTIONS + 100):
        counts.ran("mlp", Took(float(number)))
        counts.stopped(by_arrival=True)
        counts.settle(requests_came=True)
    found = counts.preemption(arrivals=0)
    assert found.count == KEPT_PREEMPTIONS + 100
    assert found.p50_s == 100 + KEPT_PREEMPTIONS / 2
    assert found.longest_s == KEPT_PREEMPTIONS + 99


def test_requests_can_be_forgotten_while_quanta_are_kept() -> None:
    counts = Counts()
    counts.ran("mlp", Took(0.5))
    counts.ran("mlp", Took(0.25))
    counts.stopped(by_arrival=True)
    counts.settle(requests_came=True)
    counts.most_while_waiting = 1
    counts.forget_requests()
    assert (counts.preemption(0), counts.most_while_waiting) == (PreemptionStats(), 0)
    assert counts.quanta == {"mlp": QuantumStats(count=2, seconds=0.75, longest_s=0.5)}
