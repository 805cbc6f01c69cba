"""`Options`: mistakes are refused when the run starts, and every option is a key of the run configuration."""

import tomllib

import pytest

from scripts.tools.repository import REPOSITORY
from server.config import RunConfig
from strategies import catalogue
from strategies.catalogue import STRATEGIES
from strategies.exact import Exact
from strategies.fedit import FedIT
from strategies.ffa import FFA
from strategies.options import Options
from strategies.rolora import RoLoRA
from strategies.strategy import LoraStrategy
from umbel.errors import ConfigError


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
        (Exact, {"robust": "geometric_median", "weight_cap": 9}, "a robust rule does not weigh by data"),
        (Exact, {"robust": "geometric_median", "weights": "tokens"}, "a robust rule does not weigh by data"),
        (Exact, {"weights": "equal", "weight_cap": 9}, "every site weighs 1 already"),
        (Exact, {"weights": "examples"}, "weights: Input should be 'data', 'tokens' or 'equal'"),
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
    assert catalogue.find(config.strategy)(**config.options).options == Options(max_examples=320, max_steps=40)
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
