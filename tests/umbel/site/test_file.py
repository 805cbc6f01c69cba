"""The site file as TOML, and the lines that explain what is wrong in it."""

import re
from pathlib import Path

import pytest

from tests.toys.sites.site_file import GOOD, GUARD, refusal
from umbel.errors import ConfigError
from umbel.site.config import SiteConfig


@pytest.mark.parametrize(
    ("parts", "line"),
    [
        ({"engine": "max_lora_rnak = 8"}, "engine.max_lora_rnak is not a setting; did you mean 'max_lora_rank'?"),
        ({"training": "microbatch = 8"}, "training.microbatch is not a setting; did you mean 'micro_batch'?"),
        ({"more": "[shadw]\nmax_loss_ratio = 1.0"}, "shadw is not a setting; did you mean 'shadow'?"),
        ({"more": "[shadow]\nmax_loss = 1.0"}, "shadow.max_loss is not a setting; did you mean 'max_loss_ratio'?"),
        (
            {"more": "[shadow]\nzzz = 1"},
            "shadow.zzz is not a setting; known here: max_loss_ratio, max_exact_drop, confidence, min_examples, "
            "watch_s, canary_share, redraw_users, mirror_share, min_requests, min_users, too_few_users, "
            "max_latency_ratio, rollback_window_s, control_share, warm_prefixes, guard",
        ),
        (
            {"more": GUARD + "max_los_ratio = 2"},
            "shadow.guard.0.max_los_ratio is not a setting; did you mean 'max_loss_ratio'?",
        ),
    ],
)
def test_an_unknown_key_says_which_was_meant(tmp_path: Path, parts: dict[str, str], line: str) -> None:
    assert refusal(tmp_path, **parts) == [line]


def test_an_unknown_key_of_an_adapter_says_which_was_meant(tmp_path: Path) -> None:
    text = GOOD.format(engine="", training="", more="").replace('name = "support"', 'nmae = "support"')
    assert sorted(refusal(tmp_path, text)) == [
        "adapter.0.name is missing",
        "adapter.0.nmae is not a setting; did you mean 'name'?",
    ]


def test_each_mistake_has_a_line_of_its_own(tmp_path: Path) -> None:
    text = GOOD.replace("30000", "0")
    lines = refusal(tmp_path, text.format(engine='dtype = "int4"', training="share_cap = 2", more=""))
    assert [line.split(" ")[0].rstrip(":") for line in lines] == [
        "engine.port", "engine.dtype", "training.share_cap",
    ]  # fmt: skip


def test_single_brackets_for_an_adapter_say_what_to_write(tmp_path: Path) -> None:
    text = GOOD.format(engine="", training="", more="").replace("[[adapter]]", "[adapter]")
    assert refusal(tmp_path, text) == ["adapter: write [[adapter]], with double brackets: it is a list of tables"]


@pytest.mark.parametrize("content", ["[site", "a = ", "[site]\n[site]"])
def test_a_file_that_is_not_toml_says_where(tmp_path: Path, content: str) -> None:
    assert re.match(r"not TOML: .+ \(at .+\)$", refusal(tmp_path, content)[0])


def test_a_file_that_is_not_text_is_a_config_error(tmp_path: Path) -> None:
    (tmp_path / "site.toml").write_bytes('[site]\nname = "clínic"'.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"site\.toml: not TOML"):
        SiteConfig.load(tmp_path / "site.toml")


@pytest.mark.parametrize("missing", ["nothing.toml", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, missing: str) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        SiteConfig.load(tmp_path / missing)
