"""An export: whole, loadable, and with a card that explains it."""

import json
import subprocess
from pathlib import Path

import pytest

from server.registry import export as adapter_export
from tests.toys.registry import PIN, begun, blob, publish, v
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
