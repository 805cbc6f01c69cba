"""`umbel adapt` in a process of its own: its options, its daemon, and how it ends; the site is quick_site.py's."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from scripts.tools.processes import free_port
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import wait_until
from server.registry.events import EVENTS, EventReader
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.command_line import refusal
from tests.toys.sites.base_dir import write_base
from umbel.cli.daemon import ask
from umbel.faults import VARIABLE, Point
from umbel.site.config import SiteConfig
from umbel.site.daemon_lock import daemon_runs
from umbel.site.template import site_toml

SITES = REPOSITORY / "tests" / "toys" / "sites"
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
needs_a_site = pytest.mark.skipif(not importlib.util.find_spec("sglang"), reason="needs the engine's environment")


@pytest.fixture
def site_file(sockets: Path) -> Path:
    """A site file in a folder with a short path; every version of it is better than the one before."""
    write_base(sockets / "base")
    (sockets / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (sockets / "site.toml").write_text(site_toml({"engine": {"dtype": "float32", "drain_s": 1}}, port=free_port()))
    return sockets / "site.toml"


def trusting(site_file: Path) -> Path:
    """Have the site trust one key only; return the file of the private one."""
    key, private, public = Ed25519PrivateKey.generate(), site_file.with_name("key"), site_file.with_name("key.pub")
    private.touch(mode=0o600)
    private.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    site_file.write_text(site_toml({"site": {"trusted_key": "key.pub"}, "engine": {"dtype": "float32"}}))
    return private


class Adapting:
    """A running `umbel adapt`, and what it has printed."""

    def __init__(self, site_file: Path, *options: str, **environment: str) -> None:
        self.output = site_file.with_name(f"out-{len(list(site_file.parent.glob('out-*')))}")
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(SITES / "quick_adapt.py"), str(site_file), *options],
                stdout=out, stderr=out, cwd=REPOSITORY, env={**ENVIRONMENT, **environment},
            )  # fmt: skip

    @property
    def said(self) -> str:
        return self.output.read_text()

    def wait_for(self, words: str) -> None:
        wait_until(lambda: words in self.said or self._ended(words), f"{words!r} of {self.output}")

    def _ended(self, words: str) -> bool:
        assert self.process.poll() is None, f"it ended before it said {words!r}:\n{self.said}"
        return False

    def end(self, number: int = signal.SIGINT) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)


@contextmanager
def adapting(site_file: Path, *options: str, daemon_stays: bool = False, **environment: str) -> Iterator[Adapting]:
    """Run it; in the end nothing that it started may be left."""
    running = Adapting(site_file, *options, **environment)
    try:
        yield running
    finally:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()
        wait_until(lambda: daemon_stays or not daemon_runs(site_file.parent / "state"), "the end of what it started")


@contextmanager
def served(site_file: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a daemon that is not `umbel adapt`'s."""
    with site_file.with_name("serve.log").open("wb") as log:
        daemon = subprocess.Popen(
            [sys.executable, str(SITES / "quick_site.py"), str(site_file)],
            stdout=log, stderr=log, cwd=REPOSITORY, env=ENVIRONMENT,
        )  # fmt: skip

    def started() -> bool:
        assert daemon.poll() is None, site_file.with_name("serve.log").read_text()
        return (site_file.parent / "state" / "operator.sock").exists()

    try:
        wait_until(started, "the daemon's start")
        yield daemon
    finally:
        daemon.terminate()
        daemon.wait(60)


def rounds(root: Path) -> list[tuple[int, RoundState]]:
    with closing(AdapterRegistry(root)) as registry:
        return [(record.round, record.state) for record in registry.rounds.all("support")]


def live(site_file: Path) -> str | None:
    found: str | None = ask(SiteConfig.load(site_file), "GET", "/status")["aliases"]["support"]["live"]
    return found


