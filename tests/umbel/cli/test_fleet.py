"""`umbel fleet …` up to the run that it starts, which tests/e2e/test_fleet.py starts for real."""

import importlib.util
import json
from pathlib import Path

import pytest

from scripts.tools.repository import REPOSITORY
from tests.toys.command_line import refusal, umbel

if not importlib.util.find_spec("flwr"):
    pytest.skip("the registry is in Flower's environment", allow_module_level=True)

from server.bundle import export
from server.registry import run_lock
from server.registry.registry import AdapterRegistry
from tests.toys.registry import PIN, begun, grow, publish
from umbel.adapter import AdapterRef
from umbel.cli import fleet as cli_fleet


@pytest.fixture
def root(tmp_path: Path) -> Path:
    registry = begun(tmp_path / "r")
    grow(registry, "aa")
    registry.close()
    return tmp_path / "r"


@pytest.fixture
def app(tmp_path: Path) -> Path:
    return export(REPOSITORY, tmp_path / "app")


def live(root: Path) -> AdapterRef:
    return AdapterRegistry(root).resolve("support@live")


def said(root: Path, *arguments: str) -> list[str]:
    """Return the lines of `umbel fleet ls`."""
    ended = umbel("fleet", "ls", "--registry", root, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def test_every_adapter_is_listed_with_its_own_round_and_run(root: Path) -> None:
    registry = AdapterRegistry(root)
    registry.begin("billing", PIN, seed=1)
    registry.begin("triage", PIN, seed=1)
    grow(registry, "r")
    at = registry.rounds.all("support")[-1].at
    with run_lock.exclusive(root, "billing", 0):
        lines = said(root)
        assert lines == [
            "billing: no version is live, training goes on from billing@v0, a run is under way",
            "support: support@v2 is live",
            f"  round 3 rejected at {at}  a 0.25 b 0.75",
            "triage: no version is live, training goes on from triage@v0",
        ]
        assert [row["under_way"] for row in json.loads("".join(said(root, "--json")))] == [True, False, False]
    assert said(root, "--adapter", "support") == [*lines[1:3], "  a: worse"]
    assert json.loads("".join(said(root, "--json", "--adapter", "triage"))) == [{
        "adapter": "triage", "damage": None, "live": None, "head": "triage@v0", "shadow": None, "under_way": False,
        "round": None, "state": None, "at": None, "sites": {}, "reasons": {},
    }]  # fmt: skip
    publish(registry, 4)
    assert said(root)[1] == "support: support@v2 is live, support@v4 is being judged"
    assert "'suport' is not in" in refusal("fleet", "ls", "--registry", root, "--adapter", "suport")


def test_the_damage_of_one_adapter_hides_no_other_one(root: Path) -> None:
    registry = AdapterRegistry(root)
    registry.begin("billing", PIN, seed=1)
    (root / "billing" / "aliases.jsonl").write_text("no move\n")
    ended = umbel("fleet", "ls", "--registry", root)
    first, second, _ = ended.stdout.splitlines()
    assert first.startswith(f"billing: {root}/billing/aliases.jsonl")
    assert (second, ended.returncode) == ("support: support@v2 is live", 1)
    as_json = umbel("fleet", "ls", "--registry", root, "--json")
    assert [bool(row["damage"]) for row in json.loads(as_json.stdout)] == [True, False]
    assert refusal("fleet", "ls", "--registry", root, "--adapter", "billing") == first.removeprefix("billing: ")


@pytest.mark.parametrize("why", [[], ["--why", " "]])
def test_a_roll_back_needs_a_reason(root: Path, app: Path, why: list[str]) -> None:
    assert "say why" in refusal("fleet", "rollback", "support", "--registry", root, "--app", app, *why)
    assert live(root) == AdapterRef("support", 2)


def test_nothing_moves_where_there_is_no_app_to_run(root: Path, tmp_path: Path) -> None:
    said = refusal("fleet", "rollback", "support", "--registry", root, "--app", tmp_path / "none", "--why", "x")
    assert said == f"{tmp_path / 'none'}: no app here; `umbel bundle {tmp_path / 'none'}` makes one"
    assert live(root) == AdapterRef("support", 2)


def test_a_run_under_way_is_left_to_do_it(root: Path, app: Path) -> None:
    command = ["fleet", "rollback", "support", "--registry", root, "--app", app, "--why", "worse answers"]
    with run_lock.exclusive(root, "support", 0):
        ended = umbel(*command)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [
        "support: support@v1 is live again at the centre",
        "support: a run is under way; it brings the sites there before its next round",
    ]
    assert live(root) == AdapterRef("support", 1)


def test_nothing_moves_where_no_run_can_be_submitted(
    root: Path, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    command = ["fleet", "rollback", "support", "--registry", root, "--app", app, "--why", "x"]
    said = refusal(*command, "--federation", "nowhere")
    assert said.startswith("nothing was moved: `flwr list nowhere --limit 1` says: ")
    assert "nowhere" in said.removeprefix("nothing was moved: `flwr list nowhere")
    assert live(root) == AdapterRef("support", 2), "trying again rolls back once"


def test_a_run_that_fails_is_said_and_how_to_try_again(
    root: Path, app: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    ended = umbel("fleet", "reconcile", "support", "--registry", root, "--app", app, "--federation", "nowhere")
    assert ended.returncode == 1
    assert "the run did not come to its end" in ended.stderr
    assert "support@v2 is live, and `umbel fleet reconcile support …` brings the sites there" in ended.stderr


def test_what_was_never_live_is_not_brought_anywhere(tmp_path: Path, app: Path) -> None:
    begun(tmp_path / "r")
    said = refusal("fleet", "reconcile", "support", "--registry", tmp_path / "r", "--app", app)
    assert "nothing was ever live" in said


def test_the_run_is_one_without_rounds_on_this_registry(root: Path, app: Path) -> None:
    command = cli_fleet._command(app, "centre", root, "support", 'signing-key="/k"')
    assert command[1:5] == ["run", str(app), "centre", "--stream"]
    assert command[6] == f'rounds=0 registry={json.dumps(str(root))} adapter="support" signing-key="/k"'
    assert "centre" not in cli_fleet._command(app, "", root, "support", "")


def test_every_site_is_told_of() -> None:
    found = {
        "live": "support@v1", "already": ["c"], "brought": {"b": "support@v2", "a": "base"},
        "kept": {"d": "it has rejected support@v1"}, "missed": {"e": "no answer by the deadline"},
    }  # fmt: skip
    assert cli_fleet._lines(found) == [
        "a: support@v1 answers, instead of base",
        "b: support@v1 answers, instead of support@v2",
        "c: support@v1 answered already",
        "d: keeps what it has: it has rejected support@v1",
        "e: not brought there, tried again with the next run: no answer by the deadline",
    ]
    nobody = {"live": "support@v1", "already": [], "brought": {}, "kept": {}, "missed": {}}
    assert cli_fleet._lines(nobody) == ["no site is online; each follows with the next run"]
