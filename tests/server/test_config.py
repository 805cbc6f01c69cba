"""The run configuration: mistakes are named, and every default stands in one place."""

from pathlib import Path

import pytest

from server.config import RunConfig
from strategies.options import StrategyConfig
from tests.toys.federation import DEFAULTS, SETTINGS
from umbel.errors import ConfigError


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"registry": "registry"}, "registry: registry is relative"),
        ({"adapter": "Support"}, "adapter: 'Support' cannot name an adapter"),
        ({"round-secs": 3}, "round-secs is not a setting; did you mean 'round-seconds'"),
        ({"rounds": -1}, "rounds: Input should be greater than or equal to 0"),
        ({"mixed-base": True}, "mixed-base is not a setting; did you mean 'mixed-bases'"),
        ({"mixed-bases": "nf4"}, "mixed-bases: Input should be a valid boolean"),
        ({"schedule": "linear"}, "schedule: Input should be 'constant' or 'cosine'"),
    ],
)
def test_mistakes_in_the_run_configuration_are_named(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.of({"registry": "/r", **SETTINGS, **change})
    with pytest.raises(ConfigError, match="run configuration: registry is missing"):
        RunConfig.of(SETTINGS)


@pytest.mark.parametrize(
    ("path", "why"), [("signing.key", "signing-key: signing.key is relative"), ("~/x.key", None), ("", None)]
)
def test_the_keys_path_is_absolute(path: str, why: str | None) -> None:
    settings = {**SETTINGS, "registry": "/r", "signing-key": path}
    if why is None:
        assert RunConfig.of(settings).signing_key == (Path(path).expanduser() if path else None)
        return
    with pytest.raises(ConfigError, match=why):
        RunConfig.of(settings)


def test_every_default_is_in_pyproject_and_no_other_one_is_stated() -> None:
    required = {str(field.alias) for field in RunConfig.model_fields.values() if field.is_required()}
    composed = {name.replace("_", "-"): field.default for name, field in StrategyConfig.model_fields.items()}
    assert set(DEFAULTS) == required | composed.keys()
    assert not required & composed.keys()
    assert {key: DEFAULTS[key] for key in composed} == composed, "strategies state these without a run configuration"


def test_a_setting_that_is_left_out_is_missing() -> None:
    for key in set(DEFAULTS) - {name.replace("_", "-") for name in StrategyConfig.model_fields}:
        with pytest.raises(ConfigError, match=f"run configuration: {key} is missing"):
            RunConfig.of({name: value for name, value in DEFAULTS.items() if name != key})


def test_an_objective_is_part_of_the_plan() -> None:
    plan = RunConfig.of(DEFAULTS).plan
    assert (plan.objective, plan.beta) == ("sft", 0.1)
    plan = RunConfig.of({**DEFAULTS, "objective": "dpo", "dpo-beta": 0.3}).plan
    assert (plan.objective, plan.beta) == ("dpo", 0.3)


def test_sites_with_other_bases_take_part_only_where_the_run_asks_for_it() -> None:
    assert not RunConfig.of(DEFAULTS).mixed_bases
    assert RunConfig.of({**DEFAULTS, "mixed-bases": True}).mixed_bases


def test_options_that_make_no_sense_together_are_named_before_the_run_begins() -> None:
    with pytest.raises(ConfigError, match=r"run configuration: robust = 'fltrust' and trusted-site go together"):
        RunConfig.of({**DEFAULTS, "robust": "fltrust"})
