"""Users are counted without their ids, at most so many of them, and the same ones for each version."""

from serving.router.user_counts import CODE_BITS, UserCodes, UserCounts


def test_a_code_is_a_users_own_and_no_id() -> None:
    codes = UserCodes()
    assert codes.of("support", "anna") == codes.of("support", "anna")
    assert len({codes.of("support", "anna"), codes.of("support", "bert"), codes.of("triage", "anna")}) == 3
    assert UserCodes().of("support", "anna") != codes.of("support", "anna"), "each engine has a key of its own"
    assert 0 <= codes.of("support", "\ud800") < 2**CODE_BITS


def test_of_too_many_users_those_of_the_smallest_codes_are_kept() -> None:
    counts = UserCounts(most=3)
    for code in (50, 10, 40):
        count = counts.of(code)
        assert count is not None
        count.requests += 1
    assert counts.distinct == 3
    assert counts.of(60) is None, "a larger one comes too late"
    assert counts.of(20) is not None
    assert counts.of(50) is None, "it had to go, and does not come back"
    again = counts.of(10)
    assert again is not None
    assert again.requests == 1
    assert set(counts.report()) == {10, 20, 40}


def test_the_sample_does_not_depend_on_who_comes_first() -> None:
    first, second = UserCounts(most=5), UserCounts(most=5)
    for code in range(100):
        first.of(code * 7919 % 101)
        second.of((99 - code) * 7919 % 101)
    assert set(first.report()) == set(second.report())
    assert first.distinct == second.distinct
