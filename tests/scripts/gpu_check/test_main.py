"""The base of a check: a model's directory, or one that is made in the cache."""

from pathlib import Path

import pytest

from scripts.tools import real_base, tiny_base
from scripts.tools.gpu_check.main import find_base, machine
from scripts.tools.gpu_check.site import Device
from umbel.errors import ConfigError


def test_a_base_is_a_directory_or_the_name_of_one_that_is_made(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path, tmp_path: Path
) -> None:
    made: list[str] = []
    monkeypatch.setattr(tiny_base, "build", lambda into, recipe: made.append(recipe.family) or tmp_path)
    monkeypatch.setattr(real_base, "build", lambda: made.append("smollm2") or tmp_path)
    assert [find_base("tiny"), find_base("smollm2")] == [tmp_path, tmp_path]
    assert made == ["llama", "smollm2"]
    assert find_base(str(tiny_llama)) == tiny_llama.resolve()
    with pytest.raises(ConfigError, match="no base model here"):
        find_base(str(tmp_path / "nothing"))


def test_a_report_names_the_releases_that_its_figures_belong_to() -> None:
    facts = machine(Device("cpu", "float32", None))
    assert {"umbel", "sglang", "torch", "transformers", "peft", "python", "cores"} <= facts.keys()
    assert "gpu" not in facts
