"""Measures seconds, peak memory and error of one aggregation, for sites × shapes × methods, as a Markdown table.

Every row is a process of its own. Methods whose cost is a dense SVD are run on one layer of each shape (`--dense each`)
or on the smallest one alone, scaled by m · n · min(m, n) (`--dense smallest`); the table says which.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scripts.tools.repository import REPOSITORY

RANK = 16
SHAPES: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3.1-8B": {
        "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096),
        "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096),
        "mlp.down_proj": (4096, 14336),
    },
    "Llama-3.2-1B": {
        "self_attn.q_proj": (2048, 2048), "self_attn.k_proj": (512, 2048), "self_attn.v_proj": (512, 2048),
        "self_attn.o_proj": (2048, 2048), "mlp.gate_proj": (8192, 2048), "mlp.up_proj": (8192, 2048),
        "mlp.down_proj": (2048, 8192),
    },
}  # fmt: skip
LAYERS = {"Llama-3.1-8B": 32, "Llama-3.2-1B": 16}
METHODS = ["exact", "exact (QR)", "fedit", "dense SVD", "peft cat", "peft svd"]


def main() -> None:
    """Print the table, or with the hidden option `--one` a single row as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SHAPES, default="Llama-3.1-8B")
    parser.add_argument("--sites", type=int, nargs="+", default=[8])
    parser.add_argument("--layers", type=int, help="of the model; fewer are scaled up, which the table says")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--dense", choices=["each", "smallest"], default="each")
    parser.add_argument("--repeat", type=int, default=3, help="times; the fastest counts")
    parser.add_argument("--fold", type=int, nargs="*", default=[8, 200], help="sites of the memory rows")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return
    show(options)


def show(options: argparse.Namespace) -> None:
    """Print the table, under the command and the machine that it was made with."""
    load = os.getloadavg()[0]
    print(f"`{' '.join(['scripts/bench_aggregate', *sys.argv[1:]])}`")
    print(f"{_processor()}, {options.threads} threads; load {load:.1f} when it began\n")
    print("| method | sites | seconds | CPU seconds | peak MB over start | error | measured |")
    print("|---|---|---|---|---|---|---|")
    runs = [(method, sites) for sites in options.sites for method in options.methods]
    for method, sites in runs + [("fold", sites) for sites in options.fold]:
        row = child(options, method, sites)
        error = "–" if row["error"] is None else f"{row['error']:.1e}"
        seconds = f"{row['seconds']:.2f} | {row['cpu']:.2f}"
        print(f"| {method} | {sites} | {seconds} | {row['peak']:.0f} | {error} | {row['measured']} |", flush=True)


def child(options: argparse.Namespace, method: str, sites: int) -> Any:
    """Measure one row in a process of its own, in the environment that has the method; return the row."""
    python = REPOSITORY / (".venv-engine" if method.startswith("peft") else ".venv") / "bin" / "python"
    layers = [] if options.layers is None else ["--layers", str(options.layers)]
    command = [
        str(python), "-m", "scripts.tools.bench.aggregate", "--one", method, "--model", options.model,
        "--sites", str(sites), *layers,
        "--dense", options.dense, "--repeat", str(options.repeat), "--threads", str(options.threads),
    ]  # fmt: skip
    # Threads that wait do not spin: on a machine with other work, spinning ones would measure each other.
    threads = {"OMP_NUM_THREADS": str(options.threads), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **threads})
    return json.loads(done.stdout.splitlines()[-1])


def one(options: argparse.Namespace) -> dict[str, Any]:
    """Measure one row in this process."""
    import torch

    torch.set_num_threads(options.threads)
    shapes, whole = SHAPES[options.model], LAYERS[options.model]
    if options.one == "fold":
        return fold(options.sites[0])
    if options.one in ("dense SVD", "peft svd"):
        return dense_row(options, shapes, whole)
    layers = options.layers or whole
    modules = {f"model.layers.{layer}.{name}": shape for layer in range(layers) for name, shape in shapes.items()}
    if options.one == "peft cat":
        return measured(options, peft_merge(modules, options.sites[0], "cat"), whole / layers, f"{layers} layers")
    parent, updates = adapters(modules, options.sites[0])
    combined: dict[str, Any] = {}

    def work() -> None:
        combined.update(MEANS[options.one](parent, updates))

    row = measured(options, work, whole / layers, f"{layers} of {whole} layers")
    return {**row, "error": worst_error(combined, parent, updates)}


