"""A PEFT directory that cannot be served is refused before its weights are used, by a name and with a remedy."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from umbel import peft_dir, peft_import
from umbel.errors import AdapterError
from umbel.peft_import import look, read
from umbel.peft_settings import PeftSettings

MODULES = ("q_proj", "v_proj")
Q, V = (f"model.layers.0.self_attn.{name}" for name in MODULES)
SHAPES = {Q: (6, 5), V: (4, 5)}
SETTINGS: dict[str, Any] = {
    "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": list(MODULES),
    "use_dora": False, "bias": "none", "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
    "peft_version": "0.18.0", "revision": None, "lora_dropout": 0.05, "megatron_core": "megatron.core",
    "a_key_of_the_future": None, "init_lora_weights": True, "auto_mapping": {"base_model_class": "LlamaForCausalLM"},
}  # fmt: skip


def factors(rank: int = 2, dtype: Any = np.float32, modules: dict[str, tuple[int, int]] = SHAPES) -> peft_dir.Tensors:
    draw = np.random.default_rng(0)
    tensors: peft_dir.Tensors = {}
    for module, (out, inner) in modules.items():
        tensors[peft_dir.key(module, "A")] = draw.standard_normal((rank, inner)).astype(dtype)
        tensors[peft_dir.key(module, "B")] = draw.standard_normal((out, rank)).astype(dtype)
    return tensors


def written(folder: Path, tensors: peft_dir.Tensors | None = None, **changes: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / peft_dir.CONFIG).write_text(json.dumps({**SETTINGS, **changes}))
    (folder / peft_dir.WEIGHTS).write_bytes(peft_dir.encode(factors() if tensors is None else tensors))
    return folder


def refusal(folder: Path, max_rank: int = 4) -> str:
    """Return why a directory is refused; a look refuses it, too, unless only its weights are wrong."""
    with pytest.raises(AdapterError) as refused:
        read(folder, SHAPES, max_rank, MODULES)
    return str(refused.value)


def test_a_directory_is_read_into_the_canonical_form(tmp_path: Path) -> None:
    found = read(written(tmp_path / "legal"), SHAPES, 4, MODULES)
    assert (found.rank, found.unchanged, look(tmp_path / "legal", SHAPES, 4, MODULES)) == (2, (), 2)
    for name, array in factors().items():
        scaling = 2 if "lora_B" in name else 1
        np.testing.assert_array_equal(found.tensors[name], scaling * array.astype(np.float32))
    peft_dir.validate(found.tensors, SHAPES, rank=2, max_rank=4)


SETTINGS_REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"use_dora": True}, "use_dora is True: SGLang serves no DoRA"),
    ({"bias": "all"}, "bias is 'all': train it with bias = 'none'"),
    ({"lora_bias": True}, "lora_bias is True: train it with lora_bias = false"),
    ({"modules_to_save": ["lm_head"]}, "train it without whole modules"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
    ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA"),
    ({"peft_type": None}, "peft_type is None; only LORA"),
    ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
    ({"init_lora_weights": "pissa_niter_4"}, "path_initial_model_for_weight_conversion"),
    ({"init_lora_weights": "loftq"}, "a base that this start changed"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens"),
    ({"trainable_token_indices": [3]}, "trainable_token_indices"),
    ({"target_parameters": ["experts"]}, "target_parameters"),
    ({"a_key_of_the_future": 3}, "a_key_of_the_future is 3: umbel does not know what it changes"),
    ({"r": 0}, "r is 0; a rank is a whole number"),
    ({"r": True}, "r is True; a rank"),
    ({"r": "8"}, "r is '8'; a rank"),
    ({"lora_alpha": "16"}, "lora_alpha is '16'; it is a finite number"),
    ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
    ({"lora_alpha": 10**400}, "lora_alpha is 1000.*; it is a finite number"),
    ({"alpha_pattern": {"q_proj": -(10**400)}}, "alpha_pattern of .q_proj. is -1000.*; it is a finite number"),
    ({"use_rslora": 1}, "use_rslora is 1; it is true or false"),
    ({"use_rslora": "false"}, "use_rslora is .false.; it is true or false"),
    ({"rank_pattern": [1]}, r"rank_pattern is \[1\]"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern of 'q_proj' is 0"),
    ({"alpha_pattern": {"(": 1}}, "not a regular expression"),
    ({"alpha_pattern": {"q" * 2000: 1}}, "over 1000 characters"),
    ({"target_modules": None}, "target_modules is None"),
    ({"target_modules": {"q_proj": 1}}, "target_modules is"),
    ({"exclude_modules": 3}, "exclude_modules is 3"),
    ({"layers_to_transform": ["0"]}, "layers_to_transform"),
    ({"target_modules": ["q_proj", "v_proj", "k_proj"], "r": 3}, r"lora_A has shape \[2, 5\].*rank 3 needs \[3, 5\]"),
]


@pytest.mark.parametrize(("changes", "why"), SETTINGS_REFUSED)
def test_settings_that_are_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    folder = written(tmp_path / "legal", **changes)
    with pytest.raises(AdapterError, match=why):
        look(folder, SHAPES, 4, MODULES)
    with pytest.raises(AdapterError, match=why):
        read(folder, SHAPES, 4, MODULES)


def with_entry(name: str, shape: tuple[int, ...] = (2, 5), dtype: Any = np.float32) -> peft_dir.Tensors:
    return {**factors(), name: np.zeros(shape, dtype)}


O_PROJ = {"model.layers.0.self_attn.o_proj": (6, 6)}
WEIGHTS_REFUSED: list[tuple[str, Callable[[], peft_dir.Tensors], dict[str, Any], str]] = [
    ("DoRA", lambda: with_entry(f"base_model.model.{Q}.lora_magnitude_vector", (6,)), {}, "a magnitude of DoRA"),
    ("bias", lambda: with_entry(f"base_model.model.{Q}.lora_B.bias", (6,)), {}, "is a bias"),
    ("head", lambda: with_entry("base_model.model.lm_head.lora_A.weight"), {}, "an embedding or the head"),
    ("tokens", lambda: with_entry("base_model.model.model.embed_tokens.weight"), {}, "an embedding or the head"),
    ("saved", lambda: with_entry("base_model.model.score.modules_to_save.weight"), {}, "a whole module"),
    ("name", lambda: with_entry(f"base_model.model.{Q}.lora_A.default.weight"), {}, "save_pretrained"),
    ("other", lambda: with_entry("optimizer"), {}, "no factor of LoRA as peft saves it"),
    ("module", lambda: {**factors(), **factors(modules=O_PROJ)}, {}, r"add 'o_proj' to the sites' .engine.\.target"),
    ("layer", lambda: {**factors(), **factors(modules={"model.layers.9.self_attn.q_proj": (6, 5)})}, {},
     "layers.9.self_attn.q_proj is adapted, and this base has no such"),
    ("experts", lambda: {**factors(), **factors(modules={"model.layers.0.moe.experts.0.w1": (6, 5)})}, {}, "no such"),
    ("rank", lambda: factors(8), {"r": 8}, r"rank is 8, and \[engine\].max_lora_rank is 4; set that to 8"),
    ("shape", lambda: factors(modules={Q: (6, 7), V: (4, 5)}), {}, r"q_proj.lora_A has shape \[2, 7\].*\[2, 5\]"),
    ("lone", lambda: {k: v for k, v in factors().items() if k != peft_dir.key(Q, "B")}, {}, "q_proj has only lora_A"),
    ("lost", lambda: factors(modules={Q: (6, 5)}), {}, "v_proj is adapted by its settings and has no weights"),
    ("unused", factors, {"target_modules": ["q_proj"]}, "v_proj has weights that peft would not use"),
    ("nothing", dict, {"target_modules": []}, "it has no weights"),
]  # fmt: skip


@pytest.mark.parametrize(("tensors", "changes", "why"), [row[1:] for row in WEIGHTS_REFUSED],
                         ids=[row[0] for row in WEIGHTS_REFUSED])  # fmt: skip
def test_weights_that_a_look_refuses(
    tmp_path: Path, tensors: Callable[[], peft_dir.Tensors], changes: dict[str, Any], why: str
) -> None:
    folder = written(tmp_path / "legal", tensors(), **changes)
    with pytest.raises(AdapterError, match=why):
        look(folder, SHAPES, 4, MODULES)
    assert str(folder) in refusal(folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_number_that_is_none_is_found_when_it_is_read(tmp_path: Path, value: float, dtype: Any) -> None:
    tensors = factors(dtype=dtype)
    tensors[peft_dir.key(V, "B")][1, 1] = value
    assert f"{V}.lora_B holds NaN or infinity" in refusal(written(tmp_path / "legal", tensors))


def test_a_scaling_that_is_too_large_is_refused(tmp_path: Path) -> None:
    assert "lora_B times its scaling 1e+39 is too large" in refusal(written(tmp_path / "legal", lora_alpha=2e39))


def test_double_precision_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "legal")
    tensors = {name: array.astype(np.float64) for name, array in factors().items()}
    (folder / peft_dir.WEIGHTS).write_bytes(peft_dir.encode(tensors))
    assert "is F64; it can be one of F32, F16, BF16" in refusal(folder)


def headed(header: str) -> bytes:
    return len(header).to_bytes(8, "little") + header.encode()


def damaged(folder: Path, name: str, content: bytes | None) -> Path:
    (folder / name).write_bytes(content) if content is not None else (folder / name).unlink()
    return folder


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        (peft_dir.CONFIG, None, "adapter_config.json: cannot be read (No such file"),
        (peft_dir.CONFIG, b"{", "adapter_config.json: not JSON"),
        (peft_dir.CONFIG, b"[" * 100_000, "adapter_config.json: not JSON"),
        (peft_dir.CONFIG, b"[]", "adapter_config.json: not a JSON object"),
        (peft_dir.CONFIG, b" " * (1 << 21), "over 1,048,576"),
        (peft_dir.WEIGHTS, None, "adapter_model.safetensors: cannot be read (No such file"),
        (peft_dir.WEIGHTS, b"", "no whole safetensors file"),
        (peft_dir.WEIGHTS, peft_dir.encode(factors())[:-1], "cut off"),
        (peft_dir.WEIGHTS, peft_dir.encode(factors()) + b"x", "damaged"),
        (peft_dir.WEIGHTS, b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (peft_dir.WEIGHTS, b"\x08\0\0\0\0\0\0\0nothing!", "no whole safetensors file"),
        (
            peft_dir.WEIGHTS,
            headed('{"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 1e999]}}'),
            "not a safetensors",
        ),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes | None, why: str) -> None:
    assert why in refusal(damaged(written(tmp_path / "legal"), name, content))


def test_a_pickle_is_not_opened(tmp_path: Path) -> None:
    folder = written(tmp_path / "legal")
    (folder / peft_dir.WEIGHTS).rename(folder / "adapter_model.bin")
    assert "save it again with safe_serialization=True" in refusal(folder)


@pytest.mark.parametrize("name", [peft_dir.CONFIG, peft_dir.WEIGHTS])
def test_a_link_out_of_the_directory_is_not_followed(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "legal")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert "outside of it; copy the directory with `cp -rL`" in refusal(folder)
    os.rename(tmp_path / "elsewhere", folder / "blob")
    (folder / name).unlink()
    (folder / name).symlink_to("blob")
    assert read(folder, SHAPES, 4, MODULES).rank == 2, "a link within it"
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert "cannot be read" in refusal(folder), "a circle"


@pytest.mark.parametrize("name", [peft_dir.CONFIG, peft_dir.WEIGHTS])
def test_a_pipe_is_not_waited_for(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path / "legal")
    (folder / name).unlink()
    os.mkfifo(folder / name)
    assert "not a file" in refusal(folder)


def exchanged_after_the_look(monkeypatch: pytest.MonkeyPatch, exchange: Callable[[], object]) -> None:
    """Exchange something between the check of a directory and its reading, as who may write there can."""
    real = peft_import._checked

    def checked(*args: Any) -> Any:
        found = real(*args)
        exchange()
        return found

    monkeypatch.setattr(peft_import, "_checked", checked)


def test_a_folder_that_becomes_a_link_after_the_look_leads_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = written(tmp_path / "others")
    folder = written(tmp_path / "legal")
    (folder / "inner").mkdir()
    (folder / peft_dir.WEIGHTS).rename(folder / "inner" / peft_dir.WEIGHTS)
    (folder / peft_dir.WEIGHTS).symlink_to(Path("inner") / peft_dir.WEIGHTS)

    def exchange() -> None:
        (folder / "inner").rename(tmp_path / "away")
        (folder / "inner").symlink_to(others)

    exchanged_after_the_look(monkeypatch, exchange)
    assert f"{peft_dir.WEIGHTS} cannot be read (" in refusal(folder)
    (folder / "inner").unlink()
    (tmp_path / "away").rename(folder / "inner")
    monkeypatch.undo()
    assert read(folder, SHAPES, 4, MODULES).rank == 2


def test_a_file_that_grows_after_the_look_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = written(tmp_path / "legal")
    exchanged_after_the_look(monkeypatch, lambda: os.truncate(folder / peft_dir.WEIGHTS, 1 << 33))
    assert "has grown over 1,0" in refusal(folder)


def test_a_name_that_no_file_can_have_is_refused() -> None:
    assert "cannot be read (embedded null" in refusal(Path("/srv/a\0b"))


def test_a_header_that_is_padded_is_too_large(tmp_path: Path) -> None:
    folder = written(tmp_path / "legal")
    whole = (folder / peft_dir.WEIGHTS).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = whole[8 : 8 + length] + b" " * (1 << 21)
    (folder / peft_dir.WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + length :])
    assert "the most that it can have here" in refusal(folder)


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(SETTINGS)), inner, max_size=9),
).map(lambda value: json.dumps({**SETTINGS, **value} if isinstance(value, dict) else value).encode()))  # fmt: skip
def test_any_settings_are_read_or_refused(content: bytes) -> None:
    try:
        parsed = PeftSettings.parse(content)
        assert isinstance(parsed.adapts(Q), bool)
        assert isinstance(parsed.scaling(Q), float)
    except AdapterError:
        pass
