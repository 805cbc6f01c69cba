"""The site file: what is read, and what is said, one line per mistake, when it cannot be."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from scripts.tools.repository import REPOSITORY
from umbel.base import LINEARS
from umbel.config import SiteConfig
from umbel.errors import ConfigError, UnsupportedModel
from umbel.site_check import check_files
from umbel.site_sections import OWNED_FLAGS, UNSERVED_FLAGS

GOOD = """
[site]
name = "clinic-a"
state_dir = "state"
[model]
path = "base"
[[adapter]]
name = "support"
[engine]
port = 30000
{engine}
[training]
data = "private/train.jsonl"
{training}
{more}
"""
GUARD = '[[shadow.guard]]\nname = "triage"\ndata = "guards/triage.jsonl"\n'


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith("UMBEL_SITE__"):
            monkeypatch.delenv(name)


def load(folder: Path, text: str | None = None, **parts: str) -> SiteConfig:
    file = folder / "site.toml"
    file.write_text(text if text is not None else GOOD.format(**{"engine": "", "training": "", "more": "", **parts}))
    return SiteConfig.load(file)


def refusal(folder: Path, text: str | None = None, **parts: str) -> list[str]:
    """The lines of a refusal, each without the file's name that it begins with."""
    with pytest.raises(ConfigError) as error:
        load(folder, text, **parts)
    lines = str(error.value).splitlines()
    assert all(line.startswith(f"{folder / 'site.toml'}: ") for line in lines), lines
    return [line.removeprefix(f"{folder / 'site.toml'}: ") for line in lines]


def test_a_good_file_is_understood_with_paths_from_its_own_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/umbel")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = load(tmp_path, training='eval_data = "~/eval.jsonl"')
    assert config.site.state_dir == tmp_path / "state"
    assert config.model.path == tmp_path / "base"
    assert config.training.data == tmp_path / "private" / "train.jsonl"
    assert config.training.eval_data == Path("/home/umbel/eval.jsonl")
    assert config.socket == tmp_path / "state" / "site.sock"
    assert config.engine.target_modules == LINEARS


def test_absolute_paths_and_a_socket_of_its_own_stay_as_they_are(tmp_path: Path) -> None:
    text = GOOD.format(engine="", training="", more="").replace('"state"', '"/s"\nsocket = "/run/u.sock"')
    config = load(tmp_path, text)
    assert (config.site.state_dir, config.socket) == (Path("/s"), Path("/run/u.sock"))


def test_guards_are_named_files_from_the_site_files_folder(tmp_path: Path) -> None:
    more = GUARD + GUARD.replace("triage", "letters") + "max_loss_ratio = 1.2"
    guards = load(tmp_path, more=more).shadow.guard
    assert [(guard.name, guard.data, guard.max_loss_ratio) for guard in guards] == [
        ("triage", tmp_path / "guards" / "triage.jsonl", 1.01),
        ("letters", tmp_path / "guards" / "letters.jsonl", 1.2),
    ]


def test_the_environment_wins_over_the_file_key_by_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_SITE__ENGINE__PORT", "30001")
    monkeypatch.setenv("UMBEL_SITE__SITE__NAME", "clinic-b")
    config = load(tmp_path, engine="max_lora_rank = 32")
    assert (config.engine.port, config.engine.max_lora_rank, config.site.name) == (30001, 32, "clinic-b")


@pytest.mark.parametrize(
    ("name", "value", "line"),
    [
        ("UMBEL_SITE__ENGINE__PROT", "1", "is no setting of a site; did you mean UMBEL_SITE__ENGINE__PORT?"),
        ("UMBEL_SITE__ENGIN__PORT", "1", "is no setting of a site; did you mean UMBEL_SITE__ENGINE__PORT?"),
        ("UMBEL_SITE__ZZZ", "1", "is no setting of a site; unset it"),
        ("UMBEL_SITE__ENGINE__ENV__OMP_NUM_THREADS", "1", "write it into [engine.env], or set UMBEL_SITE__ENGINE__ENV"),
        ("UMBEL_SITE__ENGINE__PORT", "many", "engine.port: Input should be a valid integer"),
        ("UMBEL_SITE__SLO__TTFT_MS", "inf", "slo.ttft_ms: Input should be a finite number"),
        ("UMBEL_SITE__ENGINE", "many", "not JSON; see "),
        ("UMBEL_SITE__ENGINE__ENV", "{", "not JSON; see "),
        ("UMBEL_SITE__ADAPTER", '{"name": "x"}', "adapter: write [[adapter]], with double brackets"),
    ],
)
def test_a_variable_that_is_wrong_is_named_and_not_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str, line: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as error:
        load(tmp_path)
    assert str(error.value).startswith(f"{name}: {line}"), error.value
    assert "\n" not in str(error.value)
    monkeypatch.delenv(name)
    load(tmp_path)


