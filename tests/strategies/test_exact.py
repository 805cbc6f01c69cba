"""`Exact`: the mean in product space is exact, idempotent, and the same in every order of arrival."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from strategies.adapter import Adapter, Aggregate, Update, factors_of, tensors_of, truncated
from strategies.exact import Exact
from strategies.fedit import FedIT
from strategies.lowrank import LowRank
from strategies.strategy import LoraStrategy
from tests.toys.adapters import RANK, WIDE, adapter, dense, distance, moved, random_tensors, rotated, update, wide
from umbel import peft_dir


def test_exact_is_the_mean_weighted_by_examples_up_to_its_certificate() -> None:
    parent = adapter()
    one, two = random_tensors(1), random_tensors(2)
    result = Exact().aggregate(
        parent, [update("a", parent, one, held_examples=300), update("b", parent, two, held_examples=100)]
    )
    assert result.weights == {"a": 0.75, "b": 0.25}
    for module, mean in dense(result.tensors).items():
        wanted = 0.75 * dense(one)[module] + 0.25 * dense(two)[module]
        error = float(torch.linalg.norm(mean - wanted) / torch.linalg.norm(wanted))
        assert abs(error - result.certificate[module]) < 1e-5  # float32 factors
        singular = np.linalg.svd(wanted.numpy(), compute_uv=False)
        assert abs(error - np.linalg.norm(singular[RANK:]) / np.linalg.norm(singular)) < 1e-5


def test_exact_without_training_is_the_parent_to_the_bit() -> None:
    for parent in (adapter(), adapter(dtype=ml_dtypes.bfloat16)):
        result = Exact().aggregate(parent, [update(site, parent, parent.tensors) for site in "ab"])
        assert_equal(result, parent)


def assert_equal(result: Aggregate, parent: Adapter) -> None:
    """The same numbers; where the parent is one of a registry that held bfloat16, in float32."""
    whole = {name: array.astype(np.float32) for name, array in parent.tensors.items()}
    assert peft_dir.encode(result.tensors) == peft_dir.encode(whole)


def regauged(tensors: peft_dir.Tensors, seed: int) -> peft_dir.Tensors:
    return tensors_of({name: rotated(one, seed=seed) for name, one in factors_of(tensors).items()}, np.float32)


def apart(one: Aggregate, other: Aggregate) -> float:
    return max(distance(mean, dense(other.tensors)[module]) for module, mean in dense(one.tensors).items())


def folded(rule: LoraStrategy, parent: Adapter, updates: list[Update], spool: Path) -> Aggregate:
    fold = rule.begin(parent, spool, len(updates))
    for one in updates:
        fold.add(one)
    assert fold.admitted == tuple(one.site for one in updates)
    return fold.finish()


def test_idle_sites_of_mixed_ranks_change_nothing_in_twenty_rounds() -> None:
    """A plain mean of truncated updates (FlexLoRA's) loses 83 % of this one (raFLoRA, arXiv 2602.13486)."""
    start = parent = wide(1, 32)
    collapsed = start.tensors
    for _ in range(20):
        updates = [
            update(f"site-{rank}", parent.at_rank(rank), parent.at_rank(rank).tensors) for rank in (4, 8, 16, 32)
        ]
        result = Exact().aggregate(parent, updates)
        parent = adapter(result.tensors)
        assert set(result.certificate.values()) == {0.0}
        plain = [{module: one.dense() for module, one in factors_of(truncated(collapsed, rank)).items()}
                 for rank in (4, 8, 16)] + [dense(collapsed)]  # fmt: skip
        mean = {module: sum(one[module] for one in plain) / 4 for module in WIDE}
        eye = {module: torch.eye(mean[module].shape[1], dtype=torch.float64) for module in WIDE}
        collapsed = truncated(
            tensors_of({module: LowRank(mean[module], eye[module]) for module in WIDE}, np.float32), 32
        )
    assert parent.digest == start.digest
    lost = max(distance(dense(collapsed)[module], whole) for module, whole in dense(start.tensors).items())
    assert lost > 0.5  # the negative control


def test_one_site_that_trains_moves_the_rest_as_little_as_its_share() -> None:
    """G' = G + p (ΔW − G_i): with mixed ranks, what the small site never saw stays."""
    parent = wide(1, 8)
    small = parent.at_rank(2)
    trained = moved(small, 3)
    result = Exact().aggregate(
        parent, [update("small", small, trained), update("idle", parent, parent.tensors, held_examples=300)]
    )
    for module, mean in dense(result.tensors).items():
        change = dense(trained)[module] - dense(small.tensors)[module]
        wanted = dense(parent.tensors)[module] + 0.25 * change
        assert distance(mean, wanted) <= result.certificate[module] + 1e-5


def test_factors_move_as_little_as_the_update_does() -> None:
    """Procrustes alignment to the parent, as FedRot-LoRA (arXiv 2602.23638): no jump in gauge between rounds."""
    parent = wide(1, 8)
    result = Exact().aggregate(parent, [update("a", parent, regauged(moved(parent, 2, 0.01), 5))])
    for module, now in factors_of(result.tensors).items():
        balanced = factors_of(Exact().aggregate(parent, [update("a", parent, moved(parent, 9, 1e-5))]).tensors)[module]
        assert distance(now.A.double(), balanced.A.double()) < 0.1


def test_nine_copies_in_random_gauges_are_that_copy() -> None:
    """B R⁻¹ · R A is one update; a mean of factors makes something else of it."""
    parent = wide(1, 6)
    same = moved(parent, 2)
    copies = [update(f"site-{index}", parent, regauged(same, index)) for index in range(9)]
    result, averaged = Exact().aggregate(parent, copies), FedIT().aggregate(parent, copies)
    for module, whole in dense(same).items():
        assert distance(dense(result.tensors)[module], whole) < 1e-5
        assert distance(dense(averaged.tensors)[module], whole) > 0.3


def test_two_hundred_updates_hold_no_more_memory_than_sixteen(tmp_path: Path) -> None:
    """Counts the bytes of every tensor that the fold keeps between two updates."""
    parent = wide(1, 2)
    held: list[int] = []
    fold = Exact().begin(parent, tmp_path, 200)
    for index in range(200):
        fold.add(update(f"site-{index:03}", parent, moved(parent, index)))
        held.append(sum(part.B.nbytes + part.A.nbytes for parts in fold._mean._sums.values() for part in parts))
    assert max(held) <= 16 * len(parent.blob)
    assert list(tmp_path.iterdir()) == []  # the first half waited there until there was a median to measure them by
    result = fold.finish()
    assert len(result.weights) == 200
    wanted = dict.fromkeys(WIDE, 0)
    for index in range(200):
        wanted = {module: wanted[module] + one / 200 for module, one in dense(moved(parent, index)).items()}
    for module, mean in dense(result.tensors).items():
        assert 0.0 < distance(mean, wanted[module]) <= result.certificate[module] + 1e-6


def test_momentum_takes_the_last_step_again() -> None:
    """Heavy ball: G' = G + mean change + β (G − G_before); the first round has no step before it."""
    rule = Exact(server_momentum=0.5)
    first = wide(1, 16)
    one = {name: array * 1.5 for name, array in first.tensors.items()}
    second = adapter(rule.aggregate(first, [update("a", first, one)]).tensors)
    for module, now in dense(second.tensors).items():
        assert distance(now, dense(one)[module]) < 1e-5
    idle = [update("a", second, second.tensors)]
    for _ in range(2):  # a round whose version was rejected is tried again from the same parent
        third = rule.aggregate(second, idle)
        for module, now in dense(third.tensors).items():
            before, parent = dense(first.tensors)[module], dense(second.tensors)[module]
            assert distance(now, parent + 0.5 * (parent - before)) < 1e-5


def test_momentum_forgets_what_was_taken_back() -> None:
    """A step from a version that was taken back to the one before it would lead away from what was taken back."""
    rule = Exact(server_momentum=0.9)
    versions = [wide(seed, 4) for seed in range(4)]
    before = [rule._version_before(versions[number]) for number in (0, 1, 2, 1, 1, 3)]
    digests = [None if one is None else versions.index(one) for one in before]
    assert digests == [None, 0, 1, None, None, 1]


counts = st.lists(st.integers(1, 1000), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None)
@given(held=counts, seed=st.integers(0, 2**20))
def test_the_mean_is_exact_to_its_certificate_in_every_order_and_gauge(
    tmp_path_factory: pytest.TempPathFactory, held: list[int], seed: int
) -> None:
    """Weights are shares of examples; arrival order and each site's gauge make no difference beyond rounding."""
    parent = wide(seed, 3)
    trained = [moved(parent, seed + index) for index in range(len(held))]
    updates = [
        update(f"site-{index:02}", parent, tensors, held_examples=count)
        for index, (tensors, count) in enumerate(zip(trained, held, strict=True))
    ]
    at_once = Exact(norm_clip=1e9).aggregate(parent, updates)
    wanted = dict.fromkeys(WIDE, 0)
    for tensors, count in zip(trained, held, strict=True):
        wanted = {module: wanted[module] + count / sum(held) * one for module, one in dense(tensors).items()}
    shares = [count / sum(held) for count in held]
    assert list(at_once.weights.values()) == pytest.approx(shares)
    order = np.random.default_rng(seed).permutation(len(updates))
    shuffled = [
        Update(f"site-{index:02}", update("", parent, regauged(trained[index], int(index))).blob,
               updates[index].report, "base")
        for index in order
    ]  # fmt: skip
    spool = tmp_path_factory.mktemp("spool")
    other = folded(Exact(norm_clip=1e9), parent, shuffled, spool)
    for result in (at_once, other):
        for module, mean in dense(result.tensors).items():
            assert distance(mean, wanted[module]) <= result.certificate[module] + 1e-5
    if len(held) <= 8:  # nothing was recompressed: the same best approximation
        assert apart(at_once, other) < 1e-3
        assert other.certificate == pytest.approx(at_once.certificate, abs=1e-5)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**20), rank=st.integers(1, 6), sites=st.integers(1, 5))
def test_a_round_in_which_nobody_trains_is_the_parent_to_the_bit(seed: int, rank: int, sites: int) -> None:
    """Idempotence, whatever ranks the sites have and for twenty rounds."""
    parent = adapter(random_tensors(seed, rank=6, dtype=ml_dtypes.bfloat16))
    for turn in range(20):
        ranks = [1 + (rank + turn + index) % 6 for index in range(sites)]
        received = [parent.at_rank(one) for one in ranks]
        result = Exact().aggregate(parent, [update(str(index), one, one.tensors) for index, one in enumerate(received)])
        assert_equal(result, parent)


def test_threads_make_no_difference() -> None:
    """Modules go side by side on several threads; each is computed by one, so the bytes are the same."""
    parent = wide(1, 4)
    updates = [update(f"site-{index}", parent, moved(parent, index)) for index in range(20)]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(peft_dir.encode(Exact().aggregate(parent, updates).tensors))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1]
