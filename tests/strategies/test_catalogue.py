"""`find`: strategies by name, and classes of your own."""

import re

import pytest

from scripts.tools.repository import REPOSITORY
from strategies import catalogue
from strategies.exact import Exact
from strategies.fedit import FedIT
from umbel.errors import ConfigError

PAGE = REPOSITORY / "docs" / "strategies.md"


def test_the_page_names_every_strategy() -> None:
    assert set(re.findall(r"^\| `(\w+)`.*strategies/\w+\.py", PAGE.read_text(), re.M)) == set(catalogue.STRATEGIES)


def test_unknown_strategy_names_the_one_that_was_meant() -> None:
    assert catalogue.find("exact") is Exact
    with pytest.raises(ConfigError, match="did you mean 'fedit'"):
        catalogue.find("fed-it")
    assert catalogue.find("strategies.fedit:FedIT") is FedIT
    with pytest.raises(ConfigError, match="cannot be imported"):
        catalogue.find("strategies.fedit:FedItt")
    with pytest.raises(ConfigError, match="no subclass"):
        catalogue.find("strategies.fedit:FactorMean")
    with pytest.raises(ConfigError, match="known: dual, exact, fedit, fedsa, ffa, flora, rolora"):
        catalogue.find("zzz")
    for wrong in (":", ".x:Y", "x:", ":Y"):
        with pytest.raises(ConfigError, match="cannot be imported"):
            catalogue.find(wrong)
