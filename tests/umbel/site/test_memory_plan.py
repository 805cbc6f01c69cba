"""A site's device divided by arithmetic: README's example on a card with 24 GB, other cards, and a CPU."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.toys import readme
from umbel.site import slow_dtype
from umbel.site.config import SiteConfig
from umbel.site.memory import CPU_ROOM, SHARE
from umbel.site.memory_plan import GB, MemoryPlan, memory_plan
from umbel.site.template import site_toml

REPOSITORY = Path(__file__).parents[3]
LLAMA_8B: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
CARD = 24 * GB


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path / "base"


def site(model: Path, training: dict[str, Any] | None = None, **flags: Any) -> SiteConfig:
    file = model.parent / "site.toml"
    file.write_text(site_toml({"training": training or {}, "engine.extra_args": flags}, model=model, data="none"))
    return SiteConfig.load(file)


def test_readmes_example_fits_on_24_gb_with_the_default_micro_batch(model: Path) -> None:
    example = readme.site_file()
    file = model.parent / "site.toml"
    file.write_text(example.replace("/models/Llama-3.1-8B-Instruct", str(model)))
    config = SiteConfig.load(file)
    assert (config.training.micro_batch, config.training.seq_len) == (4, 512), "the defaults"
    plan = MemoryPlan.of(config, CARD)
    assert plan.mistake() is None
    assert (plan.rows, plan.recompute) == (4, True)
    assert plan.weights == pytest.approx(16.06 * GB, rel=1e-3)
    assert plan.weights + plan.adapters + plan.runtime + plan.room == CARD
    assert plan.kv_tokens * 131_072 == pytest.approx(plan.room - plan.training, rel=1e-3)
    assert plan.kv_tokens > 10_000
    assert f"{plan.kv_tokens:,} tokens" in (REPOSITORY / "README.md").read_text()
    assert plan.told() == (
        "memory of 24.0 GB: base 16.1 GB, adapters 419 MB, SGLang and CUDA 2.9 GB, training 2.7 GB, KV cache 1.9 GB: "
        f"{plan.kv_tokens:,} tokens, micro-batches of 4, activations computed again"
    )


def test_where_sglang_keeps_too_much_it_is_said_with_the_remedy(model: Path) -> None:
    """SGLang's own defaults leave such a card less than nothing; a smaller chunk, too little for training."""
    none, little = MemoryPlan.of(site(model), CARD), MemoryPlan.of(site(model, chunked_prefill_size=2048), CARD)
    assert none.room < 0
    assert "480 MB more than the device has; pack the base in 4 bits (`umbel base pack`), or" in str(none.mistake())
    assert 0 < little.room * SHARE < little.least
    assert (little.training, little.rows) == (0, None)
    assert "training needs at least 1.8 GB, and gets 0 MB of the 2.7 GB" in str(little.mistake())
    assert "mem_fraction_static" in str(little.mistake())


def test_a_packed_base_leaves_room_and_says_how_much(model: Path) -> None:
    dense = MemoryPlan.of(site(model), CARD)
    recipe = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True}
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": recipe}))
    packed = MemoryPlan.of(site(model), CARD)
    assert packed.weights + packed.saved == dense.weights
    assert packed.room - dense.room == packed.saved > 10e9
    assert packed.mistake() is None
    assert "the base is packed, which saves 10.4 GB, as much as 79," in packed.told()


def test_what_other_adapters_jobs_keep_while_they_wait_is_training_s(model: Path) -> None:
    """Of 48 GB, so that there is room for the same micro-batch."""
    alone = MemoryPlan.of(site(model), 48 * GB)
    file = model.parent / "site.toml"
    file.write_text(file.read_text() + '\n[[adapter]]\nname = "triage"\n\n[[adapter]]\nname = "billing"\n')
    config = SiteConfig.load(file)
    assert len(config.adapter) == 3
    three = MemoryPlan.of(config, 48 * GB)
    assert (three.rows, three.recompute) == (alone.rows, alone.recompute)
    assert three.training - alone.training == three.parked == 2 * 4 * 4 * 41_943_040
    assert alone.parked == 0
    assert "kept (1.3 GB of training for adapters that wait their turn)" in three.told()
    assert "wait" not in alone.told()


@pytest.mark.parametrize(
    ("memory_mb", "rows", "recompute"), [(20_000, 4, False), (9_000, 2, False), (2_700, 4, True), (1_800, 1, True)]
)
def test_memory_mb_is_taken_as_it_is(model: Path, memory_mb: int, rows: int, recompute: bool) -> None:
    plan = MemoryPlan.of(site(model, {"memory_mb": memory_mb}), 48 * GB)
    assert (plan.training, plan.rows, plan.recompute) == (memory_mb << 20, rows, recompute)
    assert plan.mistake() is None


@pytest.mark.parametrize(
    ("memory_mb", "told"), [(100, "training needs at least 1.8 GB, and gets 105 MB"), (40_000, "leaves nothing")]
)
def test_memory_mb_may_be_too_little_and_too_much(model: Path, memory_mb: int, told: str) -> None:
    assert told in str(MemoryPlan.of(site(model, {"memory_mb": memory_mb}), 48 * GB).mistake())


@pytest.mark.parametrize(
    ("device", "flags", "megabytes"),
    [
        (16 << 30, {}, 512 + 128 + 2048 * 1.5 + 2 * 8 + 8 * 42),
        (24 << 30, {}, 512 + 128 + 4096 * 1.5 + 2 * 48 + 8 * 50),
        (48 << 30, {}, 512 + 128 + 4096 * 1.5 + 2 * 32 + 8 * 50),
        (80 << 30, {}, 512 + 128 + 8192 * 1.5 + 2 * 256 + 8 * 58),
        (192 << 30, {}, 512 + 128 + 16384 * 1.5 + 2 * 512 + 8 * 74),
        (80 << 30, {"chunked_prefill_size": 2048}, 10 * 1024),
        (80 << 30, {"mem_fraction_static": 0.8}, 0.2 * 80 * 1024),
    ],
)
def test_sglangs_own_part_is_by_its_rule(model: Path, device: int, flags: dict[str, Any], megabytes: float) -> None:
    plan = MemoryPlan.of(site(model, **flags), device)
    context = 512 << 20
    assert plan.runtime - context == pytest.approx(megabytes * (1 << 20) * (1 - context / device), rel=1e-6)


def test_on_a_cpu_kv_cache_and_training_share_a_room(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_dtype, "DEVICES", model)
    plan = memory_plan(site(model))
    assert plan is not None
    assert (plan.device, plan.runtime, plan.room) == (None, 0, CPU_ROOM)
    assert plan.told().startswith("memory on a CPU: base 16.1 GB, ")
    limited = memory_plan(site(model, max_total_tokens=5000))
    assert limited is not None
    assert "KV cache 655 MB: 5,000 tokens" in limited.told()


@pytest.mark.parametrize(("prints", "known"), [("24576\n24576", 24576 << 20), ("No devices were found", None)])
def test_a_gpu_is_asked_for_its_size(
    model: Path, monkeypatch: pytest.MonkeyPatch, prints: str, known: int | None
) -> None:
    monkeypatch.setattr(slow_dtype, "DEVICES", model)
    (model / "nvidia0").touch()
    tool = model / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho '{prints}'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{model}:/bin:/usr/bin")
    plan = memory_plan(site(model))
    assert (plan and plan.device) == known
    tool.unlink()
    assert memory_plan(site(model)) is None, "its size is not known"
