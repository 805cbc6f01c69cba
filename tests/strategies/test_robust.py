"""Robust rules: product-space, so that no choice of gauge hides or fakes a distance."""

from pathlib import Path

import numpy as np
import pytest
import torch

from strategies import robust
from strategies.adapter import change, factors_of, tensors_of
from strategies.base import Adapter, Update
from strategies.catalogue import STRATEGIES
from strategies.exact import Exact
from strategies.lowrank import LowRank, gram
from tests.toys.adapters import adapter, dense, distance, moved, random_tensors, rotated, update
from umbel import peft_dir

SHAPES = {"model.layers.0.self_attn.q_proj": (30, 24), "model.layers.0.self_attn.v_proj": (20, 24)}
HONEST, HOSTILE = 7, 3


def parent_adapter() -> Adapter:
    return adapter(random_tensors(0, rank=4, shapes=SHAPES))


def away(parent: Adapter, times: float, seed: int, noise: float) -> peft_dir.Tensors:
    """G + times · (a common step + noise of one's own), in a random gauge, at the parent's rank: a step in B."""
    common, own = random_tensors(500, rank=4, shapes=SHAPES), random_tensors(seed, rank=4, shapes=SHAPES)
    made = {}
    for name, array in parent.tensors.items():
        step = 0.1 * times * (common[name] + noise * own[name]) if "lora_B" in name else 0.0
        made[name] = array + step
    return tensors_of({module: rotated(one, seed=seed) for module, one in factors_of(made).items()}, np.float32)


def attacked(parent: Adapter) -> list[Update]:
    """Seven honest sites, and three that send the opposite of theirs, times three."""
    honest = [update(f"honest-{i}", parent, away(parent, 1.0, i, 0.2)) for i in range(HONEST)]
    hostile = [update(f"hostile-{i}", parent, away(parent, -3.0, 90 + i, 0.2)) for i in range(HOSTILE)]
    return honest + hostile


def error(parent: Adapter, tensors: peft_dir.Tensors) -> float:
    """‖change − honest mean change‖ / ‖honest mean change‖ over the adapter."""
    honest = [dense(away(parent, 1.0, i, 0.2)) for i in range(HONEST)]
    before, after = dense(parent.tensors), dense(tensors)
    wanted = torch.cat([(sum(one[m] for one in honest) / HONEST - before[m]).flatten() for m in before])
    return distance(torch.cat([(after[m] - before[m]).flatten() for m in before]), wanted)


def test_the_mean_is_carried_away_and_clipping_alone_is_not_enough() -> None:
    """Notes §2.1: three of ten flip the sign and triple it; a clip bounds their length, not their direction."""
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
    """Notes §0.11: in random gauges, factors say nothing of who is near whom; the attackers share one gauge."""
    parent = parent_adapter()
    updates = [factors_of(peft_dir.decode(one.blob)) for one in attacked(parent)[:HONEST]]
    flipped = factors_of(away(parent, -3.0, 90, 0.2))
    updates += [flipped] * HOSTILE
    changes = [{m: change(one[m], parent.factors[m]) for m in one} for one in updates]
    chosen, far = robust.multi_krum(gram(changes), torch.ones(10, dtype=torch.float64), HOSTILE)
    assert set(far) == {7, 8, 9}
    assert chosen[:7].tolist() == pytest.approx([1 / 7] * 7)
    flat = torch.stack(
        [torch.cat([part.flatten().double() for pair in one.values() for part in (pair.A, pair.B)]) for one in updates]
    )
    on_factors, _ = robust.multi_krum(flat @ flat.T, torch.ones(10, dtype=torch.float64), HOSTILE)
    assert (on_factors[7:] > 0).all()  # the negative control


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
    """Fermat's point: its gradient Σ p_i (z − Δ_i)/‖z − Δ_i‖ is zero."""
    points = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    prior = torch.linspace(1.0, 2.0, 9, dtype=torch.float64)
    weights = robust.geometric_median(points @ points.T, prior)
    assert float(weights.sum()) == pytest.approx(1.0)
    apart = weights @ points - points
    pull = (prior[:, None] * apart / torch.linalg.norm(apart, dim=1, keepdim=True)).sum(0)
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
        sums.append(torch.cat([dense(result.tensors)[module].flatten() for module in SHAPES]))
    assert shares[1] == pytest.approx(shares[0])
    assert shares[2] == pytest.approx(shares[0])
    assert max(shares[0][f"hostile-{i}"] for i in range(HOSTILE)) < 0.08
    assert max(distance(one, sums[0]) for one in sums) < 1e-4


def test_sites_that_changed_nothing_do_not_shorten_the_others() -> None:
    parent = parent_adapter()
    idle = [update(f"idle-{i}", parent, parent.tensors) for i in range(3)]
    result = Exact().aggregate(parent, [*idle, update("busy", parent, away(parent, 1.0, 1, 0.2))])
    assert result.weights["busy"] == pytest.approx(0.25)


def test_under_a_robust_rule_tokens_have_no_say() -> None:
    """A count of tokens is what its site claims."""
    parent = parent_adapter()
    loud = [
        update(one.site, parent, peft_dir.decode(one.blob), num_loss_tokens=10**6 if "hostile" in one.site else 1)
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


def test_a_change_has_no_gauge() -> None:
    """What the rules measure: ΔW − what was received, as one low-rank product."""
    one, other = (LowRank(torch.randn(5, 2), torch.randn(2, 4)) for _ in range(2))
    assert torch.allclose(change(one, other).dense(), one.dense() - other.dense(), atol=1e-5)
