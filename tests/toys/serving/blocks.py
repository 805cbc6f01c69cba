"""`block`, `results`, `run`: blocks of a benchmark run, written by hand; `minute_of_requests`: a trace to replay."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from serving.bench.metrics import (
    Block,
    Request,
    Setting,
    Spent,
)
from serving.bench.results import Results
from serving.cotrainer.slo import Slo
from serving.trainer_socket import PreemptionStats

SLO = Slo.usual(ttft_s=0.1, tpot_s=0.02)


def request(ttft: float | None = 0.05, tpot: float | None = 0.01, **more: Any) -> Request:
    return Request(**{"at": 0.0, "ttft": ttft, "tpot": tpot, "longest_gap": 0.03, "tokens": 5, "version": "", **more})


def block(system: str = "ours", *requests: Request, **more: Any) -> Block:
    fields: dict[str, Any] = {"phase": "measure", "condition": "0.6", "round": 0, "window": 10.0, **more}
    return Block(system=system, requests=requests, **fields)


def spent(quanta_s: float, hooks_s: float = 0.0, jobless_s: float = 0.0) -> Spent:
    return Spent(quanta_s=quanta_s, hooks_s=hooks_s, jobless_s=jobless_s)


def results(blocks: list[Block]) -> Results:
    setting = Setting(saturation=20.0, capacity=10.0, ttft_s=0.1, tpot_s=0.02, attained=1.0)
    machine = dict.fromkeys(("cpu", "cores", "memory", "sglang", "torch", "python"), "x")
    facts: dict[str, object] = {"smoke": False, "trace": None, "machine": machine}
    return Results(tuple(blocks), setting, {"": 2.0}, facts, 0)


def run(ours: Request, harvest: float) -> Iterator[Block]:
    """Yield four rounds of all blocks that a bar needs, alike but for the two requests `ours` of each of umbel's."""
    preemption = PreemptionStats(arrivals=100, count=5, p99_s=0.004, longest_s=0.004)
    for number in range(4):
        yield block("training", condition="none", round=number, steps=1000, tokens=100_000, spent=spent(quanta_s=9.5))
        for condition in ("0.3", "0.6", "0.8", "1.2", "square"):
            common: dict[str, Any] = {"condition": condition, "round": number}
            trained = 0 if condition == "1.2" else int(100_000 * harvest)
            yield block("inference", *[request()] * 100, engine_share=0.2, **common)
            yield block("partition", *[request()] * 100, tokens=60_000, engine_share=0.21, trainer_share=0.6, **common)
            yield block("hard", *[request()] * 99, request(ttft=9.0), tokens=30_000, engine_share=0.2,
                        trainer_share=0.3, **common)  # fmt: skip
            yield block("ours", *[request()] * 98, ours, ours, tokens=trained, preemption=preemption,
                        longest_quantum_s=0.005, engine_share=0.85, spent=spent(6.0, 0.2, 0.1), **common)  # fmt: skip
        yield block("unpaced_equal", *[request(ttft=0.5, tpot=0.05)] * 100, round=number, tokens=60_000)
        for server in ("umbel_off", "stock"):
            yield block(server, *[request()] * 10, phase="stock", condition="alone", round=number)


def minute_of_requests(folder: Path) -> Path:
    """Write a trace of one request per second for a minute."""
    path = folder / "trace.csv"
    rows = [f"2023-11-16 18:15:{second:02d}.0000000,{100 + second},{1 + second % 20}" for second in range(60)]
    path.write_text("\n".join(["TIMESTAMP,ContextTokens,GeneratedTokens", *rows]))
    return path
