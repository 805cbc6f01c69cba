"""Jobs of the co-trainer write what was trained or measured, and fail with their reason."""

from pathlib import Path

import numpy as np
import pytest
import torch

from serving.cotrainer.lora import Factors
from serving.scores import Scores
from tests.toys.scheduler import RANK, Make
from tests.toys.serving.served_model import fused
from umbel import peft_dir
from umbel.base.shapes import LINEARS, linear_shapes
from umbel.messages import JobState
from umbel.token_file import TokenFile


def test_the_update_that_is_written_is_what_was_trained(make: Make, tiny_llama: Path) -> None:
    scheduler = make()
    order = scheduler.train_job()
    assert scheduler.tell(order).state is JobState.RUNNING
    status = scheduler.finish()
    assert (status.job, status.state, status.error) == ("job", JobState.DONE, "")
    assert (status.steps, status.examples) == (2, 8)
    assert status.loss_tokens > 0
    assert 0 < status.share <= 1
    update = peft_dir.decode(Path(order.output).read_bytes())
    peft_dir.validate(update, linear_shapes(tiny_llama, LINEARS), rank=RANK, max_rank=RANK)
    trained: Factors = {}
    for _ in scheduler.trainer.copy_out(RANK, trained):
        pass
    assert len(update) == 2 * len(trained)
    for module, pair in trained.items():
        for factor, weight in zip("AB", pair, strict=True):
            np.testing.assert_array_equal(update[peft_dir.key(module, factor)], weight.numpy())
    assert peft_dir.encode(update) != Path(order.parent).read_bytes(), "it has learned something"


def test_the_update_is_in_float32_whatever_is_served(make: Make, tiny_llama: Path) -> None:
    scheduler = make(served=fused(tiny_llama, torch.bfloat16))
    order = scheduler.train_job()
    scheduler.tell(order)
    assert scheduler.finish().state is JobState.DONE
    assert {str(array.dtype) for array in peft_dir.decode(Path(order.output).read_bytes()).values()} == {"float32"}


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("output", [True, False])
def test_an_evaluation_is_the_trainers_and_only_its_file_has_single_examples(
    make: Make, adapter: bool, output: bool
) -> None:
    scheduler = make()
    file = scheduler.run_dir / "scores.npy"
    order = scheduler.evaluate_job().model_copy(update={} if adapter else {"adapter": None})
    scheduler.tell(order.model_copy(update={"output": str(file)} if output else {}))
    status = scheduler.finish()
    expected: list[Scores] = []
    source = None
    if adapter:
        tensors = peft_dir.decode(Path(str(order.adapter)).read_bytes())
        pairs = {name: (torch.tensor(a), torch.tensor(b)) for name, (a, b) in peft_dir.factors(tensors).items()}
        source = pairs.__getitem__
    for _ in scheduler.trainer.evaluate(source, TokenFile.open(Path(order.data)), expected):
        pass
    assert (status.state, status.evaluation) == (JobState.DONE, expected[0].sums)
    assert file.exists() is output
    if output:
        read = Scores.read(file)
        assert (read.loss.tolist(), read.tokens.tolist()) == (expected[0].loss.tolist(), expected[0].tokens.tolist())
        assert read.exact.tolist() == expected[0].exact.tolist()


BAD: list[tuple[str, dict[str, str], str]] = [
    ("no data", {"data": "/nowhere/train.npy"}, "/nowhere/train.npy: not a token file"),
    ("no parent", {"parent": "/nowhere/parent.safetensors"}, "/nowhere/parent.safetensors"),
    ("no place for the update", {"output": "/nowhere/update.safetensors"}, "/nowhere/update.safetensors"),
]


@pytest.mark.parametrize("engine", ["busy", "idle"])
@pytest.mark.parametrize(("changes", "reason"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_a_job_that_cannot_go_on_fails_with_its_reason_and_the_next_one_runs(
    make: Make, engine: str, changes: dict[str, str], reason: str
) -> None:
    scheduler = make()
    scheduler.tell(scheduler.train_job("bad", **changes))
    if engine == "busy":
        scheduler.load(running=1)
        while scheduler.cotrainer.job is not None and scheduler.cotrainer.job.quanta is not None:
            scheduler.busy()
    status = scheduler.finish()
    assert status.state is JobState.FAILED
    assert reason in status.error
    scheduler.tell(scheduler.train_job("good"))
    assert scheduler.finish().state is JobState.DONE
