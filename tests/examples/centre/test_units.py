"""The example systemd units: systemd accepts them, and every command line in them is one that its program takes."""

import configparser
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer.main
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_options
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink_options
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode as supernode_options

from scripts.tools.certs.make import make
from scripts.tools.repository import REPOSITORY
from umbel.cli.main import app

UNITS = sorted((REPOSITORY / "examples" / "systemd").glob("*.service"))
KNOWN = {"umbel-site", "umbel-supernode", "umbel-registry", "umbel-proxy", "flower-superlink", "flower-superexec"}
CHECKOUT = "/opt/umbel/"


def test_there_is_a_unit_per_process() -> None:
    assert {unit.stem for unit in UNITS} == KNOWN
    readme = (REPOSITORY / "examples" / "README.md").read_text()
    assert all(f"(systemd/{unit.name})" in readme for unit in UNITS)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    """The programs have to be there for it: those of /opt/umbel, and nginx, are stood in for."""
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    for unit in UNITS:
        command = _service(unit)["ExecStart"].split()[0]
        (tmp_path / unit.name).write_text(unit.read_text().replace(command, str(program)))
    verified = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *(str(tmp_path / unit.name) for unit in UNITS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (verified.returncode, verified.stderr) == (0, "")


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_a_unit_restarts_its_process_for_ever_and_flower_reports_nothing(unit: Path) -> None:
    service = _service(unit)
    assert (service["Restart"], service["RestartSec"], _section(unit, "Unit")["StartLimitIntervalSec"]) == (
        "always", "5", "0",
    )  # fmt: skip
    if "flower" in service["ExecStart"] or "supernode" in service["ExecStart"]:
        assert {"FLWR_TELEMETRY_ENABLED=0", "FLWR_DISABLE_UPDATE_CHECK=1"} <= {*service["Environment"].split()}


def test_flowers_processes_have_homes_of_their_own() -> None:
    homes = [one for unit in UNITS for one in _service(unit).get("Environment", "").split() if "FLWR_HOME" in one]
    assert len(homes) == len(set(homes)) == 3


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_the_command_line_is_one_that_the_program_takes(unit: Path) -> None:
    program, *arguments = shlex.split(_service(unit)["ExecStart"])
    match Path(program).name:
        case "umbel":
            assert program.startswith(CHECKOUT + (".venv-engine/" if arguments[0] == "serve" else ".venv/"))
            rest = _umbel(arguments)
            assert bool(rest) == (arguments[0] == "supernode"), "only these go on to another program"
            supernode_options().parse_args(rest)
        case "flower-superlink":
            superlink_options().parse_args(arguments)
        case "flower-superexec":
            superexec_options().parse_args(arguments)
        case other:
            assert other == "nginx"
            assert arguments == ["-e", "stderr", "-p", _service(unit)["WorkingDirectory"], "-c", "nginx.conf"]


def test_the_files_that_the_command_lines_name_are_those_that_make_certs_writes(tmp_path: Path) -> None:
    made = tmp_path / "keys"
    make(made, "centre.example.org", ["clinic-a"], 1, 8443)
    folders = {"/srv/umbel/centre": made / "centre", "/srv/umbel/clinic-a": made / "site-clinic-a"}
    for unit in UNITS:
        folder = folders[_service(unit)["WorkingDirectory"]]
        named = [word for word in _service(unit)["ExecStart"].split() if Path(word).suffix and "/" not in word]
        for name in named:
            written = not (name.endswith(".db") or ":" in name or name[0].isdigit())
            assert not written or (folder / name).is_file(), f"{unit.name}: {name}"


def _umbel(arguments: list[str]) -> list[str]:
    """Parse a command line of `umbel` without running it; return what it hands on to another program."""
    command, info = typer.main.get_command(app), "umbel"
    while hasattr(command, "commands"):
        info, *arguments = arguments
        command = command.commands[info]
    context = command.make_context(info, list(arguments))
    return list(context.args)


def _service(unit: Path) -> configparser.SectionProxy:
    return _section(unit, "Service")


def _section(unit: Path, name: str) -> configparser.SectionProxy:
    """Return a section of a unit; a key that stands there several times has all its values, one after the other."""
    keys: dict[str, str] = {}
    text = unit.read_text().replace("\\\n", " ")
    inside = ""
    for line in text.splitlines():
        if line.startswith("["):
            inside = line.strip("[]")
        elif inside == name and "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            keys[key] = f"{keys[key]} {value}" if key in keys else value
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser[name] = keys
    return parser[name]