# Options


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--set", "rang=4"], "run configuration: rang is not a setting; did you mean 'rank'?"),
        (["--set", "rank=many"], "run configuration: rank: Input should be a valid integer"),
        (["--set", "steps"], "--set steps: write KEY=VALUE, such as steps=80"),
        (["--set", "rank=64"], "--set rank=64: this site serves support up to rank 16; raise [engine].max_lora_rank"),
        (["--set", "quorum=2"], "quorum is for a federation, and means nothing to one site alone"),
        (["--set", 'waves="0.5,1"'], "waves is for a federation"),
        (["--set", "rounds=3"], "--set rounds=3: say it with --rounds"),
        (["--registry", "s3://bucket/umbel"], "s3:/bucket/umbel: a registry is a directory on this machine"),
        (["--adapter", "triage"], "'triage' is not trained here: this site trains support; name one of them"),
    ],
)
def test_a_mistake_is_said_before_anything_is_made(site_file: Path, options: list[str], told: str) -> None:
    assert told in refusal("adapt", site_file, *options)
    assert not (site_file.parent / "state").exists()


def test_the_file_is_checked_first(site_file: Path) -> None:
    (site_file.parent / "train.jsonl").unlink()
    assert "train.jsonl does not exist" in refusal("adapt", site_file)
    site_file.write_text(site_file.read_text().replace("port =", "prot ="))
    assert "engine.prot is not a setting; did you mean 'port'?" in refusal("adapt", site_file)
    assert not (site_file.parent / "state").exists()


def test_of_several_adapters_one_is_named(site_file: Path) -> None:
    site_file.write_text(site_toml({"adapter": [{"name": "support"}, {"name": "triage"}]}))
    said = refusal("adapt", site_file)
    assert said == "this site trains support, triage; say which one, with --adapter NAME"


def test_a_site_that_trusts_a_key_has_to_be_given_it(site_file: Path) -> None:
    trusting(site_file)
    assert "--set signing-key=FILE" in refusal("adapt", site_file)


