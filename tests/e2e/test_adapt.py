"""README's "One site, one command", line by line on a real engine: a first version is promoted, and it answers.

The environment is there, and the base is the tests' own: it is made in a second.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest

from scripts.tools.processes import free_port
from scripts.tools.repository import REPOSITORY
from scripts.tools.trial_site import wait_until
from tests.toys import readme
from umbel.site.config import SiteConfig

pytestmark = pytest.mark.e2e

ENVIRONMENT, ACTIVATE, BASE, DATA, ADAPT = readme.commands("One site, one command")


@pytest.fixture
def clone(tiny_llama: Path) -> Iterator[Path]:
    """A folder like a clean clone in which the environment and the base are made."""
    with tempfile.TemporaryDirectory(prefix="umbel-") as name:
        folder = Path(name)
        (folder / "examples").mkdir()
        shutil.copy(REPOSITORY / "examples" / "site-alone.toml", folder / "examples")
        assert BASE == "python -m scripts.tools.tiny_base --out .cache/tiny-base"
        shutil.copytree(tiny_llama, folder / ".cache" / "tiny-base")
        yield folder


def test_the_readmes_commands_reach_a_promoted_version_that_answers(clone: Path) -> None:
    port = free_port()
    environment = {
        **os.environ, "PYTHONPATH": str(REPOSITORY), "UMBEL_SITE__ENGINE__PORT": str(port),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }  # fmt: skip
    assert (ENVIRONMENT, ACTIVATE) == ("scripts/environments engine", "source .venv-engine/bin/activate")
    subprocess.run(DATA, shell=True, cwd=clone, env=environment, check=True)
    output = clone / "output"
    with output.open("wb") as out:
        adapt = subprocess.Popen(_umbel(ADAPT), cwd=clone, env=environment, stdout=out, stderr=out)
    family: list[psutil.Process] = []

    def promoted() -> bool:
        assert adapt.poll() is None, output.read_text()
        return "v1 answers users" in output.read_text()

    try:
        wait_until(promoted, f"the first promotion; see {output}")
        family = psutil.Process(adapt.pid).children(recursive=True)
        asked = next(line for line in output.read_text().splitlines() if "ask it:" in line).partition("ask it:")[2]
        assert f"http://127.0.0.1:{port}/" in asked
        body = json.loads(shlex.split(asked)[-1])
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json={**body, "max_tokens": 8}, timeout=60)
        assert reply.status_code == 200, reply.text
        assert reply.headers["x-umbel-adapter"].startswith("support@v")
        adapt.send_signal(signal.SIGINT)
        assert adapt.wait(90) == 0
    finally:
        if adapt.poll() is None:
            adapt.kill()
            adapt.wait()
        left = psutil.wait_procs(family, timeout=20)[1]
        for process in left:
            process.kill()
    assert not left, "Ctrl-C ends all that was started"
    config = SiteConfig.load(clone / "examples" / "site-alone.toml")
    registry = config.site.state_dir / "registry"
    listed = subprocess.run(_umbel(f"umbel adapter verify --registry {registry}"), env=environment, check=True)
    assert listed.returncode == 0


def _umbel(command: str) -> list[str]:
    """Return a command of umbel's for this environment's own interpreter."""
    program, *arguments = shlex.split(command)
    assert program == "umbel"
    return [sys.executable, "-m", "umbel.cli", *arguments]