def test_mistakes_of_the_file_and_of_variables_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UMBEL_SITE__ENGINE__SLOTS", "1")
    monkeypatch.setenv("UMBEL_SITE__ENGINE__SLOT", "9")
    with pytest.raises(ConfigError) as error:
        load(tmp_path, training="seq_len = 0")
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        "UMBEL_SITE__ENGINE__SLOT", "UMBEL_SITE__ENGINE__SLOTS", f"{tmp_path}/site.toml",
    ]  # fmt: skip


def test_a_loaded_configuration_cannot_be_changed(tmp_path: Path) -> None:
    config = load(tmp_path)
    with pytest.raises(ValueError, match="frozen"):
        config.engine.port = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.engine = config.engine  # type: ignore[misc]


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
            "watch_s, canary_share, mirror_share, min_requests, max_latency_ratio, rollback_window_s, warm_prefixes, "
            "guard",
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
    text = GOOD.replace('data = "private/train.jsonl"\n', "").replace("30000", "0")
    lines = refusal(tmp_path, text.format(engine='dtype = "int4"', training="share_cap = 2", more=""))
    assert [line.split(" ")[0].rstrip(":") for line in lines] == [
        "engine.port", "engine.dtype", "training.data", "training.share_cap",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("parts", "says"),
    [
        ({"engine": 'target_modules = ["q_proj"]'}, "engine.target_modules: SGLang needs q_proj and v_proj together"),
        ({"engine": 'target_modules = ["k_proj", "v_proj"]'}, "engine.target_modules: SGLang needs q_proj and v_proj"),
        ({"engine": "target_modules = []"}, "engine.target_modules: nothing cannot be adapted; choose from q_proj"),
        ({"engine": 'target_modules = ["lm_head"]'}, "engine.target_modules: lm_head cannot be adapted; choose from"),
        ({"engine": "slots = 4"}, "engine.slots: "),
        ({"engine": "max_lora_rank = 0"}, "engine.max_lora_rank: "),
        ({"engine": "drain_s = inf"}, "engine.drain_s: Input should be a finite number"),
        ({"more": "[slo]\nttft_ms = inf"}, "slo.ttft_ms: Input should be a finite number"),
        ({"more": "[slo]\ntpot_ms = nan"}, "slo.tpot_ms: Input should be a finite number"),
        ({"more": '[shadow.guard]\nname = "x"\ndata = "y"'}, "shadow.guard: write [[shadow.guard]], with double"),
        ({"engine": "port = 1"}, "not TOML: Cannot overwrite a value"),
        ({"engine": 'env = {SGLANG_RUST_SERVER = "1"}'}, "engine.env: SGLANG_RUST_SERVER replaces the HTTP server"),
        ({"more": '[[adapter]]\nname = "second"'}, "adapter: "),
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


def test_base_and_adapter_cannot_share_a_name(tmp_path: Path) -> None:
    text = GOOD.format(engine="", training="", more="").replace('path = "base"', 'path = "b"\nserved_name = "support"')
    assert refusal(tmp_path, text) == [
        "model.served_name and adapter.0.name are both 'support'; users could not tell them apart, so give the base "
        "another served_name"
    ]


def test_single_brackets_for_an_adapter_say_what_to_write(tmp_path: Path) -> None:
    text = GOOD.format(engine="", training="", more="").replace("[[adapter]]", "[adapter]")
    assert refusal(tmp_path, text) == ["adapter: write [[adapter]], with double brackets: it is a list of tables"]


@pytest.mark.parametrize("name", ["tiny@live", "", "-x", "a b"])
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


@pytest.mark.parametrize("flag", OWNED_FLAGS)
@pytest.mark.parametrize("spelling", ["{}", "--{}"])
def test_a_flag_that_umbel_sets_is_refused_in_every_spelling(tmp_path: Path, flag: str, spelling: str) -> None:
    for written in (flag, flag.replace("_", "-")):
        key = json.dumps(spelling.format(written))
        (line,) = refusal(tmp_path, more=f"[engine.extra_args]\n{key} = 1")
        assert line == f"engine.extra_args: {json.loads(key)} is set by {OWNED_FLAGS[flag]}; remove it here"


@pytest.mark.parametrize(("flag", "only"), UNSERVED_FLAGS.items())
def test_a_flag_that_cannot_be_served_is_refused_unless_it_changes_nothing(
    tmp_path: Path, flag: str, only: Any
) -> None:
    (line,) = refusal(tmp_path, more=f'[engine.extra_args]\n{flag} = "other"')
    assert line == f"engine.extra_args: {flag} = 'other' cannot be served by umbel yet; only {only!r} can"
    if only is not None:
        more = f"[engine.extra_args]\n{flag} = {json.dumps(only)}"
        assert load(tmp_path, more=more).engine.extra_args == {flag: only}


def test_other_flags_and_variables_are_passed_on(tmp_path: Path) -> None:
    more = '[engine.extra_args]\nmax_total_tokens = 20000\n[engine.env]\nOMP_NUM_THREADS = "1"'
    engine = load(tmp_path, more=f'{more}\nSGLANG_RUST_SERVER = "0"').engine
    assert engine.extra_args == {"max_total_tokens": 20000}
    assert engine.env["OMP_NUM_THREADS"] == "1"


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


def complete(folder: Path) -> None:
    """What GOOD points to."""
    (folder / "base").mkdir(exist_ok=True)
    (folder / "private").mkdir(exist_ok=True)
    (folder / "base" / "config.json").write_text('{"model_type": "llama"}')
    for file in ("base/model.safetensors", "base/tokenizer.json", "private/train.jsonl"):
        (folder / file).write_text("{}")


def test_check_files_names_all_that_is_missing_and_what_to_do(tmp_path: Path) -> None:
    config = load(tmp_path, training='eval_data = "eval.jsonl"', more=GUARD)
    with pytest.raises(ConfigError) as error:
        check_files(config)
    assert [line.removesuffix("; point it to a JSONL file") for line in str(error.value).splitlines()] == [
        f"{tmp_path}/base: no base model here; expected a Hugging Face model directory with config.json",
        f"[training].data: {tmp_path}/private/train.jsonl does not exist",
        f"[training].eval_data: {tmp_path}/eval.jsonl does not exist",
        f"[[shadow.guard]] triage: {tmp_path}/guards/triage.jsonl does not exist",
    ]
    complete(tmp_path)
    (tmp_path / "eval.jsonl").write_text("{}")
    (tmp_path / "guards").mkdir()
    (tmp_path / "guards" / "triage.jsonl").write_text("{}")
    check_files(config)
    (tmp_path / "base" / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(UnsupportedModel, match="gpt2"):
        check_files(config)


@pytest.mark.parametrize(
    ("gone", "says"),
    [
        ("base/model.safetensors", r"\[model\].path: .*/base lacks \*\.safetensors \(the weights\); copy the whole"),
        ("base/tokenizer.json", r"\[model\].path: .*/base lacks tokenizer.json; copy the whole"),
    ],
)
def test_check_files_wants_a_whole_model(tmp_path: Path, gone: str, says: str) -> None:
    complete(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(ConfigError, match=says):
        check_files(load(tmp_path))


def test_check_files_wants_a_folder_for_its_state_and_a_short_socket(tmp_path: Path) -> None:
    complete(tmp_path)
    (tmp_path / "state").write_text("")
    with pytest.raises(ConfigError, match=r"^\[site\].state_dir: .*/state is a file; name a folder"):
        check_files(load(tmp_path))
    text = GOOD.format(engine="", training="", more="").replace('"state"', f'"{"s" * 100}"')
    with pytest.raises(ConfigError, match="longer than a Unix socket's path may be; choose a shorter"):
        check_files(load(tmp_path, text))


def test_check_files_reads_the_key_that_is_trusted(tmp_path: Path) -> None:
    complete(tmp_path)
    text = GOOD.format(engine="", training="", more="").replace('"state"', '"state"\ntrusted_key = "centre.pub"')
    config = load(tmp_path, text)
    assert config.site.trusted_key == tmp_path / "centre.pub"
    with pytest.raises(ConfigError, match=f"^{tmp_path}/centre.pub: the key cannot be read"):
        check_files(config)
    (tmp_path / "centre.pub").write_text("no key")
    with pytest.raises(ConfigError, match=f"^{tmp_path}/centre.pub: not an Ed25519 public key"):
        check_files(config)


def test_check_files_reads_the_key_that_updates_are_signed_with(tmp_path: Path) -> None:
    complete(tmp_path)
    text = GOOD.format(engine="", training="", more="").replace('"state"', '"state"\nsigning_key = "updates.key"')
    config = load(tmp_path, text)
    assert config.site.signing_key == tmp_path / "updates.key"
    with pytest.raises(ConfigError, match=f"^{tmp_path}/updates.key: the key cannot be read"):
        check_files(config)
    (tmp_path / "updates.key").write_text("no key")
    with pytest.raises(ConfigError, match=f"^{tmp_path}/updates.key: others can read the private key"):
        check_files(config)


def test_the_page_of_settings_is_up_to_date() -> None:
    from scripts.tools import configuration_md

    assert configuration_md.render() == configuration_md.TARGET.read_text(), "run scripts/tools/configuration_md.py"


def test_the_example_in_the_readme_loads(tmp_path: Path) -> None:
    (example,) = re.findall(r"```toml\n(.*?)```", (REPOSITORY / "README.md").read_text(), flags=re.DOTALL)
    config = load(tmp_path, example)
    assert (config.site.name, config.adapter[0].name, config.engine.port) == ("clinic-a", "support", 30000)
