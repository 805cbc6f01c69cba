"""Waves: the sites of each one, and the shares they are read from."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as some

from server.waves import Waves
from tests.toys.registry import v
from umbel.adapter import AdapterRef


@given(
    sites=some.sets(some.text("abcdef", min_size=1), max_size=12),
    shares=some.lists(some.floats(0.01, 0.99), max_size=4, unique=True).map(lambda drawn: (*sorted(drawn), 1.0)),
    version=some.integers(0, 99),
)
def test_every_site_is_in_one_wave_and_each_is_as_large_as_its_share(
    sites: set[str], shares: tuple[float, ...], version: int
) -> None:
    ref = AdapterRef("support", version)
    waves = Waves(shares).of(sites, ref)
    flat = [site for wave in waves for site in wave]
    assert sorted(flat) == sorted(sites)
    assert waves == Waves(shares).of(sorted(sites, reverse=True), ref), "whatever order they are known in"
    assert all(waves)
    sizes = {len(flat[: sum(map(len, waves[:number]))]) for number in range(1, len(waves) + 1)}
    assert sizes == {math.ceil(share * len(sites) - 1e-9) for share in shares} - {0}


def test_another_version_begins_at_other_sites() -> None:
    sites = [f"site-{number}" for number in range(10)]
    first = {Waves((0.1, 1.0)).of(sites, v(version))[0][0] for version in range(20)}
    assert len(first) > 5


@pytest.mark.parametrize("shares", ["", "0.5", "1,1", "0.5,0.2,1", "0,1", "1,2", "half,1", "nan,1", "-0.1,1", "0.5;1"])
def test_what_are_no_waves_is_refused(shares: str) -> None:
    with pytest.raises(ValueError, match="are no waves; write rising shares"):
        Waves.parse(shares)


def test_waves_are_read_as_they_are_written() -> None:
    assert Waves.parse("1") == (1.0,)
    assert Waves.parse("0.1, .5,1.0") == (0.1, 0.5, 1.0)
    assert not Waves(Waves.parse("1")).watched
