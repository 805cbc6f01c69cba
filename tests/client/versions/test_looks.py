"""When traffic is looked at, and what each look may err: all together no more than the confidence allows."""

import pytest

from client.versions.looks import FIRST_LOOK, Looks


def test_looks_come_at_doubled_counts_and_in_a_watch_most_may_err_at_its_end() -> None:
    looks, seen, spent = Looks(0.95, horizon=100), [], []
    for requests in range(101):
        if looks.due(requests) or requests == 100:
            seen.append(requests)
            spent.append(looks.spend(requests, last=requests == 100))
    assert seen == [FIRST_LOOK, 16, 32, 64, 100]
    assert spent == pytest.approx([0.025 * (b**2 - a**2) / 100**2 for a, b in zip([0, *seen], seen, strict=False)])
    assert sum(spent) == pytest.approx(0.025)


@pytest.mark.parametrize("seen", [0, 3, 40, 99, 100, 500])
def test_the_last_look_takes_what_is_left_wherever_it_comes(seen: int) -> None:
    looks = Looks(0.95, horizon=100)
    first = looks.spend(8)
    assert looks.spend(seen, last=True) == pytest.approx(0.025 - first)
    assert not looks.due(seen)


def test_a_long_watch_is_first_looked_at_when_something_can_be_told() -> None:
    looks = Looks(0.95, horizon=1000)
    assert (looks.due(62), looks.due(63)) == (False, True)
    assert looks.spend(63) >= 0.025 / 256


def test_beyond_the_horizon_only_the_last_look_is_left() -> None:
    looks = Looks(0.95, horizon=100)
    assert [looks.due(seen) for seen in (99, 100, 1000)] == [True, False, False]


def test_without_a_horizon_the_looks_never_end_and_may_err_less_and_less() -> None:
    looks, spent = Looks(0.95), []
    for k in range(200):
        assert looks.due(FIRST_LOOK * 2**k)
        spent.append(looks.spend(FIRST_LOOK * 2**k))
    assert spent[:3] == pytest.approx([0.025 * 0.6079 / k**2 for k in (1, 2, 3)], rel=1e-3)
    assert 0.0249 < sum(spent) < 0.025
    jump = Looks(0.95)
    jump.spend(500)
    assert (jump.due(511), jump.due(512)) == (False, True)
