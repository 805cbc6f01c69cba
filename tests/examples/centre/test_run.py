"""The example run configuration: Flower takes the file as it is, and the ServerApp accepts every key of it."""

import tomllib

from flwr.common.config import fuse_dicts, parse_config_args

from scripts.tools.repository import REPOSITORY
from server.config import RunConfig

FILE = REPOSITORY / "examples" / "run.toml"


def test_flower_takes_the_file_and_the_serverapp_accepts_it() -> None:
    given = parse_config_args([str(FILE)])
    assert given == tomllib.loads(FILE.read_text()), "a flat file: Flower joins the names of tables with dots"
    config = RunConfig.of(fuse_dicts(_defaults(), given))
    assert (config.adapter, config.rounds, config.quorum) == ("support", 10, 2)
    assert str(config.signing_key) == "/srv/umbel/centre/signing.key"


def test_it_names_every_key_of_a_run_with_a_value_of_the_same_type() -> None:
    given, defaults = tomllib.loads(FILE.read_text()), _defaults()
    assert given.keys() == defaults.keys()
    assert {key: type(value) for key, value in given.items()} == {key: type(value) for key, value in defaults.items()}


def test_a_value_that_is_not_the_default_says_what_the_default_is() -> None:
    defaults = _defaults()
    lines = {line.partition(" = ")[0]: line for line in FILE.read_text().splitlines() if " = " in line}
    for key, value in tomllib.loads(FILE.read_text()).items():
        unsaid = "default" not in lines[key]
        assert not (value != defaults[key] and unsaid and defaults[key] != ""), lines[key]


def _defaults() -> dict[str, bool | float | int | str]:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    found: dict[str, bool | float | int | str] = project["tool"]["flwr"]["app"]["config"]
    return found
