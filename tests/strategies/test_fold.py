"""`RoundFold`: weights, late updates and the clip, in every order of arrival."""

from pathlib import Path

import numpy as np
import pytest
import torch

from strategies.exact import Exact
from tests.toys.adapters import (
    ATTACKED,
    HOSTILE,
    adapter,
    attacked,
    away,
    dense,
    distance,
    moved,
    parent_adapter,
    random_tensors,
    update,
)


def test_a_late_update_is_measured_against_what_it_started_from_and_weighs_less(tmp_path: Path) -> None:
    """FedBuff's 1/√(1 + τ) (arXiv 2106.06639), and the change, not the stale update itself, is what counts."""
    rule = Exact(buffered=True)
    first = adapter()
    second = adapter(rule.aggregate(first, [update("a", first, moved(first, 1))]).tensors)
    fold = rule.begin(second, tmp_path, 2)
    fold.add(update("a", second, second.tensors))
    fold.add(update("late", first, moved(first, 2)), staleness=1)
    result = fold.finish()
    share = 2**-0.5 / (1 + 2**-0.5)
    assert result.weights == pytest.approx({"a": 1 - share, "late": share})
    for module, now in dense(result.tensors).items():
        change = dense(moved(first, 2))[module] - dense(first.tensors)[module]
        assert distance(now, dense(second.tensors)[module] + share * change) <= result.certificate[module] + 1e-5


def test_a_late_update_is_left_out_where_none_was_asked_for(tmp_path: Path) -> None:
    rule, first = Exact(), adapter()
    second = adapter(rule.aggregate(first, [update("a", first, moved(first, 1))]).tensors)
    fold = rule.begin(second, tmp_path, 2)
    fold.add(update("late", first, moved(first, 2)), staleness=1)
    assert "this round's parent is" in fold.finish().left_out["late"]


def test_a_site_counts_once() -> None:
    parent = adapter()
    twice = [update("a", parent, moved(parent, 1)), update("a", parent, moved(parent, 2))]
    result = Exact().aggregate(parent, twice)
    assert result.weights == {"a": 1.0}
    assert "counts once" in result.left_out["a"]


def test_a_cap_bounds_what_one_site_weighs() -> None:
    parent = adapter()
    updates = [update(site, parent, moved(parent, 1), held_examples=count) for site, count in
               {"a": 100, "b": 200, "c": 10_000}.items()]  # fmt: skip
    assert Exact(weight_cap=300).aggregate(parent, updates).weights == pytest.approx({"a": 1 / 6, "b": 1 / 3, "c": 0.5})


def test_a_zero_update_counts_and_nobody_at_all_gives_no_tensors() -> None:
    parent = adapter()
    zero = {name: np.zeros_like(array) for name, array in parent.tensors.items()}
    result = Exact().aggregate(parent, [update("zero", parent, zero), update("one", parent, random_tensors(1))])
    assert result.weights == {"zero": 0.5, "one": 0.5}
    assert all(np.isfinite(array).all() for array in result.tensors.values())
    assert Exact().aggregate(parent, []).tensors == {}


def test_a_huge_change_is_shortened_whenever_it_comes(tmp_path: Path) -> None:
    """The clip is always on, from three sites on, and whoever comes first waits until there is a median."""
    parent = parent_adapter()
    honest = [update(f"site-{i}", parent, away(parent, 1.0, i, 0.2)) for i in range(4)]
    huge = update("huge", parent, away(parent, 50.0, 99, 0.2))
    shares = []
    for at in range(5):
        spool = tmp_path / str(at)
        spool.mkdir()
        fold = Exact().begin(parent, spool, 5)
        for one in [*honest[:at], huge, *honest[at:]]:
            fold.add(one)
        result = fold.finish()
        shares.append(result.weights["huge"])
        assert result.weights["site-0"] == pytest.approx(0.2)
        assert sum(result.weights.values()) < 1.0
    assert shares == pytest.approx([0.2 * 2 / 50] * 5, rel=0.2)


@pytest.mark.parametrize("asked", [10, 12])
def test_the_clip_does_not_depend_on_who_is_first(tmp_path: Path, asked: int) -> None:
    """Three hostile sites that answer before all others make no median among themselves."""
    parent = parent_adapter()
    updates = attacked(parent)
    shares, sums = [], []
    for turn, order in enumerate((updates, updates[::-1], updates[5:] + updates[:5])):
        (spool := tmp_path / str(turn)).mkdir()
        fold = Exact().begin(parent, spool, asked)
        for one in order:
            fold.add(one)
        result = fold.finish()
        shares.append(result.weights)
        sums.append(torch.cat([dense(result.tensors)[module].flatten() for module in ATTACKED]))
    assert shares[1] == pytest.approx(shares[0])
    assert shares[2] == pytest.approx(shares[0])
    assert max(shares[0][f"hostile-{i}"] for i in range(HOSTILE)) < 0.08
    assert max(distance(one, sums[0]) for one in sums) < 1e-4


@pytest.mark.parametrize("late_first", [True, False])
def test_a_clip_counts_every_site_that_may_answer(tmp_path: Path, late_first: bool) -> None:
    """Three sites with long changes and five with short ones that came after them: the roster grew before the first."""
    parent = parent_adapter()
    long = [update(f"long-{i}", parent, away(parent, 10.0, i, 0.2)) for i in range(3)]
    short = [update(f"short-{i}", parent, away(parent, 1.0, i, 0.2)) for i in range(5)]
    fold = Exact().begin(parent, tmp_path, 3)
    fold.sites = 8
    for one in [*short, *long] if late_first else [*long, *short]:
        fold.add(one)
    weights = fold.finish().weights
    assert [weights[f"long-{i}"] for i in range(3)] == pytest.approx([2 / 10 / 8] * 3, rel=0.2)


def test_sites_that_changed_nothing_do_not_shorten_the_others() -> None:
    parent = parent_adapter()
    idle = [update(f"idle-{i}", parent, parent.tensors) for i in range(3)]
    result = Exact().aggregate(parent, [*idle, update("busy", parent, away(parent, 1.0, 1, 0.2))])
    assert result.weights["busy"] == pytest.approx(0.25)
