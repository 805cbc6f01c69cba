"""Results are read from a run's folder, without the void blocks."""

from pathlib import Path

import pytest

from serving.bench import results
from tests.toys.serving.blocks import block
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