def test_why_its_daemon_did_not_start_is_said(site_file: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        site_file.write_text(site_toml(port=port))
        ended = subprocess.run(
            [sys.executable, "-m", "umbel.cli", "adapt", str(site_file)], capture_output=True, text=True, check=False
        )
    lines = ended.stderr.splitlines()
    assert ended.returncode == 1
    assert (str(port) if importlib.util.find_spec("sglang") else ".venv-engine") in lines[0]
    assert lines[-1].startswith("umbel: so `umbel serve` ended with status 1; its log is ")
    assert "Traceback" not in ended.stderr


def test_a_damaged_registry_is_named_with_the_remedy(site_file: Path) -> None:
    root = site_file.parent / "registry"
    AdapterRegistry(root, create=True).close()
    (root / "registry.json").write_text("{")
    assert str(root / "registry.json") in refusal("adapt", site_file, "--registry", root)


# Rounds


@needs_a_site
def test_it_starts_the_site_runs_its_rounds_and_ends_what_it_started(site_file: Path) -> None:
    with adapting(site_file, "--rounds", "2") as running:
        assert running.process.wait(120) == 0, running.said
    assert "`umbel serve` starts and loads the base" in running.said
    assert running.said.index("round 1: v1 answers users") < running.said.index("round 2: v2 answers users")
    assert rounds(site_file.parent / "state" / "registry") == [(1, RoundState.PROMOTED), (2, RoundState.PROMOTED)]
    assert not daemon_runs(site_file.parent / "state")


@needs_a_site
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_and_its_daemon_and_the_next_one_goes_on(site_file: Path, number: int) -> None:
    with adapting(site_file) as running:
        running.wait_for("v1 answers users")
        children = pytest.importorskip("psutil").Process(running.process.pid).children(recursive=True)
        assert children
        assert running.end(number) == 0
        assert running.said.splitlines()[-1].endswith("stopped; the same command goes on from here")
        assert not [child for child in children if child.is_running()]
    done = len(rounds(site_file.parent / "state" / "registry"))
    with adapting(site_file, "--rounds", "1") as running:
        assert running.process.wait(120) == 0
    ends = rounds(site_file.parent / "state" / "registry")
    assert [state for _, state in ends] == [RoundState.PROMOTED] * len(ends)
    assert len(ends) in (done, done + 1), "a round under way was taken up"


@needs_a_site
def test_a_daemon_that_runs_already_is_used_and_left_alone(site_file: Path) -> None:
    with served(site_file) as daemon:
        with adapting(site_file, "--rounds", "1", daemon_stays=True) as running:
            assert running.process.wait(120) == 0, running.said
            assert "its daemon runs already, and goes on running afterwards" in running.said
        assert daemon.poll() is None
        assert live(site_file) == "support@v1"


@needs_a_site
def test_a_daemon_that_is_older_than_the_site_file_is_said_to_be(site_file: Path) -> None:
    with served(site_file):
        site_file.write_text(site_file.read_text().replace('"support"', '"triage"'))
        with adapting(site_file, daemon_stays=True) as running:
            assert running.process.wait(60) == 1
        assert "umbel: the daemon of clinic-a does not train 'triage', which its site file names" in running.said


@needs_a_site
def test_a_second_one_on_the_same_site_is_refused_by_name(site_file: Path) -> None:
    with adapting(site_file) as running:
        running.wait_for("v1 answers users")
        said = refusal("adapt", site_file)
        assert said.startswith(f"{site_file.parent / 'state' / 'registry'}: another run works on support; wait for it")
        assert "Ctrl-C where `umbel adapt` is the run" in said
        assert running.end() == 0


@needs_a_site
def test_killed_in_the_middle_its_daemon_ends_and_the_next_one_takes_the_round_up(site_file: Path) -> None:
    root = site_file.parent / "state" / "registry"
    with adapting(site_file, **{VARIABLE: f"{Point.VERDICT_RECORDED}:2"}) as running:
        assert running.process.wait(120) == -signal.SIGKILL
    assert rounds(root)[-1] == (2, RoundState.PROMOTING)
    with adapting(site_file, "--rounds", "1") as running:
        assert running.process.wait(120) == 0, running.said
    assert rounds(root) == [(number, RoundState.PROMOTED) for number in (1, 2, 3)]
    started = [event["round"] for event in EventReader(root / EVENTS).read() if event["event"] == "round.started"]
    assert started == [1, 2, 3]


@needs_a_site
def test_with_the_key_that_the_site_trusts_it_signs_what_it_orders(site_file: Path) -> None:
    key = trusting(site_file)
    with adapting(site_file, "--rounds", "1", "--set", f"signing-key={key}") as running:
        assert running.process.wait(120) == 0, running.said
    assert "v1 answers users" in running.said


@needs_a_site
def test_versions_that_are_worse_go_and_it_says_what_would_help(site_file: Path) -> None:
    state = site_file.parent / "state"
    state.mkdir(mode=0o700)
    (state / "against").write_text("\n".join(f"support-v{number}" for number in range(2, 6)))
    with adapting(site_file, "--rounds", "5") as running:
        assert running.process.wait(120) == 0, running.said
    assert [s for _, s in rounds(state / "registry")] == [RoundState.PROMOTED] + [RoundState.REJECTED] * 4
    assert running.said.count("no version was promoted in the last 3 rounds: they are worse") == 1
    assert "v5 is discarded; the next round trains from v1" in running.said


@needs_a_site
def test_what_the_registry_says_is_live_answers_at_the_start(site_file: Path) -> None:
    root = site_file.parent / "there"
    with served(site_file):
        with adapting(site_file, "--rounds", "2", "--registry", str(root), daemon_stays=True) as running:
            assert running.process.wait(120) == 0, running.said
        with closing(AdapterRegistry(root)) as registry:
            registry.roll_back("support", who="eva", why="worse")
        with adapting(site_file, "--rounds", "1", "--registry", str(root), daemon_stays=True) as running:
            assert running.process.wait(120) == 0, running.said
        assert "support@v1 answers users, as the registry says, instead of support@v2" in running.said
        assert live(site_file) == "support@v3"
    manifest = json.loads((root / "support" / "v000003" / "manifest.json").read_text())
    assert (manifest["strategy"], manifest["round"]) == ("alone", 3)
