"""The real trainer trains an adapter joined from a shared and a personal part; both parts learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from client.rounds.personal import PersonalPart, join, split
from serving.cotrainer.jobs.job import read_factors
from serving.cotrainer.lora import Factors
from serving.cotrainer.progress import Progress
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from serving.scores import Scores
from tests.toys.engine import site_config
from umbel import peft_dir
from umbel.adapter import Personal
from umbel.base.shapes import LINEARS, linear_shapes
from umbel.messages import TrainPlan
from umbel.token_file import NO_LOSS, TokenFile

RANK, MAX_RANK, ROWS, TOKENS = 2, 6, 8, 16


@pytest.fixture(scope="module")
def data() -> TokenFile:
    ids = np.random.default_rng(0).integers(8, 400, (ROWS, TOKENS)).astype(np.int32)
    labels = np.where(np.arange(TOKENS) < TOKENS // 2, NO_LOSS, ids).astype(np.int32)
    return TokenFile(Path("test"), ids, labels, np.full(ROWS, TOKENS, np.int32))


@pytest.fixture(scope="module")
def trainer(tiny_llama: Path) -> LoraTrainer:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    pieces = Pieces(micro_batch=4, attention_rows=4, mlp_tokens=4 * TOKENS, head_tokens=1000)
    return LoraTrainer(base, target_modules=LINEARS, max_rank=MAX_RANK, seq_len=TOKENS, pieces=pieces)


def untrained(model: Path) -> peft_dir.Tensors:
    """Make the adapter that a site receives in the first round: A drawn, B zero."""
    generator = np.random.default_rng(1)
    tensors: peft_dir.Tensors = {}
    for module, (out, inner) in linear_shapes(model, LINEARS).items():
        tensors[peft_dir.key(module, "A")] = generator.uniform(-0.1, 0.1, (RANK, inner)).astype(np.float32)
        tensors[peft_dir.key(module, "B")] = np.zeros((out, RANK), np.float32)
    return tensors


@pytest.mark.parametrize("personal", [Personal(part="B"), Personal(part="adapter", rank=4)], ids=["fedsa", "dual"])
def test_two_rounds_at_a_site(
    trainer: LoraTrainer, data: TokenFile, tiny_llama: Path, tmp_path: Path, personal: Personal
) -> None:
    part = PersonalPart(site_config(tmp_path, max_lora_rank=MAX_RANK), "support", "mine", personal)
    plan = TrainPlan(rank=RANK, steps=8, seconds=1e6, batch_size=ROWS, learning_rate=5e-3, personal=personal)

    def train(start: peft_dir.Tensors) -> peft_dir.Tensors:
        order = plan.model_copy(update={"rank": plan.joined_rank, "personal": None})
        list(trainer.train(order, read_factors(written(start)), data, Progress()))
        into: Factors = {}
        list(trainer.copy_out(order.rank, into))
        return {peft_dir.key(m, f): w.numpy() for m, pair in into.items() for f, w in zip("AB", pair, strict=True)}

    def loss(adapter: peft_dir.Tensors) -> float:
        found: list[Scores] = []
        list(trainer.evaluate(read_factors(written(adapter)), data, found))
        return found[0].sums.loss

    def written(adapter: peft_dir.Tensors) -> Path:
        peft_dir.write_durably(tmp_path / "adapter.safetensors", peft_dir.encode(adapter))
        return tmp_path / "adapter.safetensors"

    received = untrained(tiny_llama)
    losses = [loss(received)]
    for _ in range(2):
        trained = train(part.begin(received, 0))
        peft_dir.validate(trained, linear_shapes(tiny_llama, LINEARS), rank=plan.joined_rank, max_rank=MAX_RANK)
        sent, own = split(trained, received, personal)
        assert any(not np.array_equal(sent[name], received[name]) for name in sent), "the shared part has learned"
        part.keep(received, peft_dir.encode(own))
        received = sent  # as if no other site took part
        losses.append(loss(join(received, own, personal)))
        assert losses[-1] == loss(trained), "what is served is what was trained"
        assert loss(received) > losses[-1], "the own part has learned too"
    assert losses == sorted(losses, reverse=True)
