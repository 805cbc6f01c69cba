"""Measures how soon a site follows a change of its data, and how much it trains for that.

A clinic renames its departments: the same prompts, other answers. Each system has a site and a registry of its own, one
after the other, so that each has the machine to itself; the order turns round with every pair (ABBA). It is the whole
product: `umbel serve` with a real engine, `umbel adapt` for the rounds, and the real verdict. A site first learns the
old data, then works on while nothing changes, then its files change under it.

    measured    `[training] worth = "measured"`, the default: it trains what is worth it
    continuous  `worth = "all"`: every round trains all its steps (B5 of docs/benchmarks.md)
    periodic    the same, a round every so many seconds (B6)
"""

import argparse
import asyncio
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx

from client.data.prepare import Preparation, Prepared, prepare
from scripts.tools import tiny_base
from scripts.tools.bench.drift_figures import Point, Run, Served, show
from scripts.tools.demo.data import TASKS, Task, examples_of
from scripts.tools.processes import ENGINE_BIN, Processes, end_as_ctrl_c, free_port
from scripts.tools.repository import REPOSITORY
from server.registry.registry import AdapterRegistry
from serving.trainer_socket import CoTrainerClient, EvaluateJob, socket_path
from umbel.adapter import AdapterRef
from umbel.site.config import OPERATOR_SOCKET
from umbel.site.template import Tables, site_toml
from umbel.token_file import TokenFile

System = Literal["measured", "continuous", "periodic"]
Workload = Literal["abrupt", "gradual", "recurring"]
SYSTEMS: tuple[System, ...] = ("measured", "continuous", "periodic")
ROWS, HELD_OUT = 480, 64
"""Examples of a site at a time, and those that versions are judged by."""
SETTINGS = ("steps=80", "learning-rate=0.004")
"""Of every round, for all systems: the demo's."""
BATCH = 8
"""Examples of a step; the default of a run."""
LOOK_S = 1.0
"""Seconds between two looks at what was trained."""
STOP_S = 60.0


@dataclass(frozen=True)
class Times:
    """Seconds of the phases, and between the begins of two rounds of the periodic system."""

    learn: float = 45.0
    same: float = 60.0
    changed: float = 75.0
    period: float = 40.0


FULL, QUICK = Times(), Times(learn=25.0, same=15.0, changed=25.0, period=20.0)


def renamed(task: Task, seed: int = 1) -> Task:
    """Return a task whose words mean what other words meant before: no word keeps its part of the answer."""

    def moved(table: dict[str, str], by: int) -> dict[str, str]:
        answers = list(table.values())
        return dict(zip(table, answers[by:] + answers[:by], strict=True))

    first, second = 1 + seed % (len(task.first) - 1), 1 + (2 * seed) % (len(task.second) - 1)
    return dataclasses.replace(task, first=moved(task.first, first), second=moved(task.second, second))


OLD = TASKS["clinic"]
NEW = renamed(OLD)


def parts(workload: Workload, times: Times) -> list[tuple[float, float]]:
    """Return the changes after the phase `same`: (seconds after its end, part of the data that is the new one's)."""
    if workload == "abrupt":
        return [(0.0, 1.0)]
    if workload == "gradual":
        return [(number * times.changed / 8, (number + 1) / 4) for number in range(4)]
    return [(0.0, 1.0), (times.changed, 0.0)]


