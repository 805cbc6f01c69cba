"""Sentences about data that will bite: one for each cause, from its threshold on, with the setting that mends it."""

from dataclasses import replace
from pathlib import Path

import pytest

from client.data.summary import DATA, HELD_OUT, RELEASED, Asked, Summary, files_of, quantile, warnings
from tests.toys.sites.site_file import GUARD, load
from umbel.site.config import SiteConfig

GOOD = Summary(
    examples=100, refused=0, cut=10, dropped=0, untold=0, repeated=10, groups=90, largest_group=2, unending=0,
    loss_tokens=900, median=20, p95=40, longest=600, padding=0.9,
)  # fmt: skip
ENOUGH = {HELD_OUT: Asked(30, 30.0)}


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    return load(tmp_path)


def test_data_that_is_well_is_not_talked_about(config: SiteConfig) -> None:
    assert warnings(config, "support", {DATA: GOOD}, ENOUGH, {}) == []
    a_tenth = replace(GOOD, cut=20, dropped=10, largest_group=10)
    assert warnings(config, "support", {DATA: a_tenth}, ENOUGH, {}) == [], "a tenth is no warning"


@pytest.mark.parametrize(
    ("change", "says", "remedy"),
    [
        ({"cut": 99, "dropped": 99}, "99 of 100 examples of [training].data are left out", "raise it (the longest"),
        ({"cut": 11}, "11 of 100 examples of [training].data are cut at [training].seq_len = 512", "95 % have at most"),
        ({"repeated": 11}, "11 of 100 examples of [training].data repeat one further up", "remove them"),
        ({"largest_group": 11}, "11 of 100 examples of [training].data begin with the same user turn", 'a "group"'),
        ({"unending": 1}, "1 of 100 examples of [training].data end with a token at which", "generation_config.json"),
    ],
)
def test_each_cause_has_one_sentence_with_its_remedy(
    config: SiteConfig, change: dict[str, int], says: str, remedy: str
) -> None:
    (told,) = warnings(config, "support", {DATA: replace(GOOD, **change)}, ENOUGH, {})  # type: ignore[arg-type]
    assert told.startswith(says)
    assert remedy in told


def test_refused_examples_are_in_no_share(config: SiteConfig) -> None:
    assert len(warnings(config, "support", {DATA: replace(GOOD, refused=80, cut=10)}, ENOUGH, {})) == 2
    assert warnings(config, "support", {DATA: replace(GOOD, refused=100, cut=0, repeated=0)}, ENOUGH, {}) == []


def test_too_few_examples_for_a_verdict_are_told_for_each_set_that_is_known(tmp_path: Path) -> None:
    config = load(tmp_path, training='eval_data = "eval.jsonl"', more=GUARD)
    few = {HELD_OUT: Asked(29, 29.0), "guard triage": Asked(30, 29.9)}
    told = warnings(config, "support", {}, few, {})
    assert [
        sentence.partition(" than [shadow].min_examples = 30: no version can be promoted")[0] for sentence in told
    ] == [
        "29 held-out examples are fewer",
        "30 examples of guard triage count as 29, because several ask the same or some answers are much longer, fewer",
    ]
    assert warnings(config, "support", {DATA: GOOD}, {}, {}) == [], "what a file does not decide is not said of it"
    assert warnings(load(tmp_path), "support", {}, few, {})[0].endswith("or a larger eval_fraction, or lower it")


def test_few_groups_are_told_as_what_they_count_as_and_not_as_their_lines(config: SiteConfig) -> None:
    """Who reads "25 are fewer than 30" would lower the limit to 25, and be told then that they count as 1."""
    (told,) = warnings(config, "support", {}, {HELD_OUT: Asked(25, 1.0)}, {})
    assert told.startswith("25 held-out examples count as 1, because several ask the same")


def test_a_guard_that_asks_nothing_of_its_own_is_told(config: SiteConfig) -> None:
    (told,) = warnings(config, "support", {}, {**ENOUGH, "guard triage": Asked(40, 40.0, HELD_OUT)}, {})
    assert told.startswith("all that guard triage asks is asked by held-out examples, too: it protects nothing more")
    assert told.endswith("give it other examples, or leave it out")


def test_much_that_is_asked_and_so_not_trained_on_is_told_with_its_remedy(config: SiteConfig) -> None:
    assert warnings(config, "support", {DATA: GOOD, RELEASED: GOOD}, {}, {DATA: 10}) == []
    data, released = warnings(config, "support", {DATA: GOOD, RELEASED: GOOD}, {}, {DATA: 11, RELEASED: 11})
    assert data.startswith("11 of 100 examples of [training].data are not trained on, because held-out examples")
    assert data.endswith('give each conversation a "group"')
    assert released.endswith("have the same group"), "users write no groups"


def test_the_files_of_a_site_have_the_names_of_their_settings(tmp_path: Path) -> None:
    config = load(tmp_path, training='eval_data = "eval.jsonl"', more=GUARD)
    assert list(files_of(config, "support")) == ["[training].data", "[training].eval_data", "guard triage"]


def test_a_quantile_is_one_of_the_values() -> None:
    values = list(range(1, 11))
    assert [quantile(values, share) for share in (0, 0.5, 0.95, 1)] == [1, 5, 10, 10]
    assert (quantile([], 0.5), quantile([7], 0.95)) == (0, 7)


def test_of_several_adapters_each_warning_names_its_adapter_and_the_setting(tmp_path: Path) -> None:
    config = load(tmp_path, more='[[adapter]]\nname = "billing"\ndata = "billing.jsonl"')
    cut = replace(GOOD, cut=50)
    for adapter, setting in (("support", "[training].data"), ("billing", "[[adapter]] billing.data")):
        (told,) = warnings(config, adapter, {DATA: cut}, {}, {})
        assert told.startswith(f"{adapter}: ")
        assert f" of 100 examples of {setting} are cut" in told
