"""The protocol: targets, tuning, the order of blocks, and the arrivals of each."""

from dataclasses import replace
from typing import Any

import pytest

from serving.bench.intervals import enough
from serving.bench.metrics import (
    Block,
)
from serving.bench.plan import (
    CLAIMED,
    FULL,
    MEASURED_SLICE,
    MOST_ROUNDS,
    NEXT_SLICE,
    STEADY,
    SYSTEMS,
    TUNING_SLICE,
    Spec,
    interleaved,
    not_told_apart,
    strict,
    tuned,
    workload,
)
from serving.bench.trace import AS_TRACED, ArrivalProcess, Trace
from tests.toys.serving.blocks import SLO, block, request


def test_the_strict_preset_is_a_multiple_of_the_medians() -> None:
    one = block("inference", request(0.01, 0.001), request(0.02, 0.002), request(0.9, None), phase="preset")
    assert (strict(one).ttft_s, strict(one).tpot_s) == pytest.approx((0.06, 0.004))


def tuning(setting: float, attained: int, tokens: int) -> Block:
    answers = [request()] * attained + [request(ttft=9.0)] * (100 - attained)
    return block("partition", *answers, phase="tune", options={"nice": setting}, tokens=tokens)


def test_the_setting_that_trains_most_within_the_targets_is_taken() -> None:
    runs = [tuning(5, 90, 900), tuning(10, 99, 500), tuning(15, 100, 300)]
    assert tuned(runs, SLO, reference=1.0) == {"partition": {"nice": 10}}


def test_where_no_setting_keeps_the_targets_the_one_that_comes_nearest_is_taken() -> None:
    assert tuned([tuning(5, 70, 900), tuning(19, 80, 100)], SLO, reference=1.0) == {"partition": {"nice": 19}}


def test_rounds_run_forth_and_back_and_equal_tokens_come_after_ours() -> None:
    systems = ("inference", "ours", "idle", "unpaced_equal")
    assert interleaved(systems, 0) == ("inference", "ours", "unpaced_equal", "idle")
    assert interleaved(systems, 1) == ("idle", "ours", "unpaced_equal", "inference")


def test_the_protocol_fits_into_75_minutes_and_tunes_every_baseline_alike() -> None:
    assert FULL.seconds() <= 75 * 60
    assert FULL.seconds(4.5) <= 62 * 60, "at the capacity of a core of a small server"
    assert {len(SYSTEMS[system].grid) for system in FULL.tuned} == {4}
    keys = [spec.key for spec in FULL.specs(4.5)]
    assert len(keys) == len(set(keys)), "a block is found again by its key"


@pytest.mark.parametrize("capacity", [4.5, 10.0, 100.0])
def test_an_attainment_is_claimed_of_enough_requests(capacity: float) -> None:
    """368 without a late one are the fewest that show 0.99; only the two systems of the claim run longer for it."""
    specs = [spec for spec in FULL.specs(capacity) if spec.phase == "measure"]
    for load in STEADY:
        rounds = sum((spec.condition, spec.system) == (load, "ours") for spec in specs)
        assert rounds * round(float(load) * capacity * FULL.window) >= enough(0.99) == 368
    assert {spec.system for spec in specs if spec.round >= FULL.rounds} <= set(CLAIMED)


def test_every_round_has_its_own_slice_of_the_trace() -> None:
    slices = [MEASURED_SLICE + NEXT_SLICE * number for number in range(MOST_ROUNDS)]
    assert slices[0] > TUNING_SLICE
    assert slices[-1] < 1
    assert max(spec.round for spec in FULL.specs(0.1)) < MOST_ROUNDS


def test_a_choice_within_noise_of_others_is_found() -> None:
    runs = [tuning(5, 98, 900), tuning(10, 99, 500), tuning(15, 40, 2000)]
    assert not_told_apart(runs, SLO, "partition", {"nice": 10}) == [{"nice": 5}]


def test_all_systems_of_a_round_see_the_same_arrivals_and_tuning_sees_others() -> None:
    trace = Trace.fitted()

    def arrivals(phase: Any, condition: str, system: str, number: int) -> Any:
        return workload(trace, Spec(phase, condition, system, number), capacity=10.0, saturation=20.0, seconds=5.0)

    for condition in ("0.6", "square"):
        assert arrivals("measure", condition, "ours", 1) == arrivals("measure", condition, "idle", 1)
        assert arrivals("measure", condition, "ours", 1) != arrivals("measure", condition, "ours", 2)
    assert arrivals("tune", "0.6", "idle", 0) == arrivals("tune", "0.6", "stop", 3)
    assert arrivals("tune", "0.6", "idle", 1) != arrivals("measure", "0.6", "idle", 1)
    assert arrivals("measure", "none", "training", 0) == ()


def test_another_process_changes_the_gaps_and_nothing_else() -> None:
    trace, spec = Trace.fitted(), Spec("measure", "0.6", "ours", 1)
    usual, bursty = (
        workload(trace, spec, 10.0, 20.0, 11.0, process) for process in (AS_TRACED, ArrivalProcess.parse("gamma:4"))
    )
    assert [(a.prompt, a.output) for a in usual] == [(a.prompt, a.output) for a in bursty]
    assert [a.at for a in usual] != [a.at for a in bursty]


def test_beside_an_accelerator_no_trainer_has_a_process_of_its_own() -> None:
    plan = FULL.in_engine()
    named = {system for systems in plan.conditions.values() for system in systems} | set(plan.tuned)
    left_out = {system for systems in FULL.conditions.values() for system in systems} - named
    assert left_out == {"separate", "partition", "hard"}


def test_a_system_of_the_plan_is_one_of_the_table() -> None:
    named = {system for systems in FULL.conditions.values() for system in systems}
    assert named | {"training"} == set(SYSTEMS)
    assert replace(FULL, rounds=1).seconds(4.5) < FULL.seconds(4.5)
