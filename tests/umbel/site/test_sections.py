"""The values that each table of a site file takes, and the refusal of others."""

import json
from pathlib import Path

import pytest

from tests.toys.sites.site_file import GOOD, GUARD, load, refusal


def test_guards_are_named_files_from_the_site_files_folder(tmp_path: Path) -> None:
    more = GUARD + GUARD.replace("triage", "letters") + "max_loss_ratio = 1.2"
    guards = load(tmp_path, more=more).shadow.guard
    assert [(guard.name, guard.data, guard.max_loss_ratio) for guard in guards] == [
        ("triage", tmp_path / "guards" / "triage.jsonl", 1.01),
        ("letters", tmp_path / "guards" / "letters.jsonl", 1.2),
    ]


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"engine": 'target_modules = ["q_proj"]'}, "engine.target_modules: SGLang needs q_proj and v_proj together"),
        ({"engine": 'target_modules = ["k_proj", "v_proj"]'}, "engine.target_modules: SGLang needs q_proj and v_proj"),
        ({"engine": "target_modules = []"}, "engine.target_modules: nothing cannot be adapted; choose from q_proj"),
        ({"engine": 'target_modules = ["lm_head"]'}, "engine.target_modules: lm_head cannot be adapted; choose from"),
        ({"engine": "slots = 1"}, "engine.slots: "),
        ({"engine": "max_lora_rank = 0"}, "engine.max_lora_rank: "),
        ({"engine": "drain_s = inf"}, "engine.drain_s: Input should be a finite number"),
        ({"more": "[slo]\nttft_ms = inf"}, "slo.ttft_ms: Input should be a finite number"),
        ({"more": "[slo]\ntpot_ms = nan"}, "slo.tpot_ms: Input should be a finite number"),
        ({"more": '[shadow.guard]\nname = "x"\ndata = "y"'}, "shadow.guard: write [[shadow.guard]], with double"),
        ({"engine": "port = 1"}, "not TOML: Cannot overwrite a value"),
        ({"engine": 'env = {SGLANG_RUST_SERVER = "1"}'}, "engine.env: SGLANG_RUST_SERVER cannot be set for"),
        (
            {"engine": 'env = {SGLANG_TOOL_STRICT_LEVEL = "2"}'},
            "engine.env: SGLANG_TOOL_STRICT_LEVEL cannot be set for",
        ),
        ({"more": '[[adapter]]\nname = "support"'}, "adapter.0.name and adapter.1.name are both 'support'"),
        ({"more": '[[serve]]\nname = "support"\npath = "x"'}, "adapter.0.name and serve.0.name are both 'support'"),
        ({"more": '[[serve]]\nname = "base"\npath = "x"'}, "model.served_name and serve.0.name are both 'base'"),
        ({"more": '[[serve]]\nname = "legal"'}, "serve.0.path is missing"),
        ({"more": '[serve]\nname = "legal"\npath = "x"'}, "serve: write [[serve]], with double"),
        ({"more": '[[adapter]]\nname = "b"\nrank = 17'}, "adapter.1.rank = 17 is above engine.max_lora_rank = 16"),
        ({"more": '[[adapter]]\nname = "b"\nshare = 0'}, "adapter.1.share: "),
        ({"more": '[[adapter]]\nname = "b"\npriority = "high"'}, "adapter.1.priority: "),
        (
            {"more": GUARD + '[[adapter]]\nname = "b"\n' + GUARD.replace("shadow", "adapter")},
            "adapter.1.guard and shadow.guard both have one called 'triage'",
        ),
        (
            {"more": '[[adapter]]\nname = "b"\n' + 2 * GUARD.replace("shadow", "adapter")},
            "adapter.1.guard: two guards have the same name",
        ),
        ({"more": "[shadow]\nmax_loss_ratio = 0"}, "shadow.max_loss_ratio: "),
        ({"more": "[shadow]\nmax_loss_ratio = inf"}, "shadow.max_loss_ratio: "),
        ({"more": "[shadow]\nconfidence = 95"}, "shadow.confidence: "),
        ({"more": "[shadow]\nmin_examples = 0"}, "shadow.min_examples: "),
        ({"more": "[shadow]\nwatch_s = 60"}, "shadow: watch_s = 60 without canary_share or mirror_share would see"),
        ({"more": "[shadow]\ncanary_share = 0.1"}, "shadow: canary_share and mirror_share are of a watch; set watch_s"),
        ({"more": "[shadow]\nwatch_s = 60\ncanary_share = 1"}, "shadow.canary_share: "),
        ({"more": "[shadow]\nwatch_s = inf\nmirror_share = 1"}, "shadow.watch_s: "),
        ({"more": "[shadow]\nmax_latency_ratio = 0.5"}, "shadow.max_latency_ratio: "),
        ({"more": "[shadow]\nrollback_window_s = -1"}, "shadow.rollback_window_s: "),
        ({"more": "[shadow]\ncontrol_share = 0"}, "shadow.control_share: "),
        ({"more": "[shadow]\nmin_users = 0"}, "shadow.min_users: "),
        ({"more": '[shadow]\ntoo_few_users = "reject"'}, "shadow.too_few_users: "),
        (
            {"more": "[shadow]\nwatch_s = 9\ncanary_share = 0.6\ncontrol_share = 0.6\nrollback_window_s = 9"},
            "shadow: canary_share and control_share are 1.2 together",
        ),
        ({"more": "[shadow]\nguard = 1"}, "shadow.guard: "),
        ({"more": GUARD + "max_loss_ratio = 0.9"}, "shadow.guard.0.max_loss_ratio: "),
        ({"more": GUARD.replace("triage", "../x")}, "shadow.guard.0.name: "),
        ({"more": '[[shadow.guard]]\nname = "x"'}, "shadow.guard.0.data is missing"),
        ({"more": GUARD + GUARD}, "shadow.guard: two guards have the same name"),
        ({"training": "eval_fraction = 1.0"}, "training.eval_fraction: "),
        ({"training": "seq_len = 0"}, "training.seq_len: "),
    ],
)
def test_a_value_that_cannot_be_used_says_where_and_why(tmp_path: Path, parts: dict[str, str], says: str) -> None:
    lines = refusal(tmp_path, **parts)
    assert len(lines) == 1
    assert lines[0].startswith(says)


