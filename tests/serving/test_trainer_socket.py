"""Settings of the co-trainer: every key of the site file that it needs reaches it, and each default is stated once."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ValidationError

from serving.trainer_socket import DAEMON_KEYS, CoTrainerSettings
from umbel.site.config import SiteConfig
from umbel.site.sections import SloSection, TrainingSection
from umbel.site.template import Tables, site_toml


def load(folder: Path, tables: Tables | None = None) -> SiteConfig:
    (folder / "site.toml").write_text(site_toml(tables))
    return SiteConfig.load(folder / "site.toml")


@pytest.mark.parametrize("section", [TrainingSection, SloSection])
def test_every_key_is_the_co_trainers_or_named_as_the_daemons(section: type[BaseModel]) -> None:
    keys = section.model_fields.keys()
    assert keys <= CoTrainerSettings.model_fields.keys() | DAEMON_KEYS, "a key that nobody reads would do nothing"
    assert not CoTrainerSettings.model_fields.keys() & DAEMON_KEYS
    assert TrainingSection.model_fields.keys() >= DAEMON_KEYS


def test_no_default_of_the_site_file_is_stated_again() -> None:
    assert all(field.is_required() for field in CoTrainerSettings.model_fields.values())


def test_the_settings_are_those_of_the_site_file(tmp_path: Path) -> None:
    tables: Tables = {
        "engine": {"max_lora_rank": 32, "target_modules": ["o_proj"]},
        "training": {"micro_batch": 2, "seq_len": 64, "memory_mb": 100, "share_floor": 0.1, "share_cap": 0.5},
        "slo": {"ttft_ms": 400.0, "tpot_ms": 50.0, "quantile": 0.9, "batch_factor": 3.0},
    }
    settings = CoTrainerSettings.of(load(tmp_path, tables))
    assert settings == CoTrainerSettings(
        max_rank=32, target_modules=("o_proj",), adapters=1, micro_batch=2, seq_len=64, memory_mb=100, share_floor=0.1,
        share_cap=0.5, ttft_ms=400.0, tpot_ms=50.0, quantile=0.9, batch_factor=3.0,
    )  # fmt: skip
    file = tmp_path / "site.toml"
    file.write_text(file.read_text() + '\n[[adapter]]\nname = "triage"\n')
    assert CoTrainerSettings.of(SiteConfig.load(file)) == settings.model_copy(update={"adapters": 2})
    settings.write(tmp_path)
    assert CoTrainerSettings.read(tmp_path) == settings
    assert CoTrainerSettings.read(tmp_path / "elsewhere") is None


def test_a_key_that_would_not_reach_the_co_trainer_ends_the_start(tmp_path: Path) -> None:
    class Longer(TrainingSection):
        warmup: int = 3

    config = load(tmp_path)
    training = Longer(**config.training.model_dump())
    with pytest.raises(ValidationError, match="warmup"):
        CoTrainerSettings.of(config.model_copy(update={"training": training}))
