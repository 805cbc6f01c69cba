"""The bundle for `flwr run` holds the whole app and no file of a site."""

import subprocess
import sys
import zipfile
from pathlib import Path

from scripts.tools.repository import REPOSITORY
from server.bundle import export


def test_flower_builds_the_exported_app_and_it_holds_no_site_file(tmp_path: Path) -> None:
    app = export(REPOSITORY, tmp_path / "app")
    (app / "clinic-a.toml").write_text("[site]\nname = 'left here by mistake'\n")
    (app / "client" / "daemon.py").write_text("")
    for private in ("site-clinic-a/updates.key", "client/updates.key", "umbel/train.jsonl", "server/signing.pub"):
        (app / private).parent.mkdir(exist_ok=True)
        (app / private).write_text("left here by mistake")
    flwr = Path(sys.executable).parent / "flwr"
    subprocess.run([flwr, "build", "--app", app], cwd=tmp_path, check=True, capture_output=True)
    (bundle,) = tmp_path.glob("*.fab")
    names = set(zipfile.ZipFile(bundle).namelist())
    assert {"server/app.py", "client/flower/app.py", "strategies/exact.py", "umbel/messages/hello.py"} <= names
    assert {Path(name).parts[0] for name in names} == {
        "pyproject.toml", ".info", "server", "client", "strategies", "umbel",
    }  # fmt: skip
    assert "client/daemon.py" not in names
    assert {Path(name).suffix for name in names if not name.startswith(".info")} == {".py", ".toml"}


def test_the_packages_are_the_five_and_come_from_here() -> None:
    import client
    import server
    import serving
    import strategies
    import umbel

    for package in (client, server, serving, strategies, umbel):
        assert Path(package.__file__ or "").parent.parent == REPOSITORY
        assert (Path(package.__file__ or "").read_text()) == "", "imports must cost nothing"