def measured(options: argparse.Namespace, work: Callable[[], None], times: float, what: str) -> dict[str, Any]:
    """Return wall and CPU seconds of the fastest of several runs, times `times`, and the peak in MB over the start."""
    before, best = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, (float("inf"), float("inf"))
    for _ in range(options.repeat):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        best = min(best, (time.perf_counter() - wall, time.process_time() - cpu))
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    return {"seconds": best[0] * times, "cpu": best[1] * times, "peak": peak, "error": None, "measured": what}


def adapters(modules: dict[str, tuple[int, int]], sites: int) -> tuple[Any, list[Any]]:
    """Make a parent, and the adapters of sites that have drifted from it by 30 %; float32, the same every time."""
    import torch

    from strategies.lowrank import LowRank

    generator = torch.Generator().manual_seed(0)

    def factors(by: float, near: dict[str, LowRank] | None = None) -> dict[str, LowRank]:
        made = {}
        for module, (m, n) in modules.items():
            b, a = (by * torch.randn(size, generator=generator) for size in ((m, RANK), (RANK, n)))
            made[module] = LowRank(b, a) if near is None else LowRank(near[module].B + b, near[module].A + a)
        return made

    parent = factors(0.01)
    return Parent(parent), [factors(0.003, parent) for _ in range(sites)]


class Parent:
    """The part of an `Adapter` that a mean uses, without the bytes."""

    rank, digest = RANK, "parent"

    def __init__(self, factors: dict[str, Any]) -> None:
        self.factors = factors


def by_exact(parent: Any, updates: list[Any]) -> Any:
    """Combine updates by the strategy `exact`."""
    from strategies.exact import ProductMean

    return _all(ProductMean(parent, RANK), parent, updates)


def by_fedit(parent: Any, updates: list[Any]) -> Any:
    """Combine updates by the strategy `fedit`."""
    from strategies.fedit import FactorMean

    return _all(FactorMean(parent), parent, updates)


def _all(mean: Any, parent: Any, updates: list[Any]) -> Any:
    for update in updates:
        mean.add(update, parent, 1.0)
    return mean.finish(float(len(updates)))[0]


def by_qr(parent: Any, updates: list[Any]) -> Any:
    """Combine updates by QR of all factors at once, and truncate."""
    from strategies.lowrank import align, truncate, weighted_sum

    share = [1 / len(updates)] * len(updates)
    return {
        module: align(truncate(weighted_sum([update[module] for update in updates], share), RANK)[0], before)
        for module, before in parent.factors.items()
    }


MEANS: dict[str, Callable[[Any, list[Any]], Any]] = {"exact": by_exact, "exact (QR)": by_qr, "fedit": by_fedit}


def worst_error(combined: Any, parent: Any, updates: list[Any]) -> float:
    """Return the largest ‖mean − best‖ / ‖best‖ over one layer; best: the rank-16 optimum, QR and SVD in float64."""
    import torch

    from strategies.lowrank import norm, truncate, weighted_sum

    worst = 0.0
    for module in list(parent.factors)[:7]:
        precise = [update[module].to("cpu", torch.float64) for update in updates]
        best, _ = truncate(weighted_sum(precise, [1 / len(updates)] * len(updates)), RANK)
        apart = weighted_sum([combined[module].to("cpu", torch.float64), best], [1.0, -1.0])
        worst = max(worst, float(norm(apart) / norm(best)))
    return worst


