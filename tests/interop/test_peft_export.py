"""An adapter that `umbel adapter export` has written loads in peft and SGLang, without Flower in the environment."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import torch

from server.registry.peft import export as adapter_export
from tests.toys.registry import PIN, begun
from tests.toys.site import SHAPES
from umbel import peft_dir
from umbel.adapter import AdapterRef

# In a process of its own: SGLang, once imported, changes how transformers loads models.
READ = """
import json, sys
from sglang.srt.lora.lora_config import LoRAConfig
config = LoRAConfig(sys.argv[1])
print(json.dumps([config.r, config.lora_alpha, sorted(config.target_modules)]))
"""


def model() -> torch.nn.Module:
    """Make a tree of linear layers under the paths of SHAPES."""
    root = torch.nn.Module()
    root.prepare_inputs_for_generation = None  # peft asks a CAUSAL_LM for it
    for path, (out, inner) in SHAPES.items():
        *parents, leaf = path.split(".")
        node = root
        for name in parents:
            if not hasattr(node, name):
                node.add_module(name, torch.nn.Module())
            node = getattr(node, name)
        node.add_module(leaf, torch.nn.Linear(inner, out, bias=False))
    return root


def exported(tmp_path: Path) -> tuple[Path, Path, peft_dir.Tensors]:
    """Publish a version; return its export, its directory in the registry, and its tensors."""
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=array.shape).astype(np.float32) for name, array in PIN.initial(0).items()}
    registry = begun(tmp_path / "r")
    registry.publish("support", peft_dir.encode(tensors), round=1, run_id="r", parent="p", weights={"a": 1.0})
    ref = AdapterRef("support", 1)
    return adapter_export.export(registry, ref, tmp_path / "out"), registry.directory(ref), tensors


def test_peft_loads_the_export_and_the_version_in_the_registry(tmp_path: Path) -> None:
    *directories, tensors = exported(tmp_path)
    for directory in directories:
        loaded = peft.PeftModel.from_pretrained(model(), directory).base_model.model
        for module, (a, b) in peft_dir.factors(tensors).items():
            delta = loaded.get_submodule(module).get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(delta, b @ a, atol=1e-5)


def test_sglang_reads_its_settings_and_finds_its_weights(tmp_path: Path) -> None:
    *directories, tensors = exported(tmp_path)
    for directory in directories:
        done = subprocess.run([sys.executable, "-c", READ, directory], capture_output=True, text=True, check=True)
        assert json.loads(done.stdout.splitlines()[-1]) == [2, 2, ["q_proj", "v_proj"]]
        assert peft_dir.decode((directory / peft_dir.WEIGHTS).read_bytes()).keys() == tensors.keys()
