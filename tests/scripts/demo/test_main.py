"""The demo's command: it empties only folders of its own, and refuses numbers that make no demo."""

import signal
from pathlib import Path

import pytest

from scripts.tools.demo.main import MARKER, fresh_folder, interrupt, parse


def test_a_new_folder_is_made_and_an_earlier_demos_is_emptied(tmp_path: Path, sockets: Path) -> None:
    out = fresh_folder(sockets / "out")
    assert sorted(path.name for path in out.iterdir()) == [MARKER, "logs"]
    (out / "summary.json").write_text("{}")
    assert sorted(path.name for path in fresh_folder(out).iterdir()) == [MARKER, "logs"]


def test_anybody_elses_folder_is_left_alone(sockets: Path) -> None:
    (sockets / "thesis.tex").write_text("x")
    with pytest.raises(SystemExit, match="is not empty and not a demo's; choose another --out"):
        fresh_folder(sockets)
    assert (sockets / "thesis.tex").exists()


def test_a_file_and_a_path_too_long_for_sockets_are_refused(sockets: Path) -> None:
    (sockets / "file").write_text("")
    with pytest.raises(SystemExit, match="is a file; choose another --out"):
        fresh_folder(sockets / "file")
    with pytest.raises(SystemExit, match="is too long a path for the Unix sockets below it"):
        fresh_folder(sockets / ("x" * 60))


@pytest.mark.parametrize("arguments", [["--sites", "1"], ["--sites", "9"], ["--rounds", "0"]])
def test_numbers_that_make_no_demo_are_refused(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["demo", *arguments])
    with pytest.raises(SystemExit):
        parse()
    assert "--sites must be 2 to 8, and --rounds at least 1" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "secure"), [([], True), (["--secure"], True), (["--insecure"], False)])
def test_it_is_secure_unless_it_is_told_not_to_be(
    arguments: list[str], secure: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["demo", *arguments])
    assert parse().secure is secure


def test_a_signal_ends_it_as_ctrl_c_does() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupt(signal.SIGTERM, None)
