"""Measures the private memory of a co-trainer inside the engine, and of a trainer in a process of its own."""

import argparse
import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from scripts.tools.repository import REPOSITORY
from serving.four_bit.linear import FourBitLinear
from serving.four_bit.pack import pack
from umbel.base.packed import packing_of
from umbel.base.shapes import read_config

RANK, MICRO_BATCH, SEQ_LEN = 8, 2, 64
MB = 1e6


def main() -> None:
    """Measure both once and print them; end with status 1 if the co-trainer needs more than is allowed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--four-bit", action="store_true", help="pack the base in 4 bits first")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps(alone(options.alone)))
        return
    with tempfile.TemporaryDirectory(prefix="umbel-") as folder:
        base = make_base(Path(folder) / "base", options.hidden, options.layers)
        if options.four_bit:
            pack(base, Path(folder) / "packed")
            base = Path(folder) / "packed"
        base_bytes = sum(shard.stat().st_size for shard in base.glob("*.safetensors"))
        command = [sys.executable, "-m", "scripts.tools.bench.memory", "--alone", str(base)]
        separate = json.loads(
            subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
        )
        status = asyncio.run(inside(base, Path(folder)))
    show(base_bytes, status, separate)


def make_base(into: Path, hidden: int, layers: int) -> Path:
    """Write a Llama with random weights: only its size matters here."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from scripts.tools import tiny_base

    tokenizer = AutoTokenizer.from_pretrained(tiny_base.build(REPOSITORY / ".cache" / "tiny-base"))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=int(hidden * 2.75), num_hidden_layers=layers,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(config)  # type: ignore[no-untyped-call]
    model.float().save_pretrained(into)
    tokenizer.save_pretrained(into)
    return into


def build(model: Any) -> Any:
    """Make a trainer over a model, with the sizes of this benchmark."""
    from serving.cotrainer.quantum import Pieces
    from serving.cotrainer.trainer import LoraTrainer
    from umbel.base.shapes import LINEARS

    pieces = Pieces.whole(MICRO_BATCH, SEQ_LEN)
    return LoraTrainer(model, max_rank=RANK, target_modules=LINEARS, seq_len=SEQ_LEN, pieces=pieces)


def alone(base: Path) -> dict[str, int]:
    """Measure a trainer that loads a base of its own: private bytes before, and after one step."""
    import torch
    from transformers import AutoModelForCausalLM

    from serving.cotrainer import trainer as imported
    from serving.cotrainer.memory import give_back, private_bytes

    assert imported
    before = private_bytes()
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if packing_of(read_config(base)):
        FourBitLinear.replace(model)
    for parameter in filter(torch.is_floating_point, model.parameters()):
        parameter.data = parameter.data.clone()  # a loaded base, not pages of a file that somebody else may map too
    trainer = build(model)
    for _ in trainer.warm_up():
        pass
    give_back()
    return {"before": before, "after": private_bytes(), "state": trainer.state_bytes}


async def inside(base: Path, folder: Path) -> Any:
    """Start an engine and return its co-trainer's status, which has the figures."""
    from scripts.tools.processes import free_port
    from serving.aliases import AliasTable
    from serving.engine import Engine
    from serving.trainer_socket import CoTrainerClient, CoTrainerSettings, socket_path
    from umbel.site.config import SiteConfig
    from umbel.site.template import Tables, site_toml

    tables: Tables = {
        "engine": {"dtype": "float32", "max_lora_rank": RANK},
        "engine.extra_args": {"max_total_tokens": 4000, "max_running_requests": 4},
        "training": {"micro_batch": MICRO_BATCH, "seq_len": SEQ_LEN},
    }
    (folder / "site.toml").write_text(site_toml(tables, name="bench", model=base, port=free_port(), data="none"))
    config = SiteConfig.load(folder / "site.toml")
    config.site.state_dir.mkdir()
    CoTrainerSettings.of(config).write(config.site.state_dir)
    engine = Engine(config)
    try:
        await engine.start(AliasTable(base="base", adapters={"support": {"live": None}}), {})
        return await CoTrainerClient(socket_path(config.site.state_dir)).status()
    finally:
        await engine.stop(drain_s=0)


def show(base_bytes: int, status: Any, separate: dict[str, int]) -> None:
    """Print the figures in MB; end with status 1 if they are over what is allowed."""
    memory, state = status.memory, status.state_bytes
    added = memory["after"] - memory["before"] - state
    allowed = max(0.02 * base_bytes, 32e6)
    own = separate["after"] - separate["before"] - separate["state"]
    activations = memory["calibration"] - memory["after"]
    print(f"base: {base_bytes / MB:.0f} MB; {status.shared_tensors} of {status.frozen_tensors} frozen tensors shared")
    print(f"inside the engine, private MB added: {added / MB:.1f} (allowed {allowed / MB:.0f})")
    print(f"  of it the module tree: {(memory['view'] - memory['before']) / MB:.1f}")
    print(f"  reported apart: LoRA state {state / MB:.1f}, given back after the step {activations / MB:.1f}")
    print(
        f"a trainer in a process of its own, likewise: {own / MB:.1f}, that is {own / max(added, 1):.0f} times as much"
    )
    if added > allowed or status.shared_tensors != status.frozen_tensors:
        sys.exit("bench_memory: over what is allowed")


if __name__ == "__main__":
    main()
