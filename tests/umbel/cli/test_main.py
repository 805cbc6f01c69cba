"""The command line as a whole: its help, wrong commands, and commands of the centre, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.toys.command_line import refusal, umbel
from umbel.cli import centre
from umbel.cli.main import app


@pytest.mark.parametrize("arguments", [["ls"], ["ls", "--json"], ["show", "support@v1"]])
def test_a_registry_that_is_not_there_is_named_and_not_made(tmp_path: Path, arguments: list[str]) -> None:
    said = refusal("adapter", *arguments, "--registry", tmp_path / "registry")
    assert said.startswith(f"{tmp_path / 'registry'}: no adapter registry here")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["status", "--help"], ["adapter", "ls", "--help"]]
)
def test_help_imports_nothing_heavy(arguments: list[str]) -> None:
    program = (
        "import sys\nfrom umbel.cli.main import app\n"
        f"try:\n    app({arguments!r})\nexcept SystemExit as end:\n    assert end.code in (0, None), end\n"
        "heavy = {'torch', 'flwr', 'sglang', 'httpx', 'transformers', 'zmq', 'client', 'server', 'serving'}\n"
        "print('imported:', *sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stderr == "imported:\n"
    assert "Usage" in ended.stdout


@pytest.mark.parametrize("arguments", [["serv"], ["check"], ["adapter", "show"]])
def test_a_command_that_is_wrong_shows_how_it_is_used(arguments: list[str]) -> None:
    ended = umbel(*arguments)
    assert ended.returncode == 2
    assert "Usage:" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("command", ["supernode", "bundle"])
def test_the_help_of_flowers_commands_ends_with_calls(command: str) -> None:
    assert len([line for line in centre.EPILOGS[command].splitlines() if line]) == 3
    (registered,) = [one for one in app.registered_commands if one.callback and one.callback.__name__ == command]
    assert registered.epilog == centre.EPILOGS[command]


def test_a_folder_for_the_bundle_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert refusal("bundle", tmp_path / "file") == f"{tmp_path / 'file'} is a file; choose a new folder"