def main() -> None:
    """Run all systems, in turns, and print what was found."""
    end_as_ctrl_c()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workload", choices=("abrupt", "gradual", "recurring"), default="abrupt")
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--pairs", type=int, default=1, help="times that each system is run there and back (ABBA)")
    parser.add_argument("--once", action="store_true", help="run each system once")
    parser.add_argument("--quick", action="store_true", help="short phases, each system once: it shows that all works")
    parser.add_argument("--json", type=Path, help="file for all figures")
    options = parser.parse_args()
    times = QUICK if options.quick else FULL
    there = list(options.systems)
    order = there if options.quick or options.once else (there + there[::-1]) * options.pairs
    runs = []
    for number, system in enumerate(order):
        with tempfile.TemporaryDirectory(prefix="umbel-") as name:
            run = Trial(Path(name), system, options.workload, times, seed=number // max(1, len(there))).run()
        print(f"{system}: {run.line}", file=sys.stderr, flush=True)
        runs.append(run)
        if options.json:
            options.json.write_text(json.dumps([run.model_dump() for run in runs]))
    print(show(runs, options.workload))


class Trial:
    """One site from its first example to the end of the last phase."""

    def __init__(self, folder: Path, system: System, workload: Workload, times: Times, seed: int) -> None:
        self.system, self.times, self.workload = system, times, workload
        self._folder, self._seed = folder, seed
        self._state = folder / "state"
        self._registry = folder / "registry"
        self._processes = Processes(folder / "logs")
        self._data, self._held = folder / "train.jsonl", folder / "eval.jsonl"
        self._file = folder / "site.toml"
        self._http = httpx.Client(
            transport=httpx.HTTPTransport(uds=str(self._state / OPERATOR_SOCKET)), base_url="http://site", timeout=60
        )

    def run(self) -> Run:
        """Run all phases; return what was trained and served, and how good each version is."""
        self._write_site()
        self._write_data(0.0)
        try:
            self._processes.start("site", [str(ENGINE_BIN / "umbel"), "serve", str(self._file)])
            self._processes.wait_for(self._ready, "the site's start", 400)
            with self._rounds():
                began = time.time()
                points = self._watch(began, self.times.learn + self.times.same)
                for part, until in self._phases():
                    self._write_data(part)
                    points += self._watch(began, self.times.learn + self.times.same + until)
            return Run(
                system=self.system,
                workload=self.workload,
                learn=self.times.learn,
                same=self.times.same,
                points=points,
                served=asyncio.run(self._served(began)),
                tokens_per_step=BATCH * self._tokens_per_row(),
                skipped=self._count("site.skipped"),
                rounds=self._count("round.started"),
            )
        finally:
            self._http.close()
            self._processes.stop()

    def _phases(self) -> list[tuple[float, float]]:
        """Return for each change the new part of the data, and the time at which the next one, or the end, is due."""
        changes = parts(self.workload, self.times)
        ends = [at for at, _ in changes[1:]] + [changes[-1][0] + self.times.changed]
        return [(part, end) for (_, part), end in zip(changes, ends, strict=True)]

    def _write_site(self) -> None:
        worth = "measured" if self.system == "measured" else "all"
        tables: Tables = {
            "model": {"served_name": "tiny"},
            "engine": {"dtype": "float32", "max_lora_rank": 8},
            "training": {"seq_len": 48, "micro_batch": 8, "worth": worth, "eval_data": self._held.name},
        }
        base = tiny_base.build(REPOSITORY / ".cache" / "tiny-base")
        self._file.write_text(site_toml(tables, name="clinic", model=base, port=free_port()))

    def _write_data(self, part: float) -> None:
        """Replace the site's files: `part` of the lines are of the new task; held out is what most of them are of."""
        rng = random.Random(self._seed)
        old, new = (rng.sample(examples_of(task, heldout=False), ROWS) for task in (OLD, NEW))
        count = round(part * ROWS)
        lines = old[: ROWS - count] + new[:count]
        rng.shuffle(lines)
        held = rng.sample(examples_of(NEW if part >= 0.5 else OLD, heldout=True), HELD_OUT)
        for file, rows in ((self._held, held), (self._data, lines)):
            temporary = file.with_suffix(".new")
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
            os.replace(temporary, file)

    @contextmanager
    def _rounds(self) -> Iterator[None]:
        """Run rounds while the block runs."""
        command = [str(ENGINE_BIN / "umbel"), "adapt", str(self._file), "--registry", str(self._registry)]
        command += [word for setting in SETTINGS for word in ("--set", setting)]
        if self.system == "periodic":
            loop = f"while true; do sleep {self.times.period} & {' '.join(command)} --rounds 1; wait; done"
            command = ["bash", "-c", loop]
        rounds = self._processes.start("adapt", command)
        try:
            yield
        finally:
            os.killpg(rounds.pid, signal.SIGINT)
            try:
                rounds.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self._processes.kill("adapt")

    def _watch(self, began: float, until: float) -> list[Point]:
        points = []
        while (now := time.time() - began) < until:
            self._processes.require_alive()
            points.append(Point(at=round(now, 2), steps=self._steps()))
            time.sleep(LOOK_S)
        return points

    def _ready(self) -> bool:
        try:
            return bool(self._http.get("/status").json()["engine"]["ready"])
        except httpx.TransportError:
            return False

    def _steps(self) -> int:
        """Return the optimizer steps that the engine has taken, also those that nothing came of."""
        training = self._http.get("/status").json()["training"]
        return int(training["quanta"].get("optimizer", {"count": 0})["count"]) // self._layers

    @property
    def _layers(self) -> int:
        return int(json.loads((REPOSITORY / ".cache" / "tiny-base" / "config.json").read_text())["num_hidden_layers"])

    def _tokens_per_row(self) -> float:
        data = TokenFile.open(self._prepared("old", OLD).train)
        return data.loss_tokens() / len(data)

    def _events(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in (self._registry / "events.jsonl").read_text().splitlines()]

    def _count(self, event: str) -> int:
        return sum(one["event"] == event for one in self._events())

    async def _served(self, began: float) -> list[Served]:
        """Return the versions that answered users, from when, and how good each is at the old and the new task."""
        promoted = [one for one in self._events() if one["event"] == "round.promoted"]
        trainer, registry, found = CoTrainerClient(socket_path(self._state)), AdapterRegistry(self._registry), []
        held = {name: self._prepared(name, task).eval for name, task in (("old", OLD), ("new", NEW))}
        for one in promoted:
            version, at = int(str(one["version"])), float(str(one["at"])) - began
            weights = self._folder / f"v{version}.safetensors"
            weights.write_bytes(registry.read(AdapterRef("support", version))[0])
            scores = {name: await _evaluate(trainer, f"{name}-{version}", weights, data) for name, data in held.items()}
            found.append(Served(version=version, at=round(at, 2), old=scores["old"], new=scores["new"]))
        return found

    def _prepared(self, name: str, task: Task) -> Prepared:
        """Return the token files of the data that there are, and of all held-out examples of a task."""
        file = self._folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in examples_of(task, heldout=True)))
        return prepare(
            Preparation(
                data=self._data,
                eval_data=file,
                eval_fraction=0.0,
                seq_len=48,
                into=self._folder / "prepared" / name,
                model=REPOSITORY / ".cache" / "tiny-base",
            )
        )


async def _evaluate(trainer: CoTrainerClient, name: str, weights: Path, data: Path) -> tuple[float, float]:
    """Return loss per token and the part of the examples that are answered exactly."""
    job = EvaluateJob(id=f"drift-{name}", adapter=str(weights), data=str(data))
    await trainer.start(job)
    while not (status := await trainer.status(job=job.id)).state.final:
        await asyncio.sleep(0.05)
    assert status.evaluation is not None, status.error
    return status.evaluation.loss, status.evaluation.exact / status.evaluation.examples


if __name__ == "__main__":
    main()
