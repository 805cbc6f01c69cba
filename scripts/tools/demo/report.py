"""`Examiner`: measures every adapter on every task with the sites' own evaluation code; `show` prints the tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from client.data.prepare import Preparation, prepare
from scripts.tools.demo.answers import show_answers
from serving.cotrainer.jobs.job import read_factors
from serving.cotrainer.quantum import Pieces
from serving.cotrainer.trainer import LoraTrainer
from serving.four_bit.linear import FourBitLinear
from serving.scores import Scores
from umbel.base.packed import packing_of
from umbel.base.shapes import LINEARS, read_config
from umbel.token_file import TokenFile


class Examiner:
    """Measures held-out loss and exact match of adapters over the base in this process, without an engine."""

    def __init__(self, base: Path, rank: int, seq_len: int, dtype: str) -> None:
        """Load the base in `dtype`, that of the sites, to measure adapters up to `rank` on rows up to `seq_len`."""
        self._base, self._seq_len = base, seq_len
        disable_progress_bar()  # type: ignore[no-untyped-call]
        model = AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        if packing_of(read_config(base)):
            FourBitLinear.replace(model)
        pieces = Pieces.whole(16, seq_len)
        self._trainer = LoraTrainer(model, max_rank=rank, target_modules=LINEARS, seq_len=seq_len, pieces=pieces)

    def task(self, train: Path, heldout: Path, into: Path) -> TokenFile:
        """Prepare a task's data in the folder `into`; return its held-out examples as tokens."""
        prepared = prepare(Preparation(train, heldout, 0.1, self._base, self._seq_len, into))
        return TokenFile.open(prepared.eval)

    def examine(self, weights: Path | None, task: TokenFile) -> dict[str, float]:
        """Return the loss (nats per token) and the share of exact matches of an adapter; None: of the base."""
        results: list[Scores] = []
        for _ in self._trainer.evaluate(read_factors(weights) if weights else None, task, results):
            pass
        sums = results[0].sums
        return {"loss": round(sums.loss, 4), "exact_match": round(sums.exact_match, 4)}


def show(summary: Mapping[str, Any], console: Console) -> None:
    """Print the tables that end the demo; `summary.json` holds the same figures."""
    tasks = summary["tasks"]
    quality = Table(title="held-out loss (nats per token) / exact match")
    quality.add_column("adapter")
    for task in tasks:
        quality.add_column(f"{task} task", justify="right")
    for name, scores in summary["quality"].items():
        quality.add_row(name, *(f"{scores[t]['loss']:.3f} / {scores[t]['exact_match']:.0%}" for t in tasks))
    console.print(quality)
    console.print(summary["told"])

    probes = Table(title="what each site's probe of each version found: loss of base → live → shadow, and the verdict")
    for column in ("round", "version", "site", "base", "live", "shadow", "verdict"):
        probes.add_column(column)
    for row in summary["probes"]:
        probes.add_row(*(str(row.get(column, "-")) for column in ("round", "version", "site")), *(
            f"{row[role]:.3f}" if row.get(role) is not None else "-" for role in ("base", "live", "shadow")
        ), row["verdict"])  # fmt: skip
    console.print(probes)

    users = Table(title="users, through the official openai client")
    for column in ("site", "requests", "failed", "answered by", "training", "TTFT p50 / p95 ms", "TPOT p50 / p95 ms"):
        users.add_column(column)
    for site, row in summary["users"].items():
        for label in ("without_training", "with_training"):
            times = row[label]
            cells = [f"{times.get(f'{n}_p50', '-')} / {times.get(f'{n}_p95', '-')}" for n in ("ttft_ms", "tpot_ms")]
            first = label == "without_training"
            versions = ", ".join(f"{version} {count}" for version, count in row["answers_by_version"].items())
            lead = (site, str(row["requests"]), str(row["failed"]), versions) if first else ("", "", "", "")
            users.add_row(*lead, f"{'no' if first else 'yes'} ({times['answers']})", *cells)
    console.print(users)

    rounds = Table(title="rounds: seconds, and Flower messages of a site")
    parts = ("train", "transfer", "aggregate", "load", "probe", "promote")
    for column in ("round", "end", *parts, "messages"):
        rounds.add_column(column, justify="right")
    for row in summary["rounds"]:
        seconds = (f"{row['seconds'].get(part, 0.0):.1f}" for part in parts)
        rounds.add_row(str(row["round"]), row["end"], *seconds, str(max(row["messages"].values(), default=0)))
    console.print(rounds)
    show_answers(summary["answers"], console)
