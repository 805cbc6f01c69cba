"""The aggregation benchmark's arithmetic: the fastest run counts, and parts of a model are scaled up to the whole."""

import argparse
import time

import pytest

from scripts.tools.bench import aggregate
from scripts.tools.bench.aggregate import LAYERS, SHAPES, dense_row, measured, peft_merge


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**{"repeat": 3, "sites": [2], "one": "peft svd", "dense": "smallest", **changes})


def test_the_fastest_of_all_runs_is_scaled() -> None:
    waits = iter([0.3, 0.1, 0.3])
    row = measured(options(), lambda: time.sleep(next(waits)), 4.0, "1 of 4 layers")
    assert 0.4 <= row["seconds"] < 1.2
    assert row["cpu"] < row["seconds"]
    assert (row["error"], row["measured"]) == (None, "1 of 4 layers")


@pytest.mark.parametrize(
    ("dense", "runs", "times"),
    [
        ("smallest", [(4, 6)], [(4 * 6 * 4 + 2 * 8 * 6 * 6) / (4 * 6 * 4)]),
        ("each", [(4, 6), (8, 6), (6, 8)], [1.0] * 3),
    ],
)
def test_what_is_measured_stands_for_the_whole_model(
    dense: str, runs: list[tuple[int, int]], times: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    scaled: list[float] = []
    asked: list[tuple[int, int]] = []

    def fake(options: argparse.Namespace, work: object, by: float, what: str) -> dict[str, float]:
        scaled.append(by)
        return {"seconds": 1.0, "cpu": 1.0, "peak": float(len(scaled))}

    def merge(modules: dict[str, tuple[int, int]], sites: int, kind: str) -> None:
        asked.extend(modules.values())

    monkeypatch.setattr(aggregate, "measured", fake)
    monkeypatch.setattr(aggregate, "peft_merge", merge)
    row = dense_row(options(dense=dense), {"a": (4, 6), "b": (8, 6), "c": (6, 8)}, 10)
    assert (row["seconds"], row["peak"]) == (float(len(asked)), float(len(asked)))
    assert asked == runs
    assert scaled == [pytest.approx(10 * one) for one in times], "ten layers, and by m · n · min(m, n)"


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_pefts_own_merge_runs_again_and_again(kind: str) -> None:
    work = peft_merge({"model.layers.0.self_attn.q_proj": (24, 20)}, 2, kind)
    work()
    work()


def test_every_model_has_its_layers() -> None:
    assert SHAPES.keys() == LAYERS.keys()
