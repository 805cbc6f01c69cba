"""Names of versions, the states they may take at a site, and their manifests."""

import doctest
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umbel import adapter
from umbel.adapter import TRANSITIONS, AdapterManifest, AdapterRef, Lifecycle, check_name
from umbel.errors import AdapterError

NAMES = st.from_regex(r"[a-z][a-z0-9]{0,5}([-_][a-z0-9]{1,5}){0,3}", fullmatch=True)
REFS = st.builds(AdapterRef, NAMES, st.integers(0, 10**9 - 1))


@pytest.mark.parametrize("name", ["support", "a", "a1_b2", "customer-support", "x" * 40])
def test_a_good_name_is_returned_as_it_is(name: str) -> None:
    assert check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", "Support", "1a", "_a", "a_", "a__b", "a--b", "-a", "a b", "a@v1", "ä", "a\n", "../a", "a.b", "x" * 41]
)
def test_any_other_name_is_refused_and_quoted(name: str) -> None:
    with pytest.raises(AdapterError) as refusal:
        check_name(name)
    assert repr(name) in str(refusal.value)
    with pytest.raises(AdapterError):
        AdapterRef(name, 1)


@given(REFS)
def test_a_ref_is_read_back_from_its_text(ref: AdapterRef) -> None:
    assert AdapterRef.parse(str(ref)) == ref


@given(REFS, REFS)
def test_engine_names_never_collide(one: AdapterRef, other: AdapterRef) -> None:
    assert (one.engine_name == other.engine_name) == (one == other)


@given(NAMES, st.integers(0, 200), NAMES, st.integers(0, 200))
def test_engine_names_of_nearby_refs_never_collide(a: str, i: int, b: str, j: int) -> None:
    """Names that end like a version, versions that begin like one another."""
    refs = {AdapterRef(name, version) for name in (a, b, f"{a}-v{i}", f"{a}_v{i}", f"{a}v{i}") for version in (i, j)}
    assert len({ref.engine_name for ref in refs}) == len(refs)


def test_a_version_that_could_not_be_read_back_is_refused() -> None:
    with pytest.raises(AdapterError, match="999999999"):
        AdapterRef("support", 10**9)


@pytest.mark.parametrize(
    "text",
    ["support", "support@1", "support@v", "support@v-1", "support@v01", "support@v1 ", "@v1", "support@live",
     "support@v1\n", "support@v1234567890", "Support@v1", "a@v1@v2", "support-v1", ""],
)  # fmt: skip
def test_other_text_is_no_ref_and_the_message_shows_a_good_one(text: str) -> None:
    with pytest.raises(AdapterError, match="support@v12"):
        AdapterRef.parse(text)


def test_the_example_in_the_docstring_is_true() -> None:
    assert doctest.testmod(adapter) == doctest.TestResults(failed=0, attempted=5)


def test_a_negative_version_is_refused() -> None:
    with pytest.raises(AdapterError, match="-1 is not within"):
        AdapterRef("support", -1)


def test_refs_are_ordered_by_number_not_by_text() -> None:
    assert AdapterRef("support", 9) < AdapterRef("support", 10)


ALLOWED = {
    ("candidate", "probing"), ("candidate", "rejected"), ("probing", "watching"), ("probing", "judged"),
    ("probing", "rejected"), ("watching", "probing"), ("watching", "judged"), ("watching", "rejected"),
    ("judged", "live"), ("judged", "rejected"), ("live", "retired"), ("retired", "live"),
}  # fmt: skip


@pytest.mark.parametrize(("old", "new"), list(itertools.product(Lifecycle, Lifecycle)))
def test_a_version_goes_only_where_its_life_allows(old: Lifecycle, new: Lifecycle) -> None:
    if (old.value, new.value) in ALLOWED:
        assert old.to(new) is new
    else:
        with pytest.raises(AdapterError, match=f"a {old} version cannot become {new}"):
            old.to(new)


def test_every_state_has_a_row_in_the_table() -> None:
    assert set(TRANSITIONS) == set(Lifecycle)


def test_a_shadow_is_a_version_that_is_loaded_and_not_live() -> None:
    assert [state for state in Lifecycle if state.is_shadow] == ["probing", "watching", "judged"]


@pytest.mark.parametrize("field", ["digest", "base"])
@pytest.mark.parametrize("value", ["", "0" * 63, "G" * 64, "0" * 64 + "\n"])
def test_a_manifest_needs_whole_digests(field: str, value: str) -> None:
    good = {
        "name": "support", "version": 1, "digest": "0" * 64, "base": "1" * 64, "lineage": "l", "round": 1, "rank": 8,
        "target_modules": ("q_proj",),
    }  # fmt: skip
    assert AdapterManifest.model_validate(good).ref == AdapterRef("support", 1)
    with pytest.raises(ValueError, match=field):
        AdapterManifest.model_validate({**good, field: value})
