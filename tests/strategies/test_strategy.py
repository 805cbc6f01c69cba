"""`LoraStrategy`: the behaviour that all rules share, Flower's verbs, and the example in docs/strategies.md."""

import importlib
import re
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from scripts.tools.repository import REPOSITORY
from strategies import catalogue
from strategies.catalogue import STRATEGIES
from strategies.dual import Dual
from strategies.exact import Exact
from strategies.fedit import FedIT
from strategies.fedsa import FedSA
from strategies.records import pack, unpack_adapter
from strategies.strategy import LoraStrategy
from tests.toys.adapters import RANK, SHAPES, adapter, dense, moved, random_tensors, update
from umbel import peft_dir
from umbel.errors import ConfigError
from umbel.messages import RoundOrder, Submit, TrainPlan

PLAN = TrainPlan(rank=8, steps=1, seconds=1.0)
PAGE = REPOSITORY / "docs" / "strategies.md"


def test_aggregate_is_emitted_in_float32_and_canonical() -> None:
    parent = adapter(dtype=ml_dtypes.bfloat16)
    result = Exact().aggregate(parent, [update("a", parent, random_tensors(1, dtype=ml_dtypes.bfloat16))])
    assert {array.dtype for array in result.tensors.values()} == {np.dtype(np.float32)}
    peft_dir.validate(result.tensors, SHAPES, rank=RANK, max_rank=RANK)


def test_a_site_trains_at_the_rank_its_engine_serves() -> None:
    assert [Exact().plan(PLAN, 1, most).rank for most in (4, 8, 32)] == [4, 8, 8]
    assert Exact().plan(PLAN, 1, 32).factors == "AB"
    assert {name for name, rule in STRATEGIES.items() if rule.mixed_ranks} == {"dual", "exact", "flora"}


@pytest.mark.parametrize("rule", [Exact, FedIT])
def test_other_strategies_leave_nothing_at_the_sites(rule: type[LoraStrategy]) -> None:
    assert (rule().plan(PLAN, 1, 32).personal, rule().plan(PLAN, 1, 32).joined_rank) == (None, 8)


@pytest.mark.parametrize(
    ("rule", "options", "reason"),
    [
        (Dual, {}, "needs personal-rank"),
        (Dual, {"personal_rank": 2, "stack_rank": 8}, "only flora stacks"),
        (FedSA, {"personal_rank": 2}, "only dual leaves an adapter"),
        (FedSA, {"server_momentum": 0.9}, "without the B that stay at the sites these are zero"),
        (Exact, {"personal_rank": 2}, "only dual leaves an adapter"),
        (STRATEGIES["flora"], {"stack_rank": 8, "personal_rank": 2}, "only dual leaves an adapter"),
    ],
)
def test_what_makes_no_sense_is_refused_at_start(
    rule: type[LoraStrategy], options: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        rule(**options)


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


def test_the_pages_own_strategy_runs_and_has_at_most_twenty_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)[0]
    assert len([line for line in source.splitlines() if line.strip()]) <= 20
    (tmp_path / "own_median.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    strategy = catalogue.find("own_median:FactorMedian")(norm_clip=2.0)
    parent = adapter()
    trained = [moved(parent, seed) for seed in range(3)]
    result = strategy.aggregate(parent, [update(f"site-{i}", parent, one) for i, one in enumerate(trained)])
    for name, array in result.tensors.items():
        assert np.array_equal(array, np.median([one[name] for one in trained], axis=0))
    assert result.weights == pytest.approx({f"site-{i}": 1 / 3 for i in range(3)})
    del sys.modules["own_median"]
