"""umbel's table of SGLang's flags, its refused variables and its choice of weight files, held against SGLang itself."""

import argparse
from importlib import metadata
from pathlib import Path

import pytest
import torch
from sglang.srt.environ import envs
from sglang.srt.model_loader.weight_utils import filter_duplicate_safetensors_files
from sglang.srt.server_args import ServerArgs
from transformers import AutoConfig, AutoModelForCausalLM

from tests.toys.sites.base_dir import write_base, write_shard
from umbel.base.config import ARCHITECTURES
from umbel.base.files import EMBEDDING, INDEX, weight_files
from umbel.base.shapes import weight_shapes
from umbel.site import flags
from umbel.site.flag_table import KNOWN, OWNED_FLAGS, REFUSED_FLAGS


@pytest.fixture(scope="module")
def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    ServerArgs.add_cli_args(made)
    return made


def test_every_flag_of_sglang_has_a_judgement(parser: argparse.ArgumentParser) -> None:
    options = [option for action in parser._actions for option in action.option_strings if option.startswith("--")]
    assert {flags.plain(option) for option in options} == KNOWN
    assert all(option == "--" + flags.plain(option).replace("_", "-") for option in options), "another spelling"


def test_all_names_of_a_flag_are_judged_alike(parser: argparse.ArgumentParser) -> None:
    for action in parser._actions:
        names = {flags.plain(option) for option in action.option_strings if option.startswith("--")}
        assert names <= OWNED_FLAGS.keys() or not names & OWNED_FLAGS.keys(), names
        assert len({REFUSED_FLAGS.get(name) for name in names}) <= 1, names


def test_the_table_was_made_for_the_pinned_release() -> None:
    assert metadata.version("sglang") == flags.SGLANG


def test_every_refused_variable_is_one_of_sglang() -> None:
    assert [name for name in flags.REFUSED_VARIABLES if not hasattr(envs, name)] == []


@pytest.mark.parametrize(
    "files",
    [
        {"model.safetensors"},
        {"model.safetensors", "consolidated.safetensors"},
        {"model.safetensors", "adapter_model.safetensors"},
        {"model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"},
    ],
    ids=lambda files: " ".join(sorted(files)),
)
@pytest.mark.parametrize("indexed", [None, "model.safetensors", "model-2.safetensors"])
def test_the_weights_that_are_hashed_are_those_that_sglang_loads(
    tmp_path: Path, files: set[str], indexed: str | None
) -> None:
    if indexed is not None and indexed not in files:
        indexed = min(files)
    for name in files:
        write_shard(tmp_path / name, {EMBEDDING: (1, 1)})
    if indexed:
        (tmp_path / INDEX).write_text(f'{{"weight_map": {{"{EMBEDDING}": "{indexed}"}}}}')
    found = [str(tmp_path / name) for name in sorted(files)]
    assert [str(path) for path in weight_files(tmp_path)] == filter_duplicate_safetensors_files(
        found, str(tmp_path), INDEX
    )


@pytest.mark.parametrize("family", ARCHITECTURES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_whole_base_has_every_weight_of_the_model(tmp_path: Path, family: str, bias: bool) -> None:
    """SGLang says nothing of a weight that is in no file, and serves what is in its memory by chance."""
    config = {"attention_bias": bias, "mlp_bias": bias, "head_dim": 6, "tie_word_embeddings": bias}
    model = write_base(tmp_path / family, model_type=family, architectures=[ARCHITECTURES[family]], **config)
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    names = {name: tuple(parameter.shape) for name, parameter in built.named_parameters()}
    assert weight_shapes(model) == names
