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

from demo_events import ENDS, SHOWN, broken_promises, describe, probe_row, read_events, round_row

if TYPE_CHECKING:
    from demo_users import Users

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".cache"
TASKS = ("clinic", "shop")
RANK, STEPS, BATCH, LEARNING_RATE, SEQ_LEN = 8, 80, 8, 4e-3, 48
SHARE_CAP = 0.6
"""Calm on two cores: two engines, their users and all of Flower share them."""
QUIET_S = 20.0
"""Users before the first round, so that there is something to compare with."""
MARKER = ".umbel-demo"


def main() -> int:
    """Parse, run, and clean up whatever happens."""
    options = parse()
    sys.path[:0] = [str(REPOSITORY)]  # the repository, not an installed copy
    from processes import ProcessError, Processes

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
        self.tasks = {site_name(index): TASKS[index % len(TASKS)] for index in range(sites)}
        self.keys = out / "keys" if secure else None
        self.ports: dict[str, int] = {}
        self.users: dict[str, Users] = {}
        self.training = dict.fromkeys(self.tasks, False)
        self.started = time.monotonic()

    def run(self) -> int:
        """The whole story; the exit status."""
        base = self.build_base()
        data = self.write_data()
        self.make_keys()
        for site in self.tasks:
            self.start_site(site, base, data[self.tasks[site]])
        self.start_users(data)
        events = self.run_federation()
        alone = self.train_alone()
        self.stop_users()
        summary = self.summarize(base, data, alone, events)
        return self.conclude(summary)

    def build_base(self) -> Path:
        import tiny_base

        self.say("base model: tiny, real, trained here once (cached)")
        return tiny_base.build(CACHE / "tiny-base", progress=self.show_steps)

    def write_data(self) -> dict[str, tuple[Path, Path]]:
        import demo_data

        return {task: demo_data.write(task, self.out / "data" / task) for task in sorted(set(self.tasks.values()))}

    def make_keys(self) -> None:
        """Everyone's keys and certificates in one folder; in a real federation each party has its own part only."""
        import make_certs

        if self.keys is not None:
            self.say("keys and certificates for the centre and every site")
            make_certs.make(self.keys, "localhost", [*self.tasks], make_certs.DAYS, make_certs.PORT)

    def start_site(self, site: str, base: Path, data: tuple[Path, Path]) -> None:
        """`umbel serve`, one after the other, until its engine answers."""
        from processes import ENGINE_BIN, free_port

        self.ports[site] = free_port()
        folder = self.out / site
        folder.mkdir()
        (folder / "site.toml").write_text(site_file(site, base, data, self.ports[site], self.keys))
        self.say(f"{site}: starting SGLang on port {self.ports[site]} ({self.tasks[site]} data)")
        self.processes.start(f"serve-{site}", [str(ENGINE_BIN / "umbel"), "serve", str(folder / "site.toml")])
        with self.console.status("about a minute: SGLang imports, loads the base, warms up"):
            self.processes.wait_for(
                lambda: bool(self.status(site).get("engine", {}).get("ready")), f"{site}'s start", 400
            )

    def start_users(self, data: dict[str, tuple[Path, Path]]) -> None:
        from demo_users import Users

        for seed, site in enumerate(self.tasks):
            prompts = [prompt_of(json.loads(line)) for line in data[self.tasks[site]][1].read_text().splitlines()]
            url = f"http://127.0.0.1:{self.ports[site]}"
            self.users[site] = Users(url, "support", prompts, lambda site=site: self.training[site], seed)
            self.users[site].start()
        threading.Thread(target=self._watch_training, daemon=True).start()
        self.say(f"users are being answered at {', '.join(self.tasks)}")

    def run_federation(self) -> list[dict[str, Any]]:
        """SuperLink, SuperNodes, `flwr run`; the events of the run."""
        from processes import Flower

        from server.bundle import export

        flower = Flower(self.processes, self.out / "flower", keys=self.keys)
        flower.start_superlink()
        if self.keys is not None:
            flower.start_superexec()
        for site in self.tasks:
            if self.keys is not None:
                flower.register(site)
            flower.start_supernode(site, self.out / site / "site.toml")
        self._pause(QUIET_S)
        registry = self.out / "registry"
        settings = {
            "registry": registry, "rounds": self.rounds, "quorum": len(self.tasks), "rank": RANK, "steps": STEPS,
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
        for site in self.tasks:
            self._submit_alone(site, parent)
        alone: dict[str, Path] = {}
        with self.console.status("training alone") as line:
            while len(alone) < len(self.tasks):
                self.processes.require_alive()
                line.update(self._progress())
                for site in self.tasks.keys() - alone.keys():
                    with self.control(site) as control:
                        report = control.get("/adapters/support/rounds/alone").json()
                        if report["state"] == "done":
                            alone[site] = self.out / site / "alone.safetensors"
                            alone[site].write_bytes(control.get("/adapters/support/rounds/alone/update").content)
                        elif report["state"] in ("failed", "cancelled"):
                            from processes import ProcessError

                            raise ProcessError(f"{site} could not train alone: {report['error']}")
                time.sleep(1.0)
        return {site: alone[site] for site in self.tasks}

    def summarize(
        self, base: Path, data: dict[str, tuple[Path, Path]], alone: dict[str, Path], events: list[dict[str, Any]]
    ) -> dict[str, Any]:
        from demo_report import Examiner

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
        live = {site: self.status(site)["aliases"]["support"]["live"] for site in self.tasks}
        return {
            "sites": {site: {"task": task, "live": live[site]} for site, task in self.tasks.items()},
            "tasks": sorted(tasks),
            "quality": quality,
            "probes": [probe_row(event) for event in events if event["event"] == "site.judged"],
            "rounds": [round_row(event) for event in events if event["event"] in ENDS],
            "users": {site: users.summary() for site, users in self.users.items()},
            "minutes": round((time.monotonic() - self.started) / 60, 1),
        }

    def conclude(self, summary: dict[str, Any]) -> int:
        """Print, write `summary.json`, and hold the demo to its promises."""
        from demo_report import show

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

    def socket(self, site: str) -> Path:
        return self.out / site / "state" / "site.sock"

    def control(self, site: str) -> Any:
        import httpx

        transport = httpx.HTTPTransport(uds=str(self.socket(site)))
        return httpx.Client(transport=transport, base_url="http://site", timeout=60)

    def status(self, site: str) -> dict[str, Any]:
        """The site's status, or nothing while it does not answer."""
        import httpx

        try:
            with self.control(site) as control:
                answer: dict[str, Any] = control.get("/status").json()
                return answer
        except httpx.TransportError:
            return {}

    def say(self, text: str) -> None:
        self.console.print(f"[dim]{time.monotonic() - self.started:6.1f} s[/dim]  {text}", highlight=False)

    def show_steps(self, step: int, steps: int, loss: float) -> None:
        if step % max(1, steps // 5) == 0 or step == steps:
            self.say(f"  step {step} of {steps}, loss {loss:.2f}")

    def _submit_alone(self, site: str, parent: bytes) -> None:
        import base64

        from umbel import signing
        from umbel.base import BaseFingerprint
        from umbel.messages import Hello, RoundOrder, Submit, TrainPlan
        from umbel.peft_dir import digest

        with self.control(site) as control:
            fingerprint: BaseFingerprint = Hello.model_validate(control.get("/hello").json()).fingerprint
            plan = TrainPlan(
                rank=RANK, steps=STEPS * self.rounds, seconds=600, batch_size=BATCH, learning_rate=LEARNING_RATE
            )
            order = RoundOrder(key="alone", base=fingerprint.digest, parent=digest(parent), round=0, plan=plan)
            header = base64.b64encode(order.model_dump_json().encode()).decode()
            headers = {"x-umbel-order": header}
            if self.keys is not None:  # a site trains nothing but what the centre signed
                centre = signing.read_private(self.keys / "centre" / "signing.key")
                headers["x-umbel-signature"] = signing.sign(centre, Submit(adapter="support", order=order))
            reply = control.post("/adapters/support/rounds/alone", content=parent, headers=headers)
            reply.raise_for_status()

    def _watch_training(self) -> None:
        while True:
            for site in self.tasks:
                training = self.status(site).get("training") or {}
                self.training[site] = training.get("state") == "running"
            time.sleep(1.0)

    def _progress(self) -> str:
        parts = []
        for site, users in self.users.items():
            job = self.status(site).get("training") or {}
            steps = f"step {job.get('steps', 0)}" if job.get("state") == "running" else "serving"
            parts.append(f"{site}: {steps}, {len(users.answers)} answers, {len(users.failures)} failed")
        return "   ".join(parts)

    def _pause(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        with self.console.status(f"{seconds:.0f} quiet seconds: users only, nothing learns yet"):
            while time.monotonic() < until:
                self.processes.require_alive()
                time.sleep(0.5)


def site_name(index: int) -> str:
    task, number = TASKS[index % len(TASKS)], index // len(TASKS)
    return f"{task}-{'abcd'[number]}"


def site_file(site: str, base: Path, data: tuple[Path, Path], port: int, keys: Path | None) -> str:
    signed = ""
    if keys is not None:
        own = keys / f"site-{site}"
        signed = f'trusted_key = "{own / "centre-signing.pub"}"\nsigning_key = "{own / "updates.key"}"\n'
    return f"""# Made by scripts/demo; docs/configuration.md explains every line.
[site]
name = "{site}"
state_dir = "state"
{signed}
[model]
path = "{base}"
served_name = "tiny"

[[adapter]]
name = "support"

[engine]
port = {port}
dtype = "float32"
max_lora_rank = {RANK}

[engine.extra_args]      # two engines share one small machine
max_total_tokens = 20000
max_running_requests = 16

[engine.env]
OMP_NUM_THREADS = "1"

[training]
data = "{data[0]}"
eval_data = "{data[1]}"
seq_len = {SEQ_LEN}
micro_batch = {BATCH}
share_cap = {SHARE_CAP}
"""


def prompt_of(example: dict[str, Any]) -> str:
    return str(example["prompt"] if "prompt" in example else example["messages"][0]["content"])


if __name__ == "__main__":
    sys.exit(main())
