"""A site's own base and data are a world of the benchmark, with what its engine needs and nothing else of its file."""

import json
from pathlib import Path
from typing import Any

import pytest

from serving.bench.processes.testbed import site_config
from serving.bench.world import HELDOUT_ROWS, World
from serving.trainer_socket import CoTrainerSettings
from tests.toys.scheduler import SEQ_LEN, write_data
from umbel import peft_dir, token_file
from umbel.base.shapes import linear_shapes
from umbel.errors import ConfigError, DataError
from umbel.site.config import SiteConfig
from umbel.site.template import Table, site_toml

MODULES = ("q_proj", "k_proj", "v_proj", "o_proj")
TABLES: dict[str, Table] = {
    "engine": {"dtype": "float32", "max_lora_rank": 4, "target_modules": list(MODULES)},
    "engine.extra_args": {"max_total_tokens": 4096},
    "engine.env": {"OMP_NUM_THREADS": "8", "MY_OWN": "1"},
    "slo": {"ttft_ms": 400, "tpot_ms": 50},
    "training": {"micro_batch": 2, "seq_len": SEQ_LEN, "share_floor": 0.2},
}


def site(folder: Path, model: Path, **tables: Table) -> SiteConfig:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "clinic-a.toml"
    file.write_text(site_toml({**TABLES, **tables}, model=model))
    return SiteConfig.load(file)


def world(folder: Path, model: Path, heldout: int = 60, **tables: Table) -> World:
    config = site(folder, model, **tables)
    write_data(folder / "train.npy", rows=7)
    write_data(folder / "eval.npy", rows=heldout)
    return World.of_site(config, folder / "train.npy", folder / "eval.npy", folder / "world")


def test_a_sites_engine_is_started_with_its_own_settings(tmp_path: Path, tiny_llama: Path) -> None:
    made = world(tmp_path, tiny_llama)
    config = site_config(tmp_path / "bench", made)
    assert config.model.path == tiny_llama
    assert (config.engine.dtype, config.engine.max_lora_rank, config.engine.target_modules) == ("float32", 4, MODULES)
    assert config.engine.extra_args == {"max_total_tokens": 4096}
    assert config.engine.env["MY_OWN"] == "1"
    assert config.engine.env["OMP_NUM_THREADS"] == "1", "the benchmark gives it one core"
    assert "umbel_bench" in config.engine.env["SGLANG_PLUGINS"]
    settings = CoTrainerSettings.of(config)
    assert (settings.micro_batch, settings.seq_len, settings.share_floor) == (2, SEQ_LEN, 0.0)
    assert config.site.state_dir == tmp_path / "bench" / "state", "never the site's own"


def test_versions_are_of_the_sites_rank_and_layers(tmp_path: Path, tiny_llama: Path) -> None:
    made = world(tmp_path, tiny_llama)
    tensors = peft_dir.decode((made.initial / peft_dir.WEIGHTS).read_bytes())
    peft_dir.validate(tensors, linear_shapes(tiny_llama, MODULES), rank=4, max_rank=4)
    weights = made.prepare_version(tmp_path / "v1")
    config = json.loads((tmp_path / "v1" / peft_dir.CONFIG).read_text())
    assert (config["r"], tuple(config["target_modules"])) == (4, tuple(sorted(MODULES)))
    assert not weights.exists()


def test_prompts_are_of_the_bases_vocabulary_and_evaluations_short(tmp_path: Path, tiny_llama: Path) -> None:
    made = world(tmp_path, tiny_llama)
    assert made.prompt_ids == range(json.loads((tiny_llama / "config.json").read_text())["vocab_size"])
    assert made.tokens_per_row == SEQ_LEN
    kept, given = (token_file.TokenFile.open(file) for file in (made.heldout, tmp_path / "eval.npy"))
    assert len(kept) == HELDOUT_ROWS < len(given)
    assert (kept.labels == given.labels[:HELDOUT_ROWS]).all()


@pytest.mark.parametrize(
    ("slo", "targets"), [({"ttft_ms": 400, "tpot_ms": 50}, (0.4, 0.05)), ({"ttft_ms": 400}, None), ({}, None)]
)
def test_the_sites_targets_are_taken_where_it_has_both(
    tmp_path: Path, tiny_llama: Path, slo: Table, targets: Any
) -> None:
    made = world(tmp_path, tiny_llama, slo=slo)
    assert (made.slo and (made.slo.ttft_s, made.slo.tpot_s)) == targets


def test_a_site_may_be_measured_again(tmp_path: Path, tiny_llama: Path) -> None:
    assert world(tmp_path, tiny_llama) == world(tmp_path, tiny_llama)


def test_a_base_for_shorter_texts_is_refused(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(ConfigError, match="texts of 100 tokens, and the requests of the benchmark have up to 288"):
        world(tmp_path, tiny_llama, **{"engine.extra_args": {"context_length": 100}})


def test_without_a_held_out_example_versions_cannot_be_compared(tmp_path: Path, tiny_llama: Path) -> None:
    with pytest.raises(DataError, match="no example is held out"):
        world(tmp_path, tiny_llama, heldout=0)
