"""`admit`: every hostile or mistaken update is left out, with its reason."""

from collections.abc import Callable

import numpy as np
import pytest

from strategies.adapter import Update
from strategies.exact import Exact
from strategies.fedit import FedIT
from strategies.strategy import LoraStrategy
from tests.toys.adapters import adapter, random_tensors, update
from umbel import peft_dir
from umbel.messages import JobState


def poisoned(value: float) -> Callable[[peft_dir.Tensors], peft_dir.Tensors]:
    def poison(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
        name = min(tensors)
        hurt = tensors[name].copy()
        hurt[0, 0] = value
        return {**tensors, name: hurt}

    return poison


def rank_one(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
    return random_tensors(5, rank=1)  # numpy would broadcast it into any rank


def without_a_module(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
    return {name: array for name, array in tensors.items() if "v_proj" not in name}


def with_an_unknown_key(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
    return {**tensors, "base_model.model.lm_head.weight": np.ones((2, 2), np.float32)}


def of_two_ranks(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
    return {name: array[:1] if name.endswith("v_proj.lora_A.weight") else array for name, array in tensors.items()}


def transposed_in_part(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
    return {name: array.T if name.endswith("lora_B.weight") else array for name, array in tensors.items()}


def swapped(tensors: peft_dir.Tensors) -> peft_dir.Tensors:
    return {name: array.T for name, array in tensors.items()}


@pytest.mark.parametrize(
    ("hurt", "report", "reason"),
    [
        (poisoned(np.nan), {}, "NaN or infinity"),
        (poisoned(np.inf), {}, "NaN or infinity"),
        (poisoned(3e38), {}, "values above 100"),
        (rank_one, {"rank": 3}, "its rank is 1, it reported 3"),
        (swapped, {}, "its rank is 10, this round's is 3"),
        (transposed_in_part, {}, "shape"),
        (of_two_ranks, {}, "an adapter has one rank"),
        (without_a_module, {}, "lacks"),
        (with_an_unknown_key, {}, "not a LoRA factor"),
        (None, {"parent": "0" * 64}, "this round's parent"),
        (None, {"num_loss_tokens": 0}, "nothing to weigh it by"),
        (None, {"num_examples": 10**9, "num_loss_tokens": 10**12}, "the plan allows 1000"),
        (None, {"num_loss_tokens": 10**12}, "an example has at most"),
        (None, {"steps": 0}, "claims 0 optimizer steps, the plan allows 1 to 9"),
        (None, {"steps": 10}, "claims 10 optimizer steps, the plan allows 1 to 9"),
        (None, {"held_examples": 0}, "claims to hold 0 examples"),
        (None, {"held_examples": 1 << 25}, "a site holds 1 to 16777216 examples"),
        (None, {"held_loss_tokens": 99}, "claims to hold 100 examples with 99 tokens; each has at least one"),
        (None, {"held_loss_tokens": 10**12}, "an example has at most"),
        (None, {"loss_sum": float("nan")}, "loss is nan"),
        (None, {"state": JobState.RUNNING}, "not done"),
        (None, {"update": "0" * 64}, "changed on the way"),
    ],
)
@pytest.mark.parametrize("strategy", [Exact, FedIT])
def test_a_hostile_update_is_left_out_with_its_reason(
    strategy: type[LoraStrategy], hurt: Callable[[peft_dir.Tensors], peft_dir.Tensors] | None, report: dict, reason: str
) -> None:
    """NaN, infinity, a rank that broadcasts, missing and unknown keys, claims, a replayed parent."""
    parent, honest = adapter(), random_tensors(1)
    bad = random_tensors(2) if hurt is None else hurt(random_tensors(2))
    rule = strategy(max_examples=1000, max_steps=9)
    alone = rule.aggregate(parent, [update("good", parent, honest)])
    result = rule.aggregate(parent, [update("bad", parent, bad, **report), update("good", parent, honest)])
    assert list(result.left_out) == ["bad"]
    assert reason in result.left_out["bad"]
    assert result.weights == {"good": 1.0}
    assert peft_dir.encode(result.tensors) == peft_dir.encode(alone.tensors)


def test_wrong_base_and_bytes_that_are_no_adapter_are_left_out() -> None:
    parent = adapter()
    good = update("good", parent, random_tensors(1))
    foreign = Update("foreign", good.blob, good.report, "another base")
    noise = Update("noise", b"\x93NUMPY" + bytes(64), good.report, "base")
    huge = Update("huge", bytes(5 << 20), good.report, "base")
    result = Exact().aggregate(parent, [foreign, noise, huge, good])
    assert "trained on base" in result.left_out["foreign"]
    assert "not a safetensors file" in result.left_out["noise"]
    assert "bytes" in result.left_out["huge"]
    assert result.weights == {"good": 1.0}


def test_a_small_rank_that_was_not_asked_for_is_left_out() -> None:
    parent = adapter()
    small = update("small", parent, random_tensors(5, rank=1))
    assert "this round's parent is" in Exact().aggregate(parent, [small]).left_out["small"]
    assert "at rank 1" in Exact().aggregate(parent, [small]).left_out["small"]
    assert "needs one rank" in FedIT().aggregate(parent, [small]).left_out["small"]
