"""Admission and aggregation of whole adapters."""

from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from strategies import catalogue
from strategies.base import LoraStrategy, Update
from strategies.exact import Exact
from strategies.fedit import FedIT
from strategies.records import pack, pack_adapter, unpack, unpack_adapter
from tests.toys.adapters import RANK, SHAPES, adapter, dense, random_tensors, update
from umbel import peft_dir
from umbel.errors import ConfigError, WireError
from umbel.messages import Hello, JobState, RoundOrder, Submit, TrainPlan


def test_exact_is_the_mean_weighted_by_tokens_up_to_its_certificate() -> None:
    parent = adapter()
    one, two = random_tensors(1), random_tensors(2)
    result = Exact().aggregate(
        parent, [update("a", parent, one, num_loss_tokens=300), update("b", parent, two, num_loss_tokens=100)]
    )
    assert result.weights == {"a": 0.75, "b": 0.25}
    for module, mean in dense(result.tensors).items():
        wanted = 0.75 * dense(one)[module] + 0.25 * dense(two)[module]
        error = float(torch.linalg.norm(mean - wanted) / torch.linalg.norm(wanted))
        assert abs(error - result.certificate[module]) < 1e-5  # float32 factors
        singular = np.linalg.svd(wanted.numpy(), compute_uv=False)
        assert abs(error - np.linalg.norm(singular[RANK:]) / np.linalg.norm(singular)) < 1e-5


def test_exact_without_training_is_the_parent_to_the_bit() -> None:
    parent = adapter(dtype=ml_dtypes.bfloat16)
    result = Exact().aggregate(parent, [update(site, parent, parent.tensors) for site in "ab"])
    assert peft_dir.digest(peft_dir.encode(result.tensors)) == parent.digest


def test_fedit_is_the_mean_of_the_factors() -> None:
    parent, one, two = adapter(), random_tensors(1), random_tensors(2)
    result = FedIT().aggregate(parent, [update("a", parent, one), update("b", parent, two)])
    for name, mean in result.tensors.items():
        assert np.allclose(mean, (one[name] + two[name]) / 2, atol=1e-6)
    assert result.certificate == {}


def test_aggregate_is_emitted_in_the_parents_dtype_and_canonical() -> None:
    parent = adapter(dtype=ml_dtypes.bfloat16)
    result = Exact().aggregate(parent, [update("a", parent, random_tensors(1, dtype=ml_dtypes.bfloat16))])
    assert {array.dtype for array in result.tensors.values()} == {np.dtype(ml_dtypes.bfloat16)}
    peft_dir.validate(result.tensors, SHAPES, rank=RANK, max_rank=RANK)


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
        (None, {"loss_sum": float("nan")}, "loss is nan"),
        (None, {"state": JobState.RUNNING}, "not done"),
        (None, {"update": "0" * 64}, "changed on the way"),
    ],
)
@pytest.mark.parametrize("strategy", [Exact, FedIT])
def test_a_hostile_update_is_left_out_with_its_reason(
    strategy: type[LoraStrategy], hurt: Callable[[peft_dir.Tensors], peft_dir.Tensors] | None, report: dict, reason: str
) -> None:
    """Notes' T19: NaN, infinity, a rank that broadcasts, missing and unknown keys, claims, a replayed parent."""
    parent, honest = adapter(), random_tensors(1)
    bad = random_tensors(2) if hurt is None else hurt(random_tensors(2))
    rule = strategy(max_examples=1000)
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


def test_a_zero_update_counts_and_nobody_at_all_gives_no_tensors() -> None:
    parent = adapter()
    zero = {name: np.zeros_like(array) for name, array in parent.tensors.items()}
    result = Exact().aggregate(parent, [update("zero", parent, zero), update("one", parent, random_tensors(1))])
    assert result.weights == {"zero": 0.5, "one": 0.5}
    assert all(np.isfinite(array).all() for array in result.tensors.values())
    assert Exact().aggregate(parent, []).tensors == {}


def test_unknown_strategy_names_the_one_that_was_meant() -> None:
    assert catalogue.find("exact") is Exact
    with pytest.raises(ConfigError, match="did you mean 'fedit'"):
        catalogue.find("fed-it")
    assert catalogue.find("strategies.fedit:FedIT") is FedIT
    with pytest.raises(ConfigError, match="cannot be imported"):
        catalogue.find("strategies.fedit:FedItt")
    with pytest.raises(ConfigError, match="no subclass"):
        catalogue.find("strategies.fedit:FactorMean")
    with pytest.raises(ConfigError, match="known: dual, exact, fedit, fedsa, ffa, flora, rolora"):
        catalogue.find("zzz")
    for wrong in (":", ".x:Y", "x:", ":Y"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            catalogue.find(wrong)


class OneNode:
    def get_node_ids(self) -> list[int]:
        return [7]


def test_flowers_own_verbs_carry_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in ("_task_id", "_run_id", "_node_id"):
        monkeypatch.setattr(TaskIdentity, field, 1)
    parent, trained = adapter(), random_tensors(1)
    plan = TrainPlan(rank=RANK, steps=1, seconds=1.0)
    order = RoundOrder(key="k", base="base", parent=parent.digest, round=1, plan=plan)
    content = pack(Submit(adapter="support", order=order), parent.blob)
    strategy = Exact()
    messages = list(strategy.configure_train(1, content["adapter"], content["body"], OneNode()))
    assert [(m.metadata.dst_node_id, m.metadata.message_type) for m in messages] == [(7, "train.submit")]
    done = update("x", parent, trained)
    replies = [
        Message(pack(done.report, done.blob), reply_to=messages[0]),
        Message(RecordDict({"body": ConfigRecord({"message": b"nonsense"})}), reply_to=messages[0]),
    ]
    arrays, totals = strategy.aggregate_train(1, replies)
    assert isinstance(arrays, ArrayRecord)
    assert totals is not None
    assert totals["num-loss-tokens"] == 100
    got = dense(peft_dir.decode(unpack_adapter(RecordDict({"adapter": arrays})) or b""))
    for module, factors in dense(trained).items():
        assert torch.allclose(got[module], factors, atol=1e-5)
    with pytest.raises(NotImplementedError, match=r"server\.app"):
        strategy.start()


def test_records_refuse_what_they_did_not_make() -> None:
    with pytest.raises(WireError, match="without a Hello"):
        unpack(RecordDict(), Hello)
    with pytest.raises(WireError, match="msgpack"):
        unpack(RecordDict({"body": ConfigRecord({"message": b"\xc1"})}), Hello)
    record = pack_adapter(b"abc")
    record["adapter"].stype = "numpy.ndarray"
    with pytest.raises(WireError, match=r"umbel\.safetensors"):
        unpack_adapter(RecordDict({"adapter": record}))
