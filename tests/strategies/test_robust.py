"""Robust rules work in product space, so that no choice of gauge hides or fakes a distance."""

from pathlib import Path

import numpy as np
import pytest
import torch

from strategies import robust
from strategies.adapter import Adapter, change, factors_of, tensors_of
from strategies.catalogue import STRATEGIES
from strategies.exact import Exact
from strategies.lowrank import gram
from tests.toys.adapters import HONEST, HOSTILE, attacked, away, dense, distance, moved, parent_adapter, rotated, update
from umbel import peft_dir


def error(parent: Adapter, tensors: peft_dir.Tensors) -> float:
    """‖change − honest mean change‖ / ‖honest mean change‖ over the adapter."""
    honest = [dense(away(parent, 1.0, i, 0.2)) for i in range(HONEST)]
    before, after = dense(parent.tensors), dense(tensors)
    wanted = torch.cat([(sum(one[m] for one in honest) / HONEST - before[m]).flatten() for m in before])
    return distance(torch.cat([(after[m] - before[m]).flatten() for m in before]), wanted)


def test_the_mean_is_carried_away_and_clipping_alone_is_not_enough() -> None:
    """Three of ten flip the sign and triple it; a clip bounds their length, not their direction."""
    parent = parent_adapter()
    unclipped = Exact(norm_clip=1e9).aggregate(parent, attacked(parent))
    clipped = Exact(norm_clip=1.0).aggregate(parent, attacked(parent))
    assert error(parent, unclipped.tensors) > 1.0
    assert 0.3 < error(parent, clipped.tensors) < 0.8
    assert clipped.weights["hostile-0"] == pytest.approx(0.1 / 3, rel=0.2)


@pytest.mark.parametrize(
    "options",
    [
        {"robust": "geometric_median"},
        {"robust": "multi_krum", "byzantine": 3},
        {"robust": "fltrust", "trusted_site": "honest-3"},
    ],
)
def test_a_robust_rule_comes_near_the_honest_mean(options: dict) -> None:
    """RFA (arXiv 1912.13445), multi-Krum (NeurIPS 2017) and FLTrust (arXiv 2012.13995) on product-space distances."""
    parent = parent_adapter()
    result = Exact(**options).aggregate(parent, attacked(parent))
    assert error(parent, result.tensors) < 0.25
    assert set(result.weights) == {one.site for one in attacked(parent)}
    assert max(result.weights[f"hostile-{i}"] for i in range(HOSTILE)) < 0.05
    if options["robust"] != "geometric_median":
        assert set(result.left_out) == {f"hostile-{i}" for i in range(HOSTILE)}
        assert all(options["robust"] in reason for reason in result.left_out.values())


def test_krum_on_factors_ranks_colluding_attackers_first_and_in_product_space_last() -> None:
    """In random gauges, factors say nothing of who is near whom; the attackers share one gauge."""
    parent = parent_adapter()
    updates = [factors_of(peft_dir.decode(one.blob)) for one in attacked(parent)[:HONEST]]
    flipped = factors_of(away(parent, -3.0, 90, 0.2))
    updates += [flipped] * HOSTILE
    changes = [{m: change(one[m], parent.factors[m]) for m in one} for one in updates]
    chosen, far = robust.multi_krum(gram(changes), HOSTILE)
    assert set(far) == {7, 8, 9}
    assert chosen[:7].tolist() == pytest.approx([1 / 7] * 7)
    flat = torch.stack(
        [torch.cat([part.flatten().double() for pair in one.values() for part in (pair.A, pair.B)]) for one in updates]
    )
    on_factors, _ = robust.multi_krum(flat @ flat.T, HOSTILE)
    assert (on_factors[7:] > 0).all()  # the negative control


def test_a_tie_is_called_a_tie() -> None:
    parent = parent_adapter()
    alike = [update(f"site-{i}", parent, away(parent, 1.0, 1, 0.2)) for i in range(5)]
    result = Exact(robust="multi_krum", byzantine=1).aggregate(parent, alike)
    assert set(result.left_out) == {"site-4"}
    assert "a tie: it lies as near to the others" in result.left_out["site-4"]
    other = [*alike[:4], update("other", parent, away(parent, 2.0, 2, 0.2))]
    left_out = Exact(robust="multi_krum", byzantine=1).aggregate(parent, other).left_out
    assert "the updates chosen are all the same, and it is another one" in left_out["other"]
    idle = [update("idle", parent, parent.tensors), *alike]
    left_out = Exact(robust="fltrust", trusted_site="site-0").aggregate(parent, idle).left_out
    assert left_out == {"idle": "fltrust: it changed nothing, so its change points nowhere"}