@pytest.mark.parametrize("name", ["Support", "support--v1", "a@v1", ""])
def test_an_adapter_that_cannot_be_named_so_is_refused(tmp_path: Path, name: str) -> None:
    text = GOOD.format(engine="", training="", more="").replace('"support"', f'"{name}"')
    assert refusal(tmp_path, text)[0].startswith(f"adapter.0.name: {name!r} cannot name an adapter")


@pytest.mark.parametrize("name", ["tiny@live", "", "-x", "a b", "tiny:live", "s3://bucket/tiny"])
def test_a_name_that_users_could_not_ask_the_base_by_is_refused(tmp_path: Path, name: str) -> None:
    text = GOOD.format(engine="", training="", more="").replace('path = "base"', f'path = "b"\nserved_name = "{name}"')
    assert refusal(tmp_path, text)[0].startswith(f"model.served_name: {name!r} cannot name the base")


@pytest.mark.parametrize(
    ("asked", "kept"),
    [
        (["down_proj", "v_proj", "q_proj"], ("q_proj", "v_proj", "down_proj")),
        (["up_proj"], ("up_proj",)),
        (["o_proj", "o_proj"], ("o_proj",)),
    ],
)
def test_target_modules_are_kept_in_layer_order(tmp_path: Path, asked: list[str], kept: tuple[str, ...]) -> None:
    assert load(tmp_path, engine=f"target_modules = {json.dumps(asked)}").engine.target_modules == kept


def test_other_flags_and_variables_are_passed_on(tmp_path: Path) -> None:
    more = '[engine.extra_args]\nmax_total_tokens = 20000\n[engine.env]\nOMP_NUM_THREADS = "8"'
    engine = load(tmp_path, more=f'{more}\nSGLANG_RUST_SERVER = "0"').engine
    assert engine.extra_args == {"max_total_tokens": 20000}
    assert engine.env["OMP_NUM_THREADS"] == "8"


def test_an_adapter_has_its_own_files_or_the_sites(tmp_path: Path) -> None:
    more = (
        GUARD
        + """
[[adapter]]
name = "billing"
data = "private/billing.jsonl"
rank = 4
[[adapter.guard]]
name = "sums"
data = "guards/sums.jsonl"
[[adapter]]
name = "triage"
eval_data = "private/triage-eval.jsonl"
"""
    )
    config = load(tmp_path, training='eval_data = "private/eval.jsonl"', more=more)
    private = tmp_path / "private"
    assert config.adapters == ("support", "billing", "triage")
    assert [config.data(name) for name in config.adapters] == [
        private / "train.jsonl", private / "billing.jsonl", private / "train.jsonl",
    ]  # fmt: skip
    assert [config.eval_data(name) for name in config.adapters] == [
        private / "eval.jsonl", None, private / "triage-eval.jsonl",
    ]  # fmt: skip
    guards = [[guard.name for guard in config.policy(name).guard] for name in config.adapters]
    assert guards == [["triage"], ["triage", "sums"], ["triage"]]
    assert [config.max_rank(name) for name in config.adapters] == [16, 4, 16]
    assert config.slots == 6, "base, three live ones, a shadow, and one that is drained"


def test_data_is_needed_only_by_adapters_without_their_own(tmp_path: Path) -> None:
    text = GOOD.replace('data = "private/train.jsonl"\n', "").format(engine="", training="", more="")
    assert refusal(tmp_path, text) == ["training.data is missing, and adapter.0.data, too: support needs one"]
    own = text.replace('name = "support"', 'name = "support"\ndata = "own.jsonl"')
    assert load(tmp_path, own).data("support") == tmp_path / "own.jsonl"
