"""What each strategy asks of the sites, refuses, and makes of late, twofold and capped updates."""

import tomllib
from pathlib import Path

import numpy as np
import pytest

from scripts.tools.repository import REPOSITORY
from server.config import RunConfig
from strategies import catalogue
from strategies.base import Adapter, LoraStrategy
from strategies.catalogue import STRATEGIES
from strategies.exact import Exact
from strategies.fedit import FedIT
from strategies.ffa import FFA
from strategies.options import Options
from strategies.rolora import RoLoRA
from tests.toys.adapters import adapter, dense, distance, moved, update
from umbel import peft_dir
from umbel.errors import ConfigError
from umbel.messages import TrainPlan

PLAN = TrainPlan(rank=8, steps=1, seconds=1.0)


def only(factor: str, received: Adapter, seed: int) -> peft_dir.Tensors:
    """Training that moves one factor."""
    trained = moved(received, seed)
    return {name: trained[name] if f"lora_{factor}" in name else array for name, array in received.tensors.items()}


@pytest.mark.parametrize(("rule", "factor"), [(FFA, "B"), (RoLoRA, "B"), (RoLoRA, "A")])
def test_one_trained_factor_makes_the_mean_of_factors_exact(rule: type[LoraStrategy], factor: str) -> None:
    """Notes' T5: with A shared (FFA-LoRA, arXiv 2403.12313) or B shared (RoLoRA's other round) nothing diverges."""
    parent, strategy = adapter(), rule()
    assert strategy.plan(PLAN, 1 if factor == "B" else 2, 32).factors == factor
    updates = [update(f"site-{i}", parent, only(factor, parent, i), num_loss_tokens=100 * (i + 1)) for i in range(3)]
    result = strategy.aggregate(parent, updates)
    assert set(result.certificate.values()) == {0.0}
    for module, mean in dense(result.tensors).items():
        wanted = sum((i + 1) / 6 * dense(only(factor, parent, i))[module] for i in range(3))
        assert distance(mean, wanted) < 1e-6
    frozen = [name for name in parent.tensors if f"lora_{factor}" not in name]
    assert all(np.array_equal(result.tensors[name], parent.tensors[name]) for name in frozen)


@pytest.mark.parametrize(("rule", "factor"), [(FFA, "A"), (RoLoRA, "A")])
def test_a_site_that_trained_the_other_factor_is_left_out(rule: type[LoraStrategy], factor: str) -> None:
    parent, strategy = adapter(), rule()
    strategy.plan(PLAN, 1, 32)
    result = strategy.aggregate(parent, [update("wrong", parent, only(factor, parent, 1))])
    assert "lora_A was changed" in result.left_out["wrong"]
    assert result.tensors == {}


def test_rolora_trains_b_first_and_then_takes_turns() -> None:
    """B is zero at first, and A would have no gradient."""
    rule = RoLoRA()
    assert [rule.plan(PLAN, number, 32).factors for number in (1, 2, 3, 4)] == ["B", "A", "B", "A"]


def test_a_site_trains_at_the_rank_its_engine_serves() -> None:
    assert [Exact().plan(PLAN, 1, most).rank for most in (4, 8, 32)] == [4, 8, 8]
    assert Exact().plan(PLAN, 1, 32).factors == "AB"
    assert {name for name, rule in STRATEGIES.items() if rule.mixed_ranks} == {"dual", "exact", "flora"}


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
    updates = [update(site, parent, moved(parent, 1), num_loss_tokens=count) for site, count in
               {"a": 100, "b": 200, "c": 10_000}.items()]  # fmt: skip
    assert Exact(weight_cap=300).aggregate(parent, updates).weights == pytest.approx({"a": 1 / 6, "b": 1 / 3, "c": 0.5})


@pytest.mark.parametrize(
    ("rule", "options", "reason"),
    [
        (FedIT, {"server_momentum": 0.9}, "factors of two rounds are not aligned"),
        (FFA, {"server_momentum": 0.9}, "turn the A that has to stay"),
        (RoLoRA, {"server_momentum": 0.9}, "turn the factor that stays"),
        (RoLoRA, {"buffered": True}, "trained the other factor"),
        (Exact, {"stack_rank": 8}, "only flora stacks"),
        (STRATEGIES["flora"], {}, "needs stack-rank"),
        (Exact, {"robust": "fltrust"}, "trusted-site go together"),
        (Exact, {"trusted_site": "a"}, "trusted-site go together"),
        (Exact, {"robust": "multi_krum"}, "byzantine go together"),
        (Exact, {"byzantine": 1}, "byzantine go together"),
        (Exact, {"robust": "geometric_median", "weight_cap": 9}, "a robust rule does not weigh by tokens"),
        (Exact, {"robust": "krum"}, "robust: Input should be"),
        (Exact, {"server_momentum": 1.0}, "less than 1"),
        (Exact, {"norm_clip": 0.0}, "greater than 0"),
        (Exact, {"norm_clop": 1.0}, "norm_clop"),
    ],
)
def test_what_makes_no_sense_is_refused_at_start(rule: type[LoraStrategy], options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        rule(**options)


def settings() -> dict[str, object]:
    pyproject = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    return {**pyproject["tool"]["flwr"]["app"]["config"], "registry": "/r"}


def test_every_setting_has_its_default_in_pyproject_and_builds_a_strategy() -> None:
    config = RunConfig.of(settings())
    assert set(settings()) == {str(field.alias) for field in RunConfig.model_fields.values()}
    assert catalogue.find(config.strategy)(**config.options).options == Options(max_examples=320)
    other = RunConfig.of({**settings(), "proximal": 0.1, "buffered": True, "weight-cap": 7, "stack-rank": 16})
    assert other.plan.proximal == 0.1
    assert (other.options["buffered"], other.options["weight_cap"], other.options["stack_rank"]) == (True, 7, 16)
    assert other.digest != config.digest
    assert config.digest == RunConfig.of(settings()).digest


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"robust": "multi_krum", "byzantine": 2, "quorum": 6}, "set quorum to 7 or more"),
        ({"stack-rank": 4}, "stack-rank = 4 is below rank = 8"),
        ({"robust": "median"}, "robust: Input should be"),
    ],
)
def test_a_run_that_could_never_count_is_refused(change: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        RunConfig.of({**settings(), **change})
