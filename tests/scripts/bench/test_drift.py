"""The workloads of the drift benchmark, and the figures that are made of its runs."""

import math
from itertools import pairwise

import pytest

from scripts.tools.bench.drift import FULL, NEW, OLD, Workload, parts, renamed
from scripts.tools.bench.drift_figures import Point, Run, Served, show
from scripts.tools.demo.data import TASKS, examples_of


@pytest.mark.parametrize("seed", range(4))
def test_no_answer_of_a_renamed_task_stays_and_every_prompt_does(seed: int) -> None:
    task = renamed(TASKS["shop"], seed)
    old, new = examples_of(TASKS["shop"], heldout=False), examples_of(task, heldout=False)
    for before, after in zip(old, new, strict=True):
        asked, answered = ([example["messages"][place]["content"] for example in (before, after)] for place in (0, 1))
        assert asked[0] == asked[1]
        assert not set(answered[0].split()) & set(answered[1].split())


def test_the_new_task_of_the_benchmark_contradicts_the_old_one() -> None:
    assert not set(OLD.first.items()) & set(NEW.first.items())
    assert not set(OLD.second.items()) & set(NEW.second.items())


@pytest.mark.parametrize(("workload", "first", "last"), [("abrupt", 1.0, 1.0), ("gradual", 0.25, 1.0),
                                                         ("recurring", 1.0, 0.0)])  # fmt: skip
def test_a_workload_begins_at_once_and_comes_to_its_end(workload: Workload, first: float, last: float) -> None:
    changes = parts(workload, FULL)
    assert changes[0] == (0.0, first)
    assert changes[-1][1] == last
    assert all(before[0] < after[0] for before, after in pairwise(changes))


def a_run(*served: Served) -> Run:
    points = [Point(at=float(second), steps=10 * second) for second in range(40)]
    return Run(
        system="measured", workload="abrupt", learn=10, same=10, points=points, served=list(served),
        tokens_per_step=2.0, rounds=9, skipped=3,
    )  # fmt: skip


def test_it_is_recovered_with_the_first_version_that_is_nearly_as_good_as_the_old_one_was() -> None:
    run = a_run(
        Served(version=1, at=5, old=(1.0, 0.5), new=(9.0, 0.0)),
        Served(version=2, at=15, old=(0.1, 0.9), new=(9.0, 0.0)),
        Served(version=3, at=23, old=(9.0, 0.0), new=(0.5, 0.8)),
        Served(version=4, at=26, old=(9.0, 0.0), new=(0.1, 0.86)),
    )
    assert run.before == (0.1, 0.9)
    assert run.recovered_s == 6
    assert (run.tokens_same, run.tokens_changed, run.tokens) == (200, 120, 780)


def test_a_run_that_never_recovers_says_so_and_has_trained_to_its_end() -> None:
    run = a_run(Served(version=1, at=5, old=(1.0, 0.5), new=(9.0, 0.0)))
    assert run.recovered_s == math.inf
    assert run.tokens_changed == 2.0 * 190
    assert "| inf |" in show([run], "abrupt")
    assert math.isnan(a_run().before[0]), "no version answered at all"
