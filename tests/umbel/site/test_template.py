"""The site file's template: what it writes is TOML, says what was asked for, and loads."""

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel.site.config import SiteConfig
from umbel.site.template import site_toml, toml_value


def test_without_arguments_it_is_a_site_file_with_what_has_no_default(tmp_path: Path) -> None:
    file = tmp_path / "site.toml"
    file.write_text(site_toml())
    config = SiteConfig.load(file)
    assert (config.site.name, config.adapters, config.engine.port) == ("clinic-a", ("support",), 30000)
    assert config.training.data == tmp_path / "train.jsonl"


def test_tables_add_to_what_is_there_and_replace_it() -> None:
    text = site_toml(
        {
            "training": {"seq_len": 32, "data": "other.jsonl"},
            "engine.env": {"OMP_NUM_THREADS": "8"},
            "engine": {"dtype": "float32"},
            "adapter": [{"name": "triage"}],
            "shadow.guard": [{"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl"}],
        },
        name="x",
        model=Path("/models/base"),
        port=1,
    )
    assert tomllib.loads(text) == {
        "site": {"name": "x", "state_dir": "state"},
        "model": {"path": "/models/base"},
        "adapter": [{"name": "triage"}],
        "engine": {"port": 1, "dtype": "float32", "env": {"OMP_NUM_THREADS": "8"}},
        "training": {"data": "other.jsonl", "seq_len": 32},
        "shadow": {"guard": [{"name": "a", "data": "a.jsonl"}, {"name": "b", "data": "b.jsonl"}]},
    }


def test_training_is_the_last_of_the_required_tables_so_that_more_of_its_keys_may_follow() -> None:
    assert tomllib.loads(site_toml() + "seq_len = 8\n")["training"]["seq_len"] == 8


def test_remarks_stand_behind_their_keys_one_below_the_other() -> None:
    lines = site_toml(comments={"site.name": "yours", "site.state_dir": "made at the start"}).splitlines()
    assert lines[1:3] == ['name = "clinic-a"    # yours', 'state_dir = "state"  # made at the start']
    assert not any("#" in line for line in lines[3:])


@given(st.text(st.characters(exclude_categories=["Cs"])) | st.integers(-(2**63), 2**63 - 1) | st.booleans()
       | st.floats(allow_nan=False, allow_infinity=False) | st.lists(st.integers(0, 9)))  # fmt: skip
def test_every_value_is_read_back_as_it_was(value: object) -> None:
    read = tomllib.loads(f"key = {toml_value(value)}")["key"]
    assert (read, type(read)) == (value, type(value))


@pytest.mark.parametrize("value", [None, float("inf"), float("nan"), {"a": 1}, {1, 2}])
def test_what_toml_has_no_form_for_is_refused(value: object) -> None:
    with pytest.raises((TypeError, ValueError)):
        toml_value(value)
