"""The check `coexec` fails where the interval says that targets are missed, not where it cannot tell."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scripts.tools.gpu_check import coexec as check
from serving.bench.results import Results
from tests.toys.serving.blocks import block, request, results


def found(late: int, of: int) -> Results:
    """Return a run in which `late` of umbel's requests missed a target, and none of inference only."""
    ours = [request(ttft=0.5)] * late + [request()] * (of - late)
    return results(
        [
            block("training", condition="none", tokens=1000),
            block("inference", *[request()] * of),
            block("ours", *ours, tokens=600),
        ]
    )


def test_where_every_block_is_void_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check.bench, "run", lambda out, order, world, say: None)
    monkeypatch.setattr(check.results, "read", lambda out: results([]))
    site: Any = SimpleNamespace(folder=tmp_path, config=None)
    finding = check.coexec(site, 60.0, lambda text: None)
    assert (finding.outcome, finding.skipped) == (
        "skipped", "the client's core was too busy in the blocks that count: they are void"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("late", "of", "outcome", "claim"),
    [(0, 20, "passed", "cannot tell"), (0, 2000, "passed", "met"), (100, 1000, "failed", "missed")],
)
def test_the_interval_decides(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, late: int, of: int, outcome: str, claim: str
) -> None:
    orders: list[Any] = []
    monkeypatch.setattr(check.bench, "run", lambda out, order, world, say: orders.append(order))
    monkeypatch.setattr(check.results, "read", lambda out: found(late, of))
    site: Any = SimpleNamespace(folder=tmp_path, config=None)
    finding = check.coexec(site, 60.0, lambda text: None)
    assert (finding.outcome, finding.figures["claim"]) == (outcome, claim)
    assert finding.figures["harvest"]["ours"]["value"] == pytest.approx(0.6)
    assert finding.figures["requests"] == of
    assert [(order.smoke, order.window) for order in orders] == [(True, 60.0 / check.BLOCKS)]
