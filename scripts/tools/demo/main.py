"""The demo: a federation of sites that serve users while they learn, on one machine, every part real.

    scripts/demo [--sites 2] [--rounds 3] [--out DIR] [--insecure]

With TLS, SuperNodes that are known by their keys, and orders, versions and updates that are signed, or all of it bare.
Exit status 0 only if no user's request failed, every round was promoted or rejected for a stated reason, and the
federated adapter beats the base on both tasks.
"""

import argparse
import json
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.tools.demo.events import ENDS, SHOWN, broken_promises, describe, probe_row, read_events, round_row
from scripts.tools.repository import REPOSITORY

if TYPE_CHECKING:
    from scripts.tools.demo.site import DemoSite
    from scripts.tools.demo.users import Users

CACHE = REPOSITORY / ".cache"
TASKS = ("clinic", "shop")
STEPS, LEARNING_RATE = 80, 4e-3
QUIET_S = 20.0
"""Users before the first round, so that there is something to compare with."""
MARKER = ".umbel-demo"


def main() -> int:
    """Parse, run, and clean up whatever happens."""
    options = parse()
    from scripts.tools.processes import ProcessError, Processes

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)  # also where a shell had SIGINT ignored
    out = fresh_folder(options.out)
    processes = Processes(out / "logs")
    demo = None
    try:
        demo = Demo(out, options.sites, options.rounds, processes, secure=options.secure)
        return demo.run()
    except ProcessError as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ndemo: stopping", file=sys.stderr)
        return 130
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)  # an impatient second Ctrl-C must not stop the cleaning up
        if demo is not None:
            demo.stop_users()
        processes.stop()


def interrupt(number: int, frame: object) -> None:
    """Every way of being told to stop is Ctrl-C."""
    raise KeyboardInterrupt


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/demo", description=__doc__.splitlines()[0])
    parser.add_argument("--sites", type=int, default=2, help="SGLang servers, about 4 GB each (default 2)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of the federation (default 3)")
    parser.add_argument("--out", type=Path, default=REPOSITORY / "demo-out", help="where logs and results go")
    parser.add_argument("--secure", action="store_true", default=True, help="with make_certs' keys (default)")
    parser.add_argument("--insecure", dest="secure", action="store_false", help="no TLS, no keys, no signatures")
    options = parser.parse_args()
    if not 2 <= options.sites <= 8 or options.rounds < 1:
        parser.error("--sites must be 2 to 8, and --rounds at least 1")
    return options


