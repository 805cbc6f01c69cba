"""The demo's tables, and the measurements in them: those of the base, and of an adapter that differs from it."""

import json
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from scripts.tools.demo.data import write
from scripts.tools.demo.report import Examiner, show
from scripts.tools.trial_site import RANK, random_adapter

TIMES = {"answers": 4, "ttft_ms_p50": 12.5, "ttft_ms_p95": 20.0}
SUMMARY: dict[str, Any] = {
    "tasks": ["clinic", "shop"],
    "told": "A site alone knows one task.",
    "quality": {"base": {"clinic": {"loss": 6.33, "exact_match": 0.0}, "shop": {"loss": 5.14, "exact_match": 0.25}}},
    "probes": [{"round": 1, "version": "support@v1", "site": "clinic-a", "base": 6.3, "shadow": 3.4, "verdict": "yes"}],
    "users": {"clinic-a": {"requests": 8, "failed": 0, "answers_by_version": {"base": 3, "support@v1": 5},
                           "without_training": TIMES, "with_training": {"answers": 4}}},
    "rounds": [{"round": 1, "end": "promoted", "seconds": {"train": 37.04}, "messages": {"a": 3}}],
    "answers": {"clinic-a": [{"question": "Where is Dr. Ostrik?", "right": "Room 108", "base": "I do not know.",
                              "adapter": "Room 108", "version": "support@v1"}]},
}  # fmt: skip


def test_the_tables_hold_what_the_summary_holds() -> None:
    printed = StringIO()
    show(SUMMARY, Console(width=160, file=printed))
    text = printed.getvalue()
    for cell in ("6.330 / 0%", "5.140 / 25%", "support@v1", "3.400", "base 3, support@v1 5", "no (4)", "yes (4)",
                 "12.5 / 20.0", "- / -", "promoted", "37.0", "I do not know.", "Room 108",
                 "Right at clinic-a: 0 of 1 before, 1 after.", "A site alone knows one task."):  # fmt: skip
        assert cell in text, cell


def test_an_adapter_is_measured_over_the_same_base_and_examples(tiny_llama: Path, tmp_path: Path) -> None:
    train, heldout = write("clinic", tmp_path / "data", 40, 8)
    examiner = Examiner(tiny_llama, RANK, seq_len=48, dtype="float32")
    task = examiner.task(train, heldout, tmp_path / "prepared")
    assert len(task) == len([json.loads(line) for line in heldout.read_text().splitlines()])
    (tmp_path / "none.safetensors").write_bytes(random_adapter(tiny_llama, 1, b_std=0.0))
    (tmp_path / "some.safetensors").write_bytes(random_adapter(tiny_llama, 1, b_std=0.5))
    base = examiner.examine(None, task)
    assert examiner.examine(tmp_path / "none.safetensors", task) == pytest.approx(base, abs=2e-4)
    assert abs(examiner.examine(tmp_path / "some.safetensors", task)["loss"] - base["loss"]) > 0.01
    assert examiner.examine(None, task) == base, "an adapter leaves nothing behind in the base"