def dense_row(options: argparse.Namespace, shapes: dict[str, tuple[int, int]], whole: int) -> dict[str, Any]:
    """Measure a method that decomposes dense matrices: one layer of each shape, or of the smallest, scaled up."""
    cost = {shape: shape[0] * shape[1] * min(shape) for shape in shapes.values()}
    chosen = [min(cost, key=lambda shape: cost[shape])] if options.dense == "smallest" else list(cost)
    total = {"seconds": 0.0, "cpu": 0.0, "peak": 0.0}
    work = sum(cost[shape] for shape in shapes.values())
    alike = {shape: [one for one in shapes.values() if cost[one] == cost[shape]] for shape in chosen}
    for shape, like in alike.items():
        run = dense_svd if options.one == "dense SVD" else lambda modules, n: peft_merge(modules, n, "svd")
        times = work / cost[shape] if options.dense == "smallest" else len(like) / sum(s in like for s in chosen)
        options.repeat = 1
        row = measured(options, run({"model.layers.0.self_attn.q_proj": shape}, options.sites[0]), whole * times, "")
        total = {key: (max if key == "peak" else float.__add__)(total[key], row[key]) for key in total}
    what = "one layer of each shape" if options.dense == "each" else f"one layer of {chosen[0]}, by m·n·min(m, n)"
    return {**total, "error": None, "measured": what}


def dense_svd(modules: dict[str, tuple[int, int]], sites: int) -> Callable[[], None]:
    """Return FlexLoRA's work (arXiv 2402.11505): Σ p_i B_i A_i as a matrix, and its SVD."""
    import torch

    _, updates = adapters(modules, sites)

    def work() -> None:
        for module in modules:
            total = sum(update[module].B @ update[module].A / sites for update in updates)
            torch.linalg.svd(total, full_matrices=False)

    return work


def peft_merge(modules: dict[str, tuple[int, int]], sites: int, kind: str) -> Callable[[], None]:
    """Return the work of `peft.add_weighted_adapter` over linear layers of these shapes."""
    import peft
    import torch

    class Tree(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linears = torch.nn.ModuleList(torch.nn.Linear(n, m, bias=False) for m, n in modules.values())
            self.prepare_inputs_for_generation = None

    names = [f"linears.{index}" for index in range(len(modules))]
    config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, init_lora_weights=False)
    model: Any = peft.get_peft_model(Tree(), config, adapter_name="0")
    for site in range(1, sites):
        model.add_adapter(str(site), config)
    everyone, share = [str(site) for site in range(sites)], [1 / sites] * sites

    def work() -> None:
        rank = {} if kind == "cat" else {"svd_rank": RANK}
        model.add_weighted_adapter(everyone, share, "merged", combination_type=kind, **rank)
        model.delete_adapter("merged")

    return work


def fold(sites: int) -> dict[str, Any]:
    """Measure a round's fold from bytes, site after site as in the ServerApp: hidden 1024, four layers, bfloat16."""
    import ml_dtypes
    import numpy as np

    from strategies.adapter import Adapter, Update
    from strategies.exact import Exact
    from umbel import peft_dir
    from umbel.messages import JobState, RoundReport

    rng = np.random.default_rng(0)
    shapes = {f"model.layers.{i}.mlp.{name}": s for i in range(4) for name, s in
              {"up_proj": (2816, 1024), "gate_proj": (2816, 1024), "down_proj": (1024, 2816)}.items()}  # fmt: skip

    def blob() -> bytes:
        tensors: peft_dir.Tensors = {}
        for module, (m, n) in shapes.items():
            for factor, size in (("A", (RANK, n)), ("B", (m, RANK))):
                tensors[peft_dir.key(module, factor)] = rng.normal(0, 0.01, size).astype(ml_dtypes.bfloat16)
        return peft_dir.encode(tensors)

    parent = Adapter.of(blob(), "base")
    report = RoundReport(
        key="k", state=JobState.DONE, parent=parent.digest, steps=1, num_examples=1, num_loss_tokens=9, held_examples=1,
        held_loss_tokens=9, rank=RANK)  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wall, cpu = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory(prefix="umbel-") as spool:
        running = Exact().begin(parent, Path(spool), sites)
        for site in range(sites):
            running.add(Update(f"site-{site}", blob(), report, "base"))
        assert len(running.finish().weights) == sites
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e3
    what = f"updates of {len(parent.blob) / 1e6:.1f} MB; process {before / 1e3:.0f} MB before"
    seconds, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return {"seconds": seconds, "cpu": cpu, "peak": peak, "error": None, "measured": what}


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown CPU")


if __name__ == "__main__":
    main()
