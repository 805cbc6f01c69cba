"""An export: whole, loadable, and with a card that explains it."""

import hashlib
import json
import subprocess
from pathlib import Path

import pytest

from server.registry.peft import export as adapter_export
from tests.toys.registry import PIN, begun, blob, publish, v
from tests.toys.site import BASE
from umbel.errors import ConfigError


def test_an_export_is_whole_and_its_card_names_sites_reasons_and_errors(tmp_path: Path) -> None:
    registry = begun(tmp_path / "r")
    publish(
        registry, 1, weights={"a": 0.6, "b": 0.4}, left_out={"c": "its adapter holds NaN | really\n# no\x1b"},
        certificate={"model.layers.0.self_attn.q_proj": 1.5e-7},
        change_certificate={"model.layers.0.self_attn.q_proj": 3e-6}, counts={"a": {"num-examples": 320}},
        site_metrics={"a": {"train-loss": 1.25}}, options={"norm-clip": 2.0}, code="0.1.0", config="c" * 64,
    )  # fmt: skip
    into = adapter_export.export(registry, v(1), tmp_path / "out" / "support", base="meta-llama/Llama-3.1-8B")
    checked = subprocess.run(
        ["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=into, capture_output=True, check=False
    )
    assert checked.returncode == 0
    assert (into / "adapter_model.safetensors").read_bytes() == blob(1)
    config = json.loads((into / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "meta-llama/Llama-3.1-8B"
    card = (into / "README.md").read_text()
    assert card.startswith('---\nbase_model: "meta-llama/Llama-3.1-8B"\nlibrary_name: peft\ntags:')
    for line in ("| a | 0.6000 | num-examples 320 | train-loss 1.25 |",
                 "| c | its adapter holds NaN \\| really # no\\u001b |",
                 "| model.layers.0.self_attn.q_proj | 1.5e-07 | 3e-06 |", "| options | norm-clip 2 |"):  # fmt: skip
        assert line in card.splitlines()
    for part in (PIN.fingerprint.digest, registry.lineage, "--lora-paths support-v1=./support-v1", "its chat template"):
        assert part in card
    with pytest.raises(ConfigError, match="there already"):
        adapter_export.export(registry, v(1), into)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
DENSE = BASE.model_copy(update={"quantization": hashlib.sha256(b"null").hexdigest()})
MIXED = "trained on nf4 (0.6) and bfloat16 (0.4)"


@pytest.mark.parametrize(
    ("facts", "recipe", "trained_on"),
    [
        ({"bases": {"bfloat16": 0.4, "nf4": 0.6}}, NF4, ""),
        ({"bases": {"bfloat16": 0.4, "nf4": 0.6}}, None, ""),
        ({"bases": {"bfloat16": 0.4, "nf4": 0.6}}, {**NF4, "bnb_4bit_quant_type": "fp4"}, MIXED),
        ({"bases": {"nf4": 1.0}}, None, "trained on nf4 (1)"),
        ({"bases": {"nf4": 1.0}}, NF4, ""),
        ({"bases": {"nf4": 1.0}}, {**NF4, "bnb_4bit_quant_type": "fp4"}, "trained on nf4 (1)"),
        ({"bases": {"bfloat16": 1.0}}, None, ""),
        ({"fingerprint": DENSE}, NF4, "trained on a base in 16 or 32 bits"),
        ({"fingerprint": DENSE}, None, ""),
        ({"fingerprint": BASE}, None, "trained on a base in 4 bits"),
        ({"fingerprint": None}, NF4, ""),
    ],
)
def test_a_base_of_another_kind_than_trained_a_version_is_named_in_its_card(
    tmp_path: Path, facts: dict, recipe: dict | None, trained_on: str
) -> None:
    registry = begun(tmp_path / "r")
    manifest = registry.manifest(publish(registry, 1)).model_copy(update=facts)
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": recipe} if recipe else {}))
    warning = adapter_export.other_kind(manifest, str(tmp_path / "base"))
    if trained_on:
        assert warning == (
            f"{trained_on}; on the other kind of base it is slightly worse: measured +0.016 nats, "
            "docs/how-to/choose-a-base.md"
        )
    assert bool(warning) == bool(trained_on)
    card = adapter_export.card(manifest, str(tmp_path / "base"))
    assert ("**This base**: the version was trained on" in card) == bool(trained_on)
    for elsewhere in ("", "meta-llama/Llama-3.1-8B", str(tmp_path / "none")):
        assert adapter_export.other_kind(manifest, elsewhere) == ""


def test_the_card_says_which_kinds_of_base_trained_a_version(tmp_path: Path) -> None:
    registry = begun(tmp_path / "r")
    mixed = registry.manifest(publish(registry, 1, bases={"bfloat16": 0.4, "nf4": 0.6}))
    assert "| trained on | bfloat16 0.4, nf4 0.6 |" in adapter_export.card(mixed).splitlines()
    assert "trained on |" not in adapter_export.card(mixed.model_copy(update={"bases": {}}))
