"""Results are read from a run's folder, without the void blocks."""

import math
from pathlib import Path

import pytest

from serving.bench import results
from tests.toys.serving.blocks import block, request, run, spent
from tests.toys.serving.blocks import results as of_blocks
from umbel.errors import ConfigError


def test_a_void_block_is_left_out_and_counted(tmp_path: Path) -> None:
    lines = [block("ours", round=0), block("ours", round=1, cores=(1.0, 0.9))]
    (tmp_path / "blocks.jsonl").write_text("".join(one.model_dump_json() + "\n" for one in lines) + '{"cut off')
    (tmp_path / "setting.json").write_text(
        '{"saturation": 20, "capacity": 10, "ttft_s": 0.1, "tpot_s": 0.02, "attained": 1}'
    )
    (tmp_path / "run.json").write_text('{"smoke": false, "trace": null, "machine": {}}')
    found = results.read(tmp_path)
    assert ([one.round for one in found.blocks], found.void) == ([0], 1)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run here that has come far enough \(blocks.jsonl, "):
        results.read(tmp_path)


def test_the_most_there_is_to_harvest_is_what_the_engine_leaves() -> None:
    found = of_blocks(list(run(request(), harvest=0.6)))
    assert found.left("0.3") == pytest.approx(0.8)
    assert found.reached("0.3", "ours").value == pytest.approx(0.6 / 0.8)
    assert found.reached("0.3", "hard").value == pytest.approx(0.3 / 0.8)


def test_what_is_left_is_taken_from_the_same_round() -> None:
    blocks = [
        block("training", condition="none", round=0, tokens=100),
        block("training", condition="none", round=1, tokens=1000),
        block("inference", round=0, engine_share=0.5),
        block("inference", round=1, engine_share=0.2),
        block("ours", round=0, tokens=50),
        block("ours", round=1, tokens=400),
        block("ours", round=2, tokens=1),
    ]
    found = of_blocks(blocks).reached("0.6", "ours")
    assert found.value == pytest.approx((1.0 * 0.5) ** 0.5), "50 of 100 · 0.5, and 400 of 1000 · 0.8"


def test_the_cores_time_adds_up() -> None:
    blocks = [
        block("training", condition="none", tokens=1000, spent=spent(quanta_s=10.0)),
        block("inference", engine_share=0.3),
        block("ours", tokens=450, engine_share=0.92, spent=spent(5.0, hooks_s=0.4, jobless_s=0.2)),
    ]
    time = of_blocks(blocks).core_time("0.6", "ours")
    assert time is not None
    assert (time.alone, time.trainer, time.hooks, time.jobless) == pytest.approx((0.3, 0.5, 0.04, 0.02))
    assert time.beyond == pytest.approx(0.92 - 0.3 - 0.5 - 0.04)
    assert time.unused == pytest.approx(0.08)
    assert time.speed == pytest.approx(0.9)


def test_nothing_is_made_up_where_nothing_was_measured() -> None:
    found = of_blocks([block("ours", tokens=10), block("inference")])
    assert found.core_time("0.6", "ours") is None
    assert math.isnan(found.reached("0.6", "ours").value)
    assert math.isnan(found.left("0.3"))
