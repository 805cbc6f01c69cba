"""Peft computes from the published adapter the mean of the weight changes that it computes from the sites' adapters."""

from pathlib import Path

import numpy as np
import peft
import pytest
import torch

from strategies.adapter import tensors_of
from strategies.lowrank import LowRank, truncate, weighted_sum
from umbel import peft_dir
from umbel.adapter import AdapterManifest


def layer() -> "torch.nn.Module":
    model = torch.nn.Module()
    model.q_proj = torch.nn.Linear(10, 12, bias=False)
    model.prepare_inputs_for_generation = None  # peft asks a CAUSAL_LM for it
    return model


@pytest.mark.parametrize("rslora", [False, True])
def test_published_adapter_is_the_weighted_mean_of_peft_adapters(tmp_path: Path, rslora: bool) -> None:
    deltas, updates = [], []
    for seed, (rank, alpha) in enumerate([(2, 8), (4, 4)]):
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            r=rank, lora_alpha=alpha, target_modules=["q_proj"], init_lora_weights=False, use_rslora=rslora
        )
        model = peft.get_peft_model(layer(), config).base_model.model.q_proj
        deltas.append(model.get_delta_weight("default").detach().numpy())
        b, a = (model.__getattr__(f"lora_{f}")["default"].weight.detach().double() for f in "BA")
        updates.append(LowRank(b, a, alpha / (rank**0.5 if rslora else rank)))
    mean, error = truncate(weighted_sum(updates, [0.25, 0.75]), 6)
    blob = peft_dir.encode(tensors_of({"q_proj": mean}, np.float32))
    manifest = AdapterManifest(
        name="support", version=1, digest=peft_dir.digest(blob), base="0" * 64, lineage="l", round=1, rank=6,
        target_modules=("q_proj",),
    )  # fmt: skip
    peft_dir.write(tmp_path / "v1", blob, manifest, base="toy")
    loaded = peft.PeftModel.from_pretrained(layer(), tmp_path / "v1").base_model.model.q_proj
    published = loaded.get_delta_weight("default").detach().numpy()
    assert error < 1e-12
    assert np.allclose(published, 0.25 * deltas[0] + 0.75 * deltas[1], atol=1e-6)
