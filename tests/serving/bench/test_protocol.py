"""A run of the protocol goes on where it stopped, and every block is kept as soon as it has finished."""

import asyncio
import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from serving.bench.metrics import Block, Setting, read_blocks
from serving.bench.plan import SMOKE, Spec, strict
from serving.bench.processes.duty import DutyCycle
from serving.bench.protocol import Run
from serving.bench.rounds import FOREVER
from serving.bench.trace import ArrivalProcess, Trace
from serving.cotrainer.slo import Slo
from tests.toys.serving.blocks import block, request

SETTING = Setting(saturation=20.0, capacity=10.0, ttft_s=0.1, tpot_s=0.02, attained=1.0)
PLAN = replace(SMOKE, rounds=2)


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def run(tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run whose blocks take no time and whose setting is known."""

    async def measured(self: Run, spec: Spec, setting: Setting) -> Block:
        assert setting == SETTING
        fields = {"phase": spec.phase, "condition": spec.condition, "round": spec.round}
        return block(spec.system, request(), **fields)

    monkeypatch.setattr(Run, "_block", measured)
    (tmp_path / "setting.json").write_text(json.dumps(asdict(SETTING)))
    bed: Any = None
    return Run(tmp_path, PLAN, Trace.fitted(), bed, said.append)


def test_every_block_is_run_in_the_plans_order_and_kept(run: Run, said: list[str]) -> None:
    asyncio.run(run.protocol())
    assert [one.key for one in run.blocks] == [spec.key for spec in PLAN.specs(SETTING.capacity)]
    assert read_blocks(run.out) == run.blocks
    assert said[-1].startswith(f"{len(run.blocks)} of {len(run.blocks)}: measure 0.6")


def test_a_resumed_run_leaves_out_what_has_finished(run: Run, said: list[str]) -> None:
    keys = [spec.key for spec in PLAN.specs(SETTING.capacity)]
    for phase, condition, system, number in keys[:3]:
        run.blocks.append(block(system, phase=phase, condition=condition, round=number))
    asyncio.run(run.protocol())
    assert len(said) == len(keys) - 3
    assert sorted(one.key for one in run.blocks) == sorted(keys)


def test_a_block_that_was_cut_off_is_run_again(run: Run) -> None:
    asyncio.run(run.protocol())
    file = run.out / "blocks.jsonl"
    file.write_text(file.read_text()[:-20])
    assert [one.key for one in read_blocks(run.out)] == [one.key for one in run.blocks[:-1]]


def test_equal_tokens_are_as_many_steps_as_ours_in_the_same_round(run: Run) -> None:
    run.blocks += [block("ours", round=number, steps=10 * (number + 1)) for number in range(2)]
    run.blocks.append(block("ours", condition="0.3", round=1, steps=7))
    assert run._most_steps(Spec("measure", "0.6", "unpaced_equal", 1)) == 20.0
    assert run._most_steps(Spec("measure", "0.6", "unpaced", 1)) == FOREVER


def test_a_site_is_held_to_its_own_targets_and_the_tiny_base_to_strict_ones(run: Run) -> None:
    alone, own = block("inference", request(), phase="preset"), Slo.usual(0.4, 0.05)
    run.bed = SimpleNamespace(world=SimpleNamespace(slo=own))  # type: ignore[assignment]
    assert run._targets(alone) == own
    run.bed.world.slo = None  # type: ignore[misc]
    assert run._targets(alone) == strict(alone)


def test_only_the_hard_partition_has_turns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[int, int, float]] = []
    monkeypatch.setattr(DutyCycle, "__init__", lambda self, *processes_and_share: made.append(processes_and_share))
    run.bed = SimpleNamespace(scheduler=SimpleNamespace(pid=1), separate_process=SimpleNamespace(pid=2))  # type: ignore[assignment]
    run._partition("hard", {"share": 0.2})
    assert isinstance(run._partition("partition", {"nice": 5.0}), nullcontext)
    assert made == [(1, 2, 0.2)]


def test_the_capacity_is_searched_under_the_same_arrivals_as_it_is_measured(run: Run) -> None:
    run.process = ArrivalProcess.parse("gamma:4")
    assert run._arrivals(10.0, 5.0, 0.1) == run.trace.replay(10.0, 5.0, 0.1, run.process)
    assert run._arrivals(10.0, 5.0, 0.1) != run.trace.replay(10.0, 5.0, 0.1)