def test_late_honest_sites_count_as_much_as_hostile_ones_that_are_in_time(tmp_path: Path) -> None:
    """With weights 1/√(1 + 3) for four of five honest sites, four hostile ones of nine were all of the median."""
    rule, first = Exact(robust="geometric_median", buffered=True), parent_adapter()
    rule.begin(first, tmp_path, 1)
    fold = rule.begin(first, tmp_path, 9)
    for i in range(4):
        fold.add(update(f"hostile-{i}", first, away(first, -2.0, 90, 0.2)))
    for i in range(5):
        fold.add(update(f"honest-{i}", first, away(first, 1.0, i, 0.2)), staleness=3 if i else 0)
    weights = fold.finish().weights
    assert sum(weight for site, weight in weights.items() if "honest" in site) > 0.5


def test_a_robust_median_is_bounded_by_its_constant_and_not_right() -> None:
    """Error ≤ (1 − α)/√(1 − 2α) times the longest honest deviation (Minsker 2015, Lemma 2.1): four of ten hostile."""
    generator = torch.Generator().manual_seed(0)
    honest = (torch.randn(6, 500, generator=generator, dtype=torch.float64) + 1.0) / 500**0.5
    mean = honest.mean(0)
    points = torch.cat([honest, (-2 * mean).expand(4, -1)])
    found = robust.geometric_median(points @ points.T) @ points
    error, longest = torch.linalg.norm(found - mean), torch.linalg.norm(honest - mean, dim=1).max()
    assert 0.5 * float(torch.linalg.norm(mean)) < float(error) <= (1 - 0.4) / (1 - 0.8) ** 0.5 * float(longest)


def test_weights_do_not_depend_on_the_gauge() -> None:
    parent = parent_adapter()
    other = [
        update(one.site, parent, tensors_of({m: rotated(u, seed=9) for m, u in
               factors_of(peft_dir.decode(one.blob)).items()}, np.float32))
        for one in attacked(parent)
    ]  # fmt: skip
    for rule in ({"robust": "geometric_median"}, {"robust": "fltrust", "trusted_site": "honest-0"}):
        one, two = (Exact(**rule).aggregate(parent, updates) for updates in (attacked(parent), other))
        assert two.weights == pytest.approx(one.weights, abs=1e-4)


def test_geometric_median_is_the_minimizer() -> None:
    """Fermat's point: its gradient Σ (z − Δ_i)/‖z − Δ_i‖ is zero."""
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = robust.geometric_median(points @ points.T)
    assert float(weights.sum()) == pytest.approx(1.0)
    apart = weights @ points - points
    pull = (apart / torch.linalg.norm(apart, dim=1, keepdim=True)).sum(0)
    assert float(torch.linalg.norm(pull)) < 1e-4


def test_multi_krum_needs_enough_updates_and_fltrust_its_trusted_site() -> None:
    parent = parent_adapter()
    few = attacked(parent)[:4]
    krum = Exact(robust="multi_krum", byzantine=1).aggregate(parent, few)
    assert krum.tensors == {}
    assert set(krum.left_out) == {one.site for one in few}
    assert "needs 5 updates, not 4" in krum.left_out["honest-0"]
    trust = Exact(robust="fltrust", trusted_site="centre").aggregate(parent, few)
    assert trust.weights == {}
    assert "trusted site 'centre'" in trust.left_out["honest-0"]


def test_fltrust_with_an_idle_trusted_site_changes_nothing() -> None:
    parent = parent_adapter()
    updates = [update("trusted", parent, parent.tensors), *attacked(parent)]
    result = Exact(robust="fltrust", trusted_site="trusted").aggregate(parent, updates)
    assert peft_dir.digest(peft_dir.encode(result.tensors)) == parent.digest


def test_under_a_robust_rule_data_has_no_say() -> None:
    """How much it holds is what a site claims."""
    parent = parent_adapter()
    loud = [
        update(one.site, parent, peft_dir.decode(one.blob), held_examples=1000 if "hostile" in one.site else 1)
        for one in attacked(parent)
    ]
    result = Exact(robust="geometric_median").aggregate(parent, loud)
    assert error(parent, result.tensors) < 0.25


@pytest.mark.parametrize("name", ["fedit", "flora"])
def test_robust_rules_compose_with_other_means(name: str) -> None:
    parent = parent_adapter()
    same_gauge = [
        update(f"site-{i}", parent, moved(parent, i if i < 5 else 50, 0.01 if i < 5 else 0.5)) for i in range(7)
    ]
    options = {"stack_rank": 16} if name == "flora" else {}
    result = STRATEGIES[name](robust="multi_krum", byzantine=2, **options).aggregate(parent, same_gauge)
    assert set(result.left_out) == {"site-5", "site-6"}
    before = dense(parent.tensors)
    assert all(distance(now, before[m]) < 0.1 for m, now in dense(result.tensors).items())