def fresh_folder(out: Path) -> Path:
    """An empty folder; an earlier demo's is emptied, anybody else's is left alone."""
    out = out.resolve()
    if len(str(out)) > 60:
        sys.exit(f"demo: {out} is too long a path for the Unix sockets below it; choose a shorter --out")
    if out.exists() and not out.is_dir():
        sys.exit(f"demo: {out} is a file; choose another --out")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        sys.exit(f"demo: {out} is not empty and not a demo's; choose another --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "logs").mkdir(parents=True)
    (out / MARKER).touch()
    return out


class Demo:
    """One run, step by step; each public step says what it does."""

    def __init__(self, out: Path, sites: int, rounds: int, processes: Any, *, secure: bool) -> None:
        from rich.console import Console

        self.out, self.rounds, self.processes = out, rounds, processes
        self.console = Console(width=None if sys.stdout.isatty() else 120)
        self.keys = out / "keys" if secure else None
        self.sites = [self._site(index) for index in range(sites)]
        self.users: dict[str, Users] = {}
        self.training = {site.name: False for site in self.sites}
        self.started = time.monotonic()

    def run(self) -> int:
        """The whole story; the exit status."""
        base = self.build_base()
        data = self.write_data()
        self.make_keys()
        for site in self.sites:
            self.start_site(site, base, data[site.task])
        self.start_users(data)
        events = self.run_federation()
        alone = self.train_alone()
        self.stop_users()
        summary = self.summarize(base, data, alone, events)
        return self.conclude(summary)

    def build_base(self) -> Path:
        from scripts.tools import tiny_base

        self.say("base model: tiny, real, trained here once (cached)")
        return tiny_base.build(CACHE / "tiny-base", progress=self.show_steps)

    def write_data(self) -> dict[str, tuple[Path, Path]]:
        from scripts.tools.demo import data as demo_data

        return {
            task: demo_data.write(task, self.out / "data" / task) for task in sorted({site.task for site in self.sites})
        }

    def make_keys(self) -> None:
        """Everyone's keys and certificates in one folder; in a real federation each party has its own part only."""
        from scripts.tools.certs import make as make_certs

        if self.keys is not None:
            self.say("keys and certificates for the centre and every site")
            names = [site.name for site in self.sites]
            make_certs.make(self.keys, "localhost", names, make_certs.DAYS, make_certs.PORT)

    def start_site(self, site: "DemoSite", base: Path, data: tuple[Path, Path]) -> None:
        self.say(f"{site.name}: starting SGLang on port {site.port} ({site.task} data)")
        with self.console.status("about a minute: SGLang imports, loads the base, warms up"):
            site.start(base, data, self.processes)

    def start_users(self, data: dict[str, tuple[Path, Path]]) -> None:
        from scripts.tools.demo.users import Users

        for seed, site in enumerate(self.sites):
            prompts = [prompt_of(json.loads(line)) for line in data[site.task][1].read_text().splitlines()]
            learns = lambda name=site.name: self.training[name]  # noqa: E731
            self.users[site.name] = Users(site.url, "support", prompts, learns, seed)
            self.users[site.name].start()
        threading.Thread(target=self._watch_training, daemon=True).start()
        self.say(f"users are being answered at {', '.join(self.users)}")

    def run_federation(self) -> list[dict[str, Any]]:
        """SuperLink, SuperNodes, `flwr run`; the events of the run."""
        from scripts.tools.demo.site import BATCH, RANK
        from scripts.tools.processes import Flower
        from server.bundle import export

        flower = Flower(self.processes, self.out / "flower", keys=self.keys)
        flower.start_superlink()
        if self.keys is not None:
            flower.start_superexec()
        for site in self.sites:
            if self.keys is not None:
                flower.register(site.name)
            flower.start_supernode(site.name, site.file)
        self._pause(QUIET_S)
        registry = self.out / "registry"
        settings = {
            "registry": registry, "rounds": self.rounds, "quorum": len(self.sites), "rank": RANK, "steps": STEPS,
            "batch-size": BATCH, "learning-rate": LEARNING_RATE,
        }  # fmt: skip
        run = flower.run(export(REPOSITORY, self.out / "app"), settings)
        shown: list[dict[str, Any]] = []
        with self.console.status("federation") as line:
            while True:
                ended = run.poll() is not None
                for event in read_events(registry / "events.jsonl")[len(shown) :]:
                    shown.append(event)
                    if event["event"] in SHOWN:
                        self.say(describe(event))
                if ended or (shown and shown[-1]["event"] == "run.finished"):
                    break
                self.processes.require_alive()
                line.update(self._progress())
                time.sleep(1.0)
        return shown

    def train_alone(self) -> dict[str, Path]:
        """What each site would have had without the others: the same steps on its own data, from the same start."""
        parent = (self.out / "registry" / "support" / "v000000" / "adapter_model.safetensors").read_bytes()
        self.say("for comparison: each site trains alone, as many steps as in all rounds")
        for site in self.sites:
            site.train_alone(parent, STEPS * self.rounds, LEARNING_RATE)
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
        self, base: Path, data: dict[str, tuple[Path, Path]], alone: dict[str, Path], events: list[dict[str, Any]]
    ) -> dict[str, Any]:
        from scripts.tools.demo.report import Examiner
        from scripts.tools.demo.site import RANK, SEQ_LEN

        self.say("examining every adapter on every task")
        examiner = Examiner(base, RANK, SEQ_LEN)
        tasks = {task: examiner.task(*files, self.out / "examined" / task) for task, files in data.items()}
        versions = sorted((self.out / "registry" / "support").glob("v*[1-9]*"))
        subjects: dict[str, Path | None] = {"base": None}
        subjects |= {f"{site} alone": weights for site, weights in alone.items()}
        subjects |= {f"support@v{int(v.name[1:])}": v / "adapter_model.safetensors" for v in versions}
        quality = {
            name: {task: examiner.examine(weights, tokens) for task, tokens in tasks.items()}
            for name, weights in subjects.items()
        }
        live = {site.name: site.status()["aliases"]["support"]["live"] for site in self.sites}
        return {
            "sites": {site.name: {"task": site.task, "live": live[site.name]} for site in self.sites},
            "tasks": sorted(tasks),
            "quality": quality,
            "probes": [probe_row(event) for event in events if event["event"] == "site.judged"],
            "rounds": [round_row(event) for event in events if event["event"] in ENDS],
            "users": {site: users.summary() for site, users in self.users.items()},
            "minutes": round((time.monotonic() - self.started) / 60, 1),
        }

    def conclude(self, summary: dict[str, Any]) -> int:
        """Print, write `summary.json`, and hold the demo to its promises."""
        from scripts.tools.demo.report import show

        broken = broken_promises(summary, self.rounds)
        summary["broken_promises"] = broken
        (self.out / "summary.json").write_text(json.dumps(summary, indent=2))
        show(summary, self.console)
        self.say(f"all of this is in {self.out / 'summary.json'}; it took {summary['minutes']} minutes")
        for line in broken:
            self.console.print(f"[red]not as promised:[/red] {line}")
        return 1 if broken else 0

    def stop_users(self) -> None:
        for users in self.users.values():
            users.stop()

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self.started:6.1f} s[/dim]  {text}", highlight=False)

    def show_steps(self, step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 5) == 0 or step == steps:
            self.say(f"  step {step} of {steps}, loss {loss:.2f}")

    def _site(self, index: int) -> "DemoSite":
        from scripts.tools.demo.site import DemoSite

        task, number = TASKS[index % len(TASKS)], index // len(TASKS)
        name = f"{task}-{'abcd'[number]}"
        return DemoSite(name, task, self.out / name, self.keys)

    def _watch_training(self) -> None:
        while True:
            for site in self.sites:
                self.training[site.name] = bool(site.training())
            time.sleep(1.0)

    def _progress(self) -> str:
        parts = []
        for site in self.sites:
            users, job = self.users[site.name], site.training()
            steps = f"step {job.get('steps', 0)}" if job else "serving"
            parts.append(f"{site.name}: {steps}, {len(users.answers)} answers, {len(users.failures)} failed")
        return "   ".join(parts)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self.console.status(f"{seconds:.0f} quiet seconds: users only, nothing learns yet"):
            while time.monotonic() < until:
                self.processes.require_alive()
                time.sleep(0.5)


def prompt_of(example: dict[str, Any]) -> str:
    return str(example["prompt"] if "prompt" in example else example["messages"][0]["content"])


if __name__ == "__main__":
    sys.exit(main())
