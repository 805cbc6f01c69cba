"""Plots of a run are drawn from whatever blocks it has."""

from dataclasses import replace
from pathlib import Path

import pytest

from serving.bench.pages.plots import draw
from tests.toys.serving.blocks import request, results, run

pytest.importorskip("matplotlib", reason="plots are an extra: pip install umbel[plots]")


def test_a_whole_run_has_every_plot_and_the_same_figures_give_the_same_files(tmp_path: Path) -> None:
    found = results(list(run(request(), harvest=0.6)))
    drawn = [draw(found, tmp_path / name) for name in ("one", "two")]
    names = ["coexec-latency.svg", "coexec-share.svg", "coexec-harvest.svg", "coexec-goodput.svg"]
    assert [file.name for _, file in drawn[0]] == names
    for (title, one), (again, two) in zip(*drawn, strict=True):
        assert title == again
        assert one.read_text().startswith("<?xml")
        assert one.read_bytes() == two.read_bytes()


def test_without_its_blocks_a_plot_is_left_out(tmp_path: Path) -> None:
    blocks = list(run(request(), harvest=0.6))
    alone = [block for block in blocks if block.system != "training"]
    assert [file.name for _, file in draw(results(alone), tmp_path)] == ["coexec-latency.svg", "coexec-goodput.svg"]
    assert draw(results([]), tmp_path) == []


def test_without_quality_goodput_is_still_drawn(tmp_path: Path) -> None:
    found = replace(results(list(run(request(), harvest=0.6))), quality={})
    assert (tmp_path / "coexec-goodput.svg") in [file for _, file in draw(found, tmp_path)]
