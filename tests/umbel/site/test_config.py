"""A site's settings: from the file, the environment and the defaults."""

from pathlib import Path

import pytest

from tests.toys import readme
from tests.toys.sites.site_file import GOOD, load, refusal
from umbel.base.shapes import LINEARS


def test_a_good_file_is_understood_with_paths_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/umbel")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load(tmp_path, training='eval_data = "~/eval.jsonl"')
    assert config.site.state_dir == tmp_path / "state"
    assert config.model.path == tmp_path / "base"
    assert config.training.data == tmp_path / "private" / "train.jsonl"
    assert config.training.eval_data == Path("/home/umbel/eval.jsonl")
    assert config.socket == tmp_path / "state" / "site.sock"
    assert config.engine.target_modules == LINEARS
    assert config.engine.host == "127.0.0.1", "users of other machines come through a proxy"


def test_absolute_paths_and_a_socket_of_its_own_stay_as_they_are(tmp_path: Path) -> None:
    text = GOOD.format(engine="", training="", more="").replace('"state"', '"/s"\nsocket = "/run/u.sock"')
    config = load(tmp_path, text)
    assert (config.site.state_dir, config.socket) == (Path("/s"), Path("/run/u.sock"))


def test_the_environment_wins_over_the_file_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_SITE__ENGINE__PORT", "30001")
    monkeypatch.setenv("UMBEL_SITE__SITE__NAME", "clinic-b")
    config = load(tmp_path, engine="max_lora_rank = 32")
    assert (config.engine.port, config.engine.max_lora_rank, config.site.name) == (30001, 32, "clinic-b")


def test_a_loaded_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.engine.port = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.engine = config.engine  # type: ignore[misc]


def test_base_and_adapter_cannot_share_a_name(tmp_path: Path) -> None:
    text = GOOD.format(engine="", training="", more="").replace('path = "base"', 'path = "b"\nserved_name = "support"')
    assert refusal(tmp_path, text) == [
        "model.served_name and adapter.0.name are both 'support'; users could not tell them apart, so give one of "
        "them another name"
    ]


def test_the_example_in_the_readme_loads(tmp_path: Path) -> None:
    example = readme.site_file()
    config = load(tmp_path, example)
    assert (config.site.name, config.adapter[0].name, config.engine.port) == ("clinic-a", "support", 30000)
