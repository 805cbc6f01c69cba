"""What config.json asks for and cannot be served, or would be served otherwise than it is trained."""

from pathlib import Path
from typing import Any

import pytest

from tests.toys.sites.base_dir import CONFIG
from umbel.base.config import ARCHITECTURES, config_mistakes

FILE = Path("/base/config.json")
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def said(longest: int | None = None, family: str = "llama", **changes: Any) -> list[str]:
    config = {**CONFIG, "model_type": family, "architectures": [ARCHITECTURES[family]], **changes}
    if family == "mistral":
        config.setdefault("sliding_window", None)
    return [str(error) for error in config_mistakes(FILE.parent, config, longest)]


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_each_family_is_fine_as_it_is(family: str) -> None:
    assert said(family=family) == []


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"hidden_size": None}, "lacks hidden_size; copy"),
        ({"vocab_size": "12", "num_hidden_layers": 0}, "lacks num_hidden_layers, vocab_size; copy"),
        ({"architectures": None}, "architectures is None, not ['LlamaForCausalLM']"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures is ['LlamaForSequenceClassification']"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu': SGLang serves silu only"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config (awq): of quantised bases only bitsan"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq): of quantised bases only bits"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config (fp8): of quantised bases only bitsan"),
        ({"quantization_config": {}}, "quantization_config: of quantised bases only bitsandbytes'"),
        ({"quantization_config": "nf4"}, "quantization_config: of quantised bases only bitsandbytes'"),
        ({"quantization_config": {**NF4, "load_in_8bit": True}}, "quantization_config: bitsandbytes in 8 bits is not"),
        (
            {"quantization_config": {**NF4, "llm_int8_skip_modules": ["q_proj"]}},
            "quantization_config.llm_int8_skip_modules is ['q_proj']; ['lm_head'] or none is served; give the unquant",
        ),
        (
            {"quantization_config": {**NF4, "bnb_4bit_quant_storage": "bfloat16"}},
            "quantization_config.bnb_4bit_quant_storage is 'bfloat16'; 'uint8' or none is served",
        ),
        ({"quantization_config": {**NF4, "bnb_4bit_quant_type": "int4"}}, "quantization_config.bnb_4bit_quant_type is"),
        ({"compression_config": {"quant_method": "x"}}, "compression_config (x): of quantised bases only bitsan"),
        ({"dual_chunk_attention_config": {"chunk_size": 8}}, "dual_chunk_attention_config: training would attend"),
        ({"rope_scaling": "x"}, "rope_scaling is not a JSON object"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling of type 'dynamic': training would"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_scaling of type 'longrope'"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "rope_parameters of type 'dynamic'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.3}}, "rope_scaling.attention_f"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attn_factor": 1.3}}, "rope_scaling.attn_factor = 1.3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ],
)
def test_a_base_that_cannot_be_served_as_it_is_trained_is_refused(changes: dict[str, Any], says: str) -> None:
    (line,) = said(**changes)
    assert line.startswith(f"{FILE}: {says}")


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": None},
        {"quantization_config": NF4},
        {"quantization_config": {**NF4, "bnb_4bit_quant_type": "fp4", "llm_int8_skip_modules": ["lm_head"]}},
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.1386294, "attn_factor": 1}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"sliding_window": 4, "layer_types": ["sliding_attention"]},
    ],
)
def test_what_sglang_and_training_do_alike_is_fine(changes: dict[str, Any]) -> None:
    assert said(**changes) == []


@pytest.mark.parametrize("file", ["hf_quant_config.json", "quant_model_description.json"])
def test_a_file_that_says_that_the_base_is_quantised_is_refused(tmp_path: Path, file: str) -> None:
    (tmp_path / file).write_text("{}")
    (error,) = config_mistakes(tmp_path, CONFIG)
    assert str(error).startswith(f"{tmp_path / file}: SGLang would take the base for one that is quantised in")


QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 32, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "changes", "longest", "window"),
    [
        ("mistral", {"sliding_window": 32}, None, 32),
        ("mistral", {"sliding_window": 32}, 33, 32),
        ("mistral", {"sliding_window": 32}, 32, None),
        ("mistral", {"sliding_window": 64}, None, None),
        ("mistral", {"sliding_window": None}, None, None),
        ("qwen2", QWEN_WINDOW, None, 32),
        ("qwen3", QWEN_WINDOW, None, 32),
        ("qwen2", QWEN_WINDOW, 32, None),
        ("qwen2", {**QWEN_WINDOW, "max_window_layers": 2}, None, None),
        ("qwen2", {**QWEN_WINDOW, "max_window_layers": 2, "layer_types": ["sliding_attention"] * 2}, None, 32),
        ("qwen2", {**QWEN_WINDOW, "layer_types": ["full_attention"] * 2}, None, None),
        ("qwen2", {**QWEN_WINDOW, "use_sliding_window": False}, None, None),
    ],
)
def test_a_sliding_window_is_refused_only_where_a_text_can_be_longer(
    family: str, changes: dict[str, Any], longest: int | None, window: int | None
) -> None:
    lines = said(longest, family, **changes)
    assert len(lines) == (window is not None)
    if lines:
        assert lines[0].startswith(f"{FILE}: attention is meant to reach {window} tokens back, but texts may have ")
        assert f"set context_length = {window} in [engine.extra_args]" in lines[0]


def test_a_mistral_model_that_says_nothing_has_the_window_of_transformers() -> None:
    config = {**CONFIG, "model_type": "mistral", "architectures": ["MistralForCausalLM"]}
    assert list(config_mistakes(FILE.parent, {**config, "max_position_embeddings": 4096})) == []
    assert len(list(config_mistakes(FILE.parent, {**config, "max_position_embeddings": 4097}))) == 1
