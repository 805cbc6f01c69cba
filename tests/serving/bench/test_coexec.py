"""A run of the protocol goes on where it stopped, and every block is kept as soon as it has finished."""

import asyncio
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from serving.bench import coexec, testbed
from serving.bench.coexec import FOREVER, Run
from serving.bench.metrics import Block, Setting, read_blocks
from serving.bench.plan import SMOKE, Spec
from serving.bench.trace import Trace
from tests.toys.serving.blocks import block, request
from umbel.errors import ConfigError

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


def test_a_folder_with_a_run_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(testbed, "require_machine", lambda with_priorities: None)
    (tmp_path / "blocks.jsonl").write_text("")
    with pytest.raises(ConfigError, match="go on with --resume"):
        coexec.run(tmp_path, None, smoke=True, resume=False, cache=tmp_path, say=print)


def test_a_machine_that_is_too_small_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})
    with pytest.raises(ConfigError, match="cores 0 and 1"):
        coexec.run(tmp_path / "out", None, smoke=True, resume=False, cache=tmp_path, say=print)
    assert not (tmp_path / "out").exists()
