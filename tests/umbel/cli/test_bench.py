"""`umbel bench`: the simulation runs from the command line, with the site file's defaults."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from umbel.cli.main import app
from umbel.site.sections import TrainingSection
from umbel.site.template import site_toml


def simulate(out: Path, *more: str) -> list[object]:
    command = ["bench", "simulate", "--hours", "0.005", "--slo", "500,50", "--out", str(out), *more]
    ended = CliRunner().invoke(app, command)
    assert ended.exit_code == 0, ended.output
    found: list[object] = json.loads(out.read_text())
    return found


def test_the_shares_are_those_of_the_site_file_unless_given(tmp_path: Path) -> None:
    pytest.importorskip("serving.bench.simulate", reason="a command of the site's environment")
    floor, cap = (TrainingSection.model_fields[key].default for key in ("share_floor", "share_cap"))
    usual = simulate(tmp_path / "a.json")
    assert usual == simulate(tmp_path / "b.json", "--share-floor", str(floor), "--share-cap", str(cap))
    assert usual != simulate(tmp_path / "c.json", "--share-cap", "0.1")


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--load", "bursts"), "--load bursts: expected trace, poisson, or gamma:CV"),
        (("--trace", "nowhere.csv"), "nowhere.csv: not a trace"),
        (("nowhere.toml",), "nowhere.toml: "),
        (("site.toml",), "base: no base model here"),
    ],
)
def test_what_cannot_be_measured_is_said_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...], why: str
) -> None:
    pytest.importorskip("sglang", reason="a command of the site's environment")
    from serving.bench.processes import testbed

    monkeypatch.setattr(testbed, "require_machine", lambda with_priorities: None)
    monkeypatch.chdir(tmp_path)
    Path("site.toml").write_text(site_toml())
    ended = CliRunner().invoke(app, ["bench", "coexec", "--out", "out", *options])
    assert ended.exit_code == 1
    assert why in ended.stderr
    assert not Path("out").exists()
