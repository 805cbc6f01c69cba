"""The alias table: names that users may ask for, versions that they mean, and tables that cannot be."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.aliases import AliasTable
from tests.toys.serving.router import TABLE
from umbel.adapter import AdapterRef, ServedRef
from umbel.errors import NotFound


@pytest.mark.parametrize("field", ["canary", "mirror"])
def test_a_table_with_a_share_and_no_shadow_cannot_be(field: str) -> None:
    for adapters in ({"support": {"live": None, "shadow": None}}, {}):
        with pytest.raises(ValidationError, match="and no shadow"):
            AliasTable.model_validate({"base": "tiny", "adapters": adapters, field: {"support": 0.1}})


@pytest.mark.parametrize("name", TABLE.names())
def test_every_name_that_is_listed_means_something(name: str) -> None:
    found = TABLE.resolve(name)
    assert (found is None) == (name == TABLE.base)
    assert found is None or str(found) in TABLE.addressable


@pytest.mark.parametrize("name", ["support@v3", "support@shadow", "support@", "triage", "tiny@live", ""])
def test_a_name_that_is_not_listed_is_not_found_and_the_listed_ones_are_named(name: str) -> None:
    assert name not in TABLE.names()
    with pytest.raises(NotFound, match="Available: tiny, support, support@v2, support@v1"):
        TABLE.resolve(name)


def test_the_base_answers_until_a_first_version_is_live() -> None:
    first = AliasTable(base="tiny", adapters={"support": {"live": None, "shadow": "support@v1"}})
    assert first.resolve("support") is None
    assert first.shadow("support") == AdapterRef("support", 1)
    assert first.names() == ["tiny", "support"]
    assert (first.labels(), first.shadow("triage")) == ({"support@v1"}, None)


def test_a_table_is_read_as_it_was_written_and_a_damaged_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "aliases.json"
    TABLE.write(file)
    assert AliasTable.read(file) == TABLE
    assert [path.name for path in tmp_path.iterdir()] == [file.name], "replaced by rename, and nothing is left"
    file.write_text(file.read_text()[:-5])
    with pytest.raises(ValueError, match="AliasTable"):
        AliasTable.read(file)


@pytest.mark.parametrize("version", ["support", "support@", "support@3", "../x@v1"])
def test_what_is_no_version_cannot_stand_in_a_table(version: str) -> None:
    with pytest.raises(ValidationError):
        AliasTable(base="tiny", adapters={"support": {"live": version}})


def test_every_name_belongs_to_one_adapter_or_to_the_base() -> None:
    table = AliasTable(
        base="llama",
        adapters={"support": {"live": "support@v2", "previous": "support@v1"}, "triage": {"live": None}},
        addressable=("support@v2", "support@v1"),
    )
    assert {name: table.adapter_of(name) for name in table.names()} == {
        "llama": None, "triage": "triage",
        **dict.fromkeys(("support", "support@v2", "support@v1", "support@live", "support@previous"), "support"),
    }  # fmt: skip
    for name in ("support@v3", "billing", "llama@v1", ""):
        with pytest.raises(NotFound, match="does not exist"):
            table.adapter_of(name)
    assert table.without(["support"]).names() == ["llama", "triage"]
    assert table.without(["triage", "billing"]).names() == [name for name in table.names() if name != "triage"]


SERVED = AliasTable(
    base="tiny", adapters={"support": {"live": "support@v2"}}, addressable=("support@v2",),
    served={"legal": "legal@sha256:0123456789abcdef"},
)  # fmt: skip


def test_an_adapter_that_is_only_served_is_its_digest_and_has_no_aliases() -> None:
    assert SERVED.names() == ["tiny", "support", "legal", "support@v2", "support@live"]
    assert SERVED.resolve("legal") == ServedRef("legal", "0123456789abcdef")
    assert SERVED.labels() == {"support@v2", "legal@sha256:0123456789abcdef"}
    assert (SERVED.shadow("legal"), SERVED.previous("legal")) == (None, None)
    for name in ("legal@live", "legal@v1", "legal-sha256-0123456789abcdef"):
        with pytest.raises(NotFound, match="Available: tiny, support, legal"):
            SERVED.resolve(name)


@pytest.mark.parametrize("name", [name for name in SERVED.names() if name != "tiny"])
def test_sglangs_own_form_is_the_same_name(name: str) -> None:
    assert SERVED.resolve(f"tiny:{name}") == SERVED.resolve(name)


@pytest.mark.parametrize(
    "name",
    ["tiny:", "tiny:tiny", "tiny:tiny:support", "other:support", ":support", "tiny: support", "tiny:support-v2",
     "tiny:support@v3", "tiny:legal-sha256-0123456789abcdef"],
)  # fmt: skip
def test_sglangs_own_form_reaches_nothing_that_a_name_does_not(name: str) -> None:
    with pytest.raises(NotFound, match=name):
        SERVED.resolve(name)


@pytest.mark.parametrize("served", [{"support": "support@sha256:0123456789abcdef"}, {"tiny": "tiny@sha256:" + "0" * 16},
                                    {"legal": "code@sha256:0123456789abcdef"}, {"legal": "legal@v1"},
                                    {"legal": "legal@sha256:0123"}])  # fmt: skip
def test_a_served_adapter_has_a_name_of_its_own_and_a_digest(served: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        AliasTable(base="tiny", adapters={"support": {"live": None}}, served=served)
