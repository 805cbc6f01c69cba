"""`umbel examples`: the operator lists, releases and forgets what users gave."""

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client.data import user_examples
from client.data.user_examples import ExampleStore
from tests.toys.sites.user_examples import example, scrub
from umbel.cli.main import app
from umbel.site.config import SiteConfig
from umbel.site.template import site_toml


@pytest.fixture
def site_file(sockets: Path) -> Path:
    (sockets / "site.toml").write_text(site_toml() + "[examples]\nenabled = true\nquarantine_hours = 0\n")
    (sockets / "state").mkdir()
    return sockets / "site.toml"


def test_the_operator_looks_releases_and_forgets(site_file: Path) -> None:
    run = CliRunner()
    ended = run.invoke(app, ["examples", "ls", str(site_file)])
    assert ended.exit_code == 1
    config = SiteConfig.load(site_file)
    state = config.site.state_dir
    for user in ("eva", "ada"):
        user_examples.keep(config, example(state, user), scrub)
    listed = run.invoke(app, ["examples", "ls", str(site_file)])
    assert [line.split()[-2:] for line in listed.stdout.splitlines()] == [["accepted", "waiting"]] * 2
    assert "PHONE" not in listed.stdout
    texts = run.invoke(app, ["examples", "ls", str(site_file), "--texts"]).stdout
    assert re.search(r"user: +call <PHONE_NUMBER>", texts)
    as_json = json.loads(run.invoke(app, ["examples", "ls", str(site_file), "--json"]).stdout)
    assert as_json[0].keys() == {"id", "at", "adapter", "version", "kind", "state", "pair"}
    assert run.invoke(app, ["examples", "release", str(site_file), "2"]).stdout.startswith("1 examples released")
    assert run.invoke(app, ["examples", "forget", str(site_file), "--user", "ada"]).stdout.startswith(
        "1 examples deleted"
    )
    assert [one.state for one in ExampleStore.of(config).all()] == ["waiting"]


def test_a_pair_is_shown_with_its_worse_answer(site_file: Path) -> None:
    config = SiteConfig.load(site_file)
    given = example(config.site.state_dir).model_copy(update={"rejected": "no\nidea"})
    user_examples.keep(config, given, scrub)
    run = CliRunner()
    assert run.invoke(app, ["examples", "ls", str(site_file)]).stdout.split()[-3:] == ["accepted", "waiting", "pair"]
    lines = run.invoke(app, ["examples", "ls", str(site_file), "--texts"]).stdout.splitlines()
    assert [line.split() for line in lines[2:]] == [["assistant:", "ward", "7"], ["worse:", "no"], ["idea"]]


def test_the_operator_of_several_adapters_can_do_so_for_one(site_file: Path) -> None:
    text = site_file.read_text()
    site_file.write_text(text.replace("[[adapter]]", '[[adapter]]\nname = "triage"\n\n[[adapter]]', 1))
    config = SiteConfig.load(site_file)
    for adapter in ("support", "triage"):
        user_examples.keep(config, example(config.site.state_dir, adapter=adapter), scrub)

    def run(*words: str) -> str:
        ended = CliRunner().invoke(app, ["examples", words[0], str(site_file), *words[1:]])
        return ended.stdout + ended.stderr

    assert [line.split()[3:5] for line in run("ls").splitlines()] == [
        ["support", "support@v1"], ["triage", "triage@v1"],
    ]  # fmt: skip
    assert [one["id"] for one in json.loads(run("ls", "--json", "--adapter", "triage"))] == [2]
    assert "no example 1 of triage" in run("release", "1", "--adapter", "triage")
    assert run("release", "--adapter", "triage").startswith("1 examples released")
    assert run("forget", "--user", "eva", "--adapter", "support").startswith("1 examples deleted")
    assert [(one.adapter, one.state) for one in ExampleStore.of(config).all()] == [("triage", "released")]
