"""Sentences about data that will bite: one for each cause, from its threshold on, with the setting that mends it."""

from dataclasses import replace
from pathlib import Path

import pytest

from client.data.summary import DATA, EVAL_DATA, Summary, files_of, quantile, warnings
from tests.toys.sites.site_file import GUARD, load
from umbel.site.config import SiteConfig

GOOD = Summary(
    examples=100, refused=0, cut=10, dropped=0, untold=0, repeated=10, unending=0,
    loss_tokens=900, median=20, p95=40, longest=600, padding=0.9,
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    return load(tmp_path)


def test_data_that_is_well_is_not_talked_about(config: SiteConfig) -> None:
    assert warnings(config, {DATA: GOOD}, 30) == []
    assert warnings(config, {DATA: replace(GOOD, cut=20, dropped=10)}, 30) == [], "a tenth of either is no warning"


@pytest.mark.parametrize(
    ("change", "says", "remedy"),
    [
        ({"cut": 99, "dropped": 99}, "99 of 100 examples of [training].data are left out", "raise it (the longest"),
        ({"cut": 11}, "11 of 100 examples of [training].data are cut at [training].seq_len = 512", "95 % have at most"),
        ({"repeated": 11}, "11 of 100 examples of [training].data repeat one further up", "remove them"),
        ({"unending": 1}, "1 of 100 examples of [training].data end with a token at which", "generation_config.json"),
    ],
)
def test_each_cause_has_one_sentence_with_its_remedy(
    config: SiteConfig, change: dict[str, int], says: str, remedy: str
) -> None:
    (told,) = warnings(config, {DATA: replace(GOOD, **change)}, 30)  # type: ignore[arg-type]
    assert told.startswith(says)
    assert remedy in told


def test_refused_examples_are_in_no_share(config: SiteConfig) -> None:
    assert len(warnings(config, {DATA: replace(GOOD, refused=80, cut=10)}, 30)) == 2
    assert warnings(config, {DATA: replace(GOOD, refused=100, cut=0, repeated=0)}, 30) == []


def test_too_few_examples_for_a_verdict_are_told_for_each_set_that_is_known(tmp_path: Path) -> None:
    config = load(tmp_path, training='eval_data = "eval.jsonl"', more=GUARD)
    few = replace(GOOD, examples=30, dropped=1, cut=1, repeated=0)
    told = warnings(config, {EVAL_DATA: few, "guard triage": few}, few.usable)
    assert [sentence.partition(" are fewer than [shadow].min_examples = 30")[0] for sentence in told] == [
        "29 held-out examples",
        "29 examples of guard triage",
    ]
    assert warnings(config, {DATA: few}, None) == [], "what a file does not decide is not said of it"
    assert warnings(load(tmp_path), {DATA: few}, 0)[0].endswith("give more data, or eval_data, or lower it")


def test_the_files_of_a_site_have_the_names_of_their_settings(tmp_path: Path) -> None:
    config = load(tmp_path, training='eval_data = "eval.jsonl"', more=GUARD)
    assert list(files_of(config)) == ["[training].data", "[training].eval_data", "guard triage"]


def test_a_quantile_is_one_of_the_values() -> None:
    values = list(range(1, 11))
    assert [quantile(values, share) for share in (0, 0.5, 0.95, 1)] == [1, 5, 10, 10]
    assert (quantile([], 0.5), quantile([7], 0.95)) == (0, 7)
