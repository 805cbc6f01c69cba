"""`umbel registry …`, and the example calls that end the help of the centre's commands."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import typer

from tests.toys.command_line import refusal, umbel
from umbel.cli.adapter import adapter_app
from umbel.cli.fleet import fleet_app
from umbel.cli.registry import registry_app

if not importlib.util.find_spec("flwr"):
    pytest.skip("the registry is in Flower's environment", allow_module_level=True)

from tests.toys.registry import begun, grow


@pytest.mark.parametrize(("name", "app"), [("adapter", adapter_app), ("fleet", fleet_app), ("registry", registry_app)])
def test_every_command_ends_its_help_with_two_calls_that_exist(name: str, app: typer.Typer) -> None:
    known = {(name, str(command.name)) for command in app.registered_commands} | {("fleet", "rollback")}
    for epilog in [app.info.epilog, *(command.epilog for command in app.registered_commands)]:
        calls = re.findall(r"^umbel (\w+) (\w+)", epilog or "", re.MULTILINE)
        assert len(calls) >= 2
        assert set(calls) <= known


def test_init_makes_an_empty_registry_once_and_keeps_the_place_of_its_weights(tmp_path: Path) -> None:
    root, blobs = tmp_path / "r", tmp_path / "weights"
    made = umbel("registry", "init", "--registry", root, "--blobs", str(blobs))
    assert made.returncode == 0, made.stderr
    lineage = json.loads((root / "registry.json").read_text())["lineage"]
    assert made.stdout == f"{root}: registry {lineage}, weights at {blobs}\n"
    assert umbel("registry", "init", "--registry", root).stdout == made.stdout
    said = refusal("registry", "init", "--registry", root, "--blobs", str(tmp_path / "elsewhere"))
    assert said == f"{root} keeps its weights at {blobs}, not at {tmp_path / 'elsewhere'}"


def said(command: str, root: Path, *arguments: str | Path) -> str:
    """Return the output of a command that succeeds."""
    ended = umbel("adapter", command, "--registry", root, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_a_registry_is_made_with_its_weights_elsewhere(tmp_path: Path) -> None:
    made = umbel("registry", "init", "--registry", tmp_path / "r", "--blobs", f"file://{tmp_path}/weights")
    assert made.returncode == 0, made.stderr
    grow(begun(tmp_path / "r"), "a")
    assert len(list((tmp_path / "weights").iterdir())) == 2
    assert said("verify", tmp_path / "r") == "2 versions read, 0 damaged files\n"
    assert "elsewhere" in refusal("registry", "init", "--registry", tmp_path / "r", "--blobs", "s3://elsewhere")


def test_a_registry_is_no_url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    refused = refusal("registry", "init", "--registry", "s3://bucket/umbel")
    assert refused.endswith("`umbel registry init --registry DIR --blobs s3://bucket/prefix`")
    assert list(tmp_path.iterdir()) == []
