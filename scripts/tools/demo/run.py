"""`Demo`: one run of the demo, from the base model to the tables at its end."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from scripts.tools.certs import make as make_certs
from scripts.tools.demo.answers import questions, side_by_side
from scripts.tools.demo.events import ENDS, SHOWN, broken_promises, describe, probe_row, round_row
from scripts.tools.demo.report import Examiner, show
from scripts.tools.demo.settings import SETTINGS, Setting
from scripts.tools.demo.site import DemoSite
from scripts.tools.demo.users import Users
from scripts.tools.packed_base import packed_base
from scripts.tools.processes import Flower, Processes
from scripts.tools.repository import REPOSITORY
from server.bundle import export
from server.registry.events import EVENTS, EventReader
from serving.four_bit.pack import sign_origin
from umbel import signing
from umbel.site.config import SiteConfig

TASKS = ("clinic", "shop")
ALONE_KNOWS_LESS = (
    "A site alone knows one task and nothing of the other; the federated adapter learns both at the same rank."
)
QUIET_S = 20.0
"""Seconds with users only, before the first round, so that there is something to compare with."""


class Demo:
    """One run of the demo: each step is a method, says on the console what it does, and is called in turn by `run`."""

    def __init__(
        self, out: Path, sites: int, rounds: int, processes: Processes, *, secure: bool,
        setting: Setting = SETTINGS["tiny"], four_bit: Literal["all", "one"] | None = None,
    ) -> None:  # fmt: skip
        self.four_bit = four_bit
        self.out, self.rounds, self.processes, self.setting = out, rounds, processes, setting
        self.console = Console(width=None if sys.stdout.isatty() else 120)
        self.keys = out / "keys" if secure else None
        self.sites = [self._site(index) for index in range(sites)]
        self.users: dict[str, Users] = {}
        self.training = {site.name: False for site in self.sites}
        self.started = time.monotonic()

    def run(self) -> int:
        """Run every step; return the exit status."""
        self.make_keys()
        bases = self.build_bases()
        data = self.write_data()
        for site in self.sites:
            self.start_site(site, bases[site.name], data[site.task])
        self.start_users(data)
        events = self.run_federation()
        alone = self.train_alone()
        self.stop_users()
        summary = self.summarize(bases, data, alone, events)
        return self.conclude(summary)

    def build_bases(self) -> dict[str, Path]:
        """Make the base model, or take the one that an earlier demo has made; return the directory of each site's."""
        self.say(self.setting.told)
        base = self.setting.make_base(self.show_steps)
        bases = {site.name: base for site in self.sites}
        if self.four_bit is not None:
            self.say(f"in 4 bits at {'every site' if self.four_bit == 'all' else self.sites[0].name}")
            packed = packed_base(base)
            if self.keys is not None:
                sign_origin(packed, signing.read_private(self.keys / "centre" / "signing.key"))
            bases |= {site.name: packed for site in (self.sites if self.four_bit == "all" else self.sites[:1])}
        return bases

    def write_data(self) -> dict[str, tuple[Path, Path]]:
        """Write the examples of each task that a site has; return (training file, held-out file) by task."""
        tasks = sorted({site.task for site in self.sites})
        return {task: self.setting.write_data(task, self.out / "data" / task) for task in tasks}

    def make_keys(self) -> None:
        """Write all parties' keys and certificates into one folder; in a real federation each has its own."""
        if self.keys is not None:
            self.say("keys and certificates for the centre and every site")
            names = [site.name for site in self.sites]
            make_certs.make(self.keys, "localhost", names, make_certs.DAYS, make_certs.PORT)

    def start_site(self, site: DemoSite, base: Path, data: tuple[Path, Path]) -> None:
        """Start one site and wait until its engine answers."""
        self.say(f"{site.name}: starting SGLang on port {site.port} ({site.task} data)")
        with self.console.status("about a minute: SGLang imports, loads the base, warms up"):
            site.start(base, data, self.processes)

    def start_users(self, data: dict[str, tuple[Path, Path]]) -> None:
        """Let users ask every site the held-out prompts of its task, until `stop_users`."""
        for seed, site in enumerate(self.sites):
            prompts = [prompt_of(json.loads(line)) for line in data[site.task][1].read_text().splitlines()]
            learns = lambda name=site.name: self.training[name]  # noqa: E731
            self.users[site.name] = Users(site.url, "support", prompts, learns, seed, self.setting.think_s)
            self.users[site.name].start()
        self.watch_training()
        self.say(f"users are being answered at {', '.join(self.users)}")

    def run_federation(self) -> list[dict[str, Any]]:
        """Start the SuperLink and the SuperNodes, then `flwr run`; return the events of the run."""
        flower = self.start_flower()
        return self.follow([self.start_run(flower, export(REPOSITORY, self.out / "app"))])

    def start_flower(self) -> Flower:
        """Start the SuperLink and the SuperNodes, and let some seconds pass with users only."""
        flower = Flower(self.processes, self.out / "flower", keys=self.keys)
        flower.start_superlink()
        if self.keys is not None:
            flower.start_superexec()
        for site in self.sites:
            if self.keys is not None:
                flower.register(site.name)
            flower.start_supernode(site.name, site.file)
        self._pause(QUIET_S)
        return flower

    def start_run(self, flower: Flower, app: Path, adapter: str = "support") -> "subprocess.Popen[bytes]":
        """Start `flwr run` for one adapter."""
        setting = self.setting
        settings = {
            "registry": self.out / "registry", "adapter": adapter, "rounds": self.rounds, "quorum": len(self.sites),
            "rank": setting.rank, "steps": setting.steps, "batch-size": setting.batch,
            "learning-rate": setting.learning_rate, "round-seconds": setting.round_seconds,
            "mixed-bases": self.four_bit == "one",
        }  # fmt: skip
        return flower.run(app, settings, name=f"flwr-{adapter}")

    def follow(self, runs: "list[subprocess.Popen[bytes]]") -> list[dict[str, Any]]:
        """Print the events of runs of the registry until all are over; return all events."""
        shown: list[dict[str, Any]] = []
        events = EventReader(self.out / "registry" / EVENTS)
        with self.console.status("federation") as line:
            while True:
                ended = all(run.poll() is not None for run in runs)
                for event in events.read():
                    shown.append(event)
                    if event["event"] in SHOWN:
                        self.say(self.told_of(event))
                if ended or sum(event["event"] == "run.finished" for event in shown) == len(runs):
                    break
                self.processes.require_alive()
                line.update(self._progress())
                time.sleep(1.0)
        return shown

    def told_of(self, event: dict[str, Any]) -> str:
        """Return the line for an event."""
        return describe(event)

    def train_alone(self) -> dict[str, Path]:
        """Train every site alone, from the same start for as many steps; return the weights' file by site."""
        parent = (self.out / "registry" / "support" / "v000000" / "adapter_model.safetensors").read_bytes()
        self.say("for comparison: each site trains alone, as many steps as in all rounds")
        for site in self.sites:
            site.train_alone(parent, self.setting.steps * self.rounds)
        alone: dict[str, Path] = {}
        with self.console.status("training alone") as line:
            while len(alone) < len(self.sites):
                self.processes.require_alive()
                line.update(self._progress())
                for site in self.sites:
                    weights = None if site.name in alone else site.trained_alone()
                    if weights is not None:
                        alone[site.name] = weights
                time.sleep(1.0)
        return {site.name: alone[site.name] for site in self.sites}

    def summarize(
        self, bases: dict[str, Path], data: dict[str, tuple[Path, Path]], alone: dict[str, Path],
        events: list[dict[str, Any]],
    ) -> dict[str, Any]:  # fmt: skip
        """Measure the base, each site alone and every version on every task; return the content of `summary.json`.

        Each task is measured on the base of the first site that has it.
        """
        answers = self.ask_before_and_after(data)
        of_task = {site.task: bases[site.name] for site in reversed(self.sites)}
        subjects: dict[str, Path | None] = {f"{site} alone": weights for site, weights in alone.items()}
        quality = self.examine(of_task, data, subjects | self.versions("support"))
        live = {site.name: site.status()["aliases"]["support"]["live"] for site in self.sites}
        return {
            "sites": {site.name: {"task": site.task, "live": live[site.name]} for site in self.sites},
            "tasks": sorted(data),
            "quality": quality,
            "told": ALONE_KNOWS_LESS,
            "probes": [probe_row(event) for event in events if event["event"] == "site.judged"],
            "rounds": [round_row(event) for event in events if event["event"] in ENDS],
            "users": {site: users.summary() for site, users in self.users.items()},
            "answers": answers,
            "minutes": round((time.monotonic() - self.started) / 60, 1),
        }

    def versions(self, adapter: str) -> dict[str, Path]:
        """Return the weights' file of every version of an adapter that was trained."""
        found = sorted((self.out / "registry" / adapter).glob("v*[1-9]*"))
        return {f"{adapter}@v{int(version.name[1:])}": version / "adapter_model.safetensors" for version in found}

    def examine(
        self, bases: dict[str, Path], data: dict[str, tuple[Path, Path]], subjects: Mapping[str, Path | None]
    ) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
        """Measure the base and every subject (name → weights' file) on every task, each on the task's own base."""
        self.say("examining every adapter on every task")
        dtype = SiteConfig.load(self.sites[0].file).engine.dtype
        examiners = {base: Examiner(base, self.setting.rank, self.setting.seq_len, dtype) for base in {*bases.values()}}
        tasks = {
            task: (examiners[bases[task]], examiners[bases[task]].task(*files, self.out / "examined" / task))
            for task, files in data.items()
        }
        return {
            name: {task: examiner.examine(weights, tokens) for task, (examiner, tokens) in tasks.items()}
            for name, weights in {"base": None, **subjects}.items()
        }

    def ask_before_and_after(self, data: dict[str, tuple[Path, Path]]) -> dict[str, list[dict[str, str]]]:
        """Ask each site's base and adapter some held-out questions of its task; return the rows by site."""
        if not self.setting.asked:
            return {}
        self.say("asking the base and the adapter the same questions")
        return {
            site.name: side_by_side(
                self.users[site.name], self.setting.served_name, questions(data[site.task][1], self.setting.asked)
            )
            for site in self.sites
        }

    def conclude(self, summary: dict[str, Any]) -> int:
        """Print the tables, write `summary.json`, and return 1 if the demo has not kept one of its promises."""
        broken = self.promises(summary)
        summary["broken_promises"] = broken
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2))
        show(summary, self.console)
        self.say(f"all of this is in {self.out / 'summary.json'}; it took {summary['minutes']} minutes")
        for line in broken:
            self.console.print(f"[red]not as promised:[/red] {line}")
        return 1 if broken else 0

    def promises(self, summary: dict[str, Any]) -> list[str]:
        """Return a line for each promise that was not kept."""
        return broken_promises(summary, self.rounds)

    def stop_users(self) -> None:
        """Let every open conversation end, and begin no other one."""
        for users in self.users.values():
            users.stop()

    def say(self, text: str) -> None:
        """Print a line with the seconds since the start."""
        self.console.print(f"[dim]{time.monotonic() - self.started:6.1f} s[/dim]  {text}", highlight=False)

    def show_steps(self, step: int, steps: int, loss: float) -> None:
        """Print every fifth part of the base model's training."""
        if step % max(1, steps // 5) == 0 or step == steps:
            self.say(f"  step {step} of {steps}, loss {loss:.2f}")

    def _site(self, index: int) -> DemoSite:
        task, number = TASKS[index % len(TASKS)], index // len(TASKS)
        name = f"{task}-{'abcd'[number]}"
        return DemoSite(name, task, self.out / name, self.keys, self.setting)

    def watch_training(self) -> None:
        """Begin to note which sites train, in a thread."""

        def watch() -> None:
            while True:
                for site in self.sites:
                    self.training[site.name] = bool(site.training())
                time.sleep(1.0)

        threading.Thread(target=watch, daemon=True).start()

    def _progress(self) -> str:
        parts = []
        for site in self.sites:
            users, job = [self.users[who] for who in self.users if who.startswith(site.name)], site.training()
            steps = f"step {job.get('steps', 0)}" if job else "serving"
            answers, failures = (sum(len(getattr(one, what)) for one in users) for what in ("answers", "failures"))
            parts.append(f"{site.name}: {steps}, {answers} answers, {failures} failed")
        return "   ".join(parts)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self.console.status(f"{seconds:.0f} quiet seconds: users only, nothing learns yet"):
            while time.monotonic() < until:
                self.processes.require_alive()
                time.sleep(0.5)


def prompt_of(example: dict[str, Any]) -> str:
    """Return the user's words of a training example, in either of the two formats that the tasks use."""
    return str(example["prompt"] if "prompt" in example else example["messages"][0]["content"])
