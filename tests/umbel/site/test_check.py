"""All files that a site file names are checked at once."""

import json
from pathlib import Path

import pytest

from tests.toys.sites.base_dir import write_base, write_shard
from tests.toys.sites.site_file import GOOD, GUARD, load
from umbel import peft_child
from umbel.errors import ConfigError, UnsupportedModel
from umbel.site.check import check_files, mistakes


def complete(folder: Path) -> None:
    """Make the files that GOOD names."""
    write_base(folder / "base")
    (folder / "private").mkdir(exist_ok=True)
    (folder / "private" / "train.jsonl").write_text("{}")


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
        ("base/model.safetensors", r"/base: no \*\.safetensors here \(the weights\); copy the whole"),
        ("base/tokenizer.json", r"/base: lacks tokenizer.json; copy the whole"),
    ],
)
def test_check_files_wants_a_whole_model(tmp_path: Path, gone: str, says: str) -> None:
    complete(tmp_path)
    (tmp_path / gone).unlink()
    with pytest.raises(ConfigError, match=says):
        check_files(load(tmp_path))


@pytest.mark.parametrize(
    ("files", "whole"),
    [
        (("tokenizer_config.json",), False),
        (("vocab.json",), False),
        (("vocab.json", "merges.txt"), True),
        (("tokenizer.model",), True),
    ],
)
def test_check_files_knows_what_makes_a_tokenizer(tmp_path: Path, files: tuple[str, ...], whole: bool) -> None:
    complete(tmp_path)
    (tmp_path / "base" / "tokenizer.json").unlink()
    for file in files:
        (tmp_path / "base" / file).write_text("{}")
    if whole:
        check_files(load(tmp_path))
    else:
        with pytest.raises(ConfigError, match=r"lacks tokenizer\.json"):
            check_files(load(tmp_path))


def test_check_files_says_all_that_is_wrong_with_a_base_at_once(tmp_path: Path) -> None:
    complete(tmp_path)
    base = write_base(tmp_path / "base", quantization_config={"quant_method": "awq"})
    (base / "generation_config.json").write_text("{")
    (base / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ConfigError) as error:
        check_files(load(tmp_path))
    assert [line.partition(": ")[0] for line in str(error.value).splitlines()] == [
        f"{base}/config.json", f"{base}/generation_config.json", f"{base}/model.safetensors"
    ]  # fmt: skip
    (base / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match=r"config.json: lacks hidden_size, intermediate_size, num_attention_heads,"):
        check_files(load(tmp_path))


@pytest.mark.parametrize(
    ("extra", "training", "fine"),
    [
        ("", "seq_len = 32", False),
        ("[engine.extra_args]\ncontext_length = 32", "seq_len = 32", True),
        ("[engine.extra_args]\n--context-length = 32", "seq_len = 32", True),
        ("[engine.extra_args]\ncontext_length = 32", "seq_len = 33", False),
        ("[engine.extra_args]\ncontext_length = 33", "seq_len = 32", False),
    ],
)
def test_a_base_with_a_sliding_window_is_fine_where_no_text_is_longer(
    tmp_path: Path, extra: str, training: str, fine: bool
) -> None:
    complete(tmp_path)
    write_base(
        tmp_path / "base", model_type="mistral", architectures=["MistralForCausalLM"], sliding_window=32
    )  # positions: 64
    config = load(tmp_path, more=extra, training=training)
    if fine:
        check_files(config)
    else:
        with pytest.raises(UnsupportedModel, match=r"set context_length = 32 in \[engine.extra_args\]"):
            check_files(config)


def test_a_variable_of_this_shell_that_the_engine_would_inherit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(tmp_path)
    monkeypatch.setenv("SGLANG_GRPC_PORT", "50051")
    with pytest.raises(ConfigError, match=r"^SGLANG_GRPC_PORT cannot be set for umbel's engine: "):
        check_files(load(tmp_path))
    check_files(load(tmp_path, more='[engine.env]\nSGLANG_GRPC_PORT = "0"'))


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


def test_adapters_that_are_only_served_are_looked_at_without_their_weights(tmp_path: Path) -> None:
    complete(tmp_path)
    served = '[[serve]]\nname = "legal"\npath = "legal"\n[[serve]]\nname = "code"\npath = "code"\n'
    config = load(tmp_path, more=served)
    module = "model.layers.0.self_attn.q_proj"
    shapes = {f"base_model.model.{module}.lora_A.weight": (2, 8), f"base_model.model.{module}.lora_B.weight": (8, 2)}
    settings = {"peft_type": "LORA", "r": 2, "layers_to_transform": [0], "target_modules": ["q_proj"]}
    for name in ("legal", "code"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
        write_shard(tmp_path / name / "adapter_model.safetensors", shapes)
    check_files(config)
    write_shard(
        tmp_path / "legal" / "adapter_model.safetensors", {**shapes, "base_model.model.lm_head.weight": (12, 8)}
    )
    (tmp_path / "code" / "adapter_config.json").write_text(json.dumps({**settings, "use_dora": True}))
    with pytest.raises(ConfigError) as error:
        check_files(config)
    assert [line.partition(" is ")[0] for line in str(error.value).splitlines()] == [
        f"[[serve]] legal: {tmp_path}/legal: base_model.model.lm_head.weight",
        f"[[serve]] code: {tmp_path}/code/adapter_config.json: use_dora",
    ]


def test_check_files_reads_every_file_of_users_keys_and_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(tmp_path)
    more = """
        [[adapter]]
        name = "triage"
        api_keys = "triage.keys"
        [[serve]]
        name = "legal"
        path = "legal"
        api_keys = "legal.keys"
    """
    site = 'api_keys = "site.keys"'

    def told() -> list[str]:
        return [str(one) for one in mistakes(load(tmp_path, engine=site, more=more)) if ".keys" in str(one)]

    for name, text, mode in (("site", "# none\n", 0o600), ("triage", "sk-triage-0123456789\n", 0o640)):
        (tmp_path / f"{name}.keys").write_text(text)
        (tmp_path / f"{name}.keys").chmod(mode)
    assert [line.partition(";")[0] for line in told()] == [
        f"[engine].api_keys: {tmp_path}/site.keys: holds no API key",
        f"[[adapter]] triage.api_keys: {tmp_path}/triage.keys: others can read the API keys",
        f"[[serve]] legal.api_keys: {tmp_path}/legal.keys: the API keys cannot be read (No such file or directory)",
    ]
    monkeypatch.setenv("UMBEL_SITE__SERVE", '[{"name": "legal", "path": "legal", "api_keys": "elsewhere.keys"}]')
    monkeypatch.setenv("UMBEL_SITE__ENGINE__API_KEYS", "other.keys")
    by_site, _, by_legal = told()
    assert by_site.startswith(f"UMBEL_SITE__ENGINE__API_KEYS: {tmp_path}/other.keys: ")
    assert by_legal.startswith(f"UMBEL_SITE__SERVE legal.api_keys: {tmp_path}/elsewhere.keys: ")
    for name in ("site", "triage", "other", "elsewhere"):
        (tmp_path / f"{name}.keys").write_text(f"sk-{name}-0123456789\n")
        (tmp_path / f"{name}.keys").chmod(0o600)
    assert told() == []


def test_settings_of_an_adapter_that_never_end_hold_up_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    complete(tmp_path)
    monkeypatch.setattr(peft_child, "LOOK_S", 3.0)
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    (tmp_path / "legal").mkdir()
    settings = {"peft_type": "LORA", "r": 2, "target_modules": "(" * 3 + "[a-z0-9_.]+" + ")+" * 3 + "!"}
    (tmp_path / "legal" / "adapter_config.json").write_text(json.dumps(settings))
    shapes = {f"{module}.lora_A.weight": (2, 8), f"{module}.lora_B.weight": (8, 2)}
    write_shard(tmp_path / "legal" / "adapter_model.safetensors", shapes)
    with pytest.raises(
        ConfigError, match=r"^\[\[serve\]\] legal: .* not read within 3 s; is a pattern of its settings"
    ):
        check_files(load(tmp_path, more='[[serve]]\nname = "legal"\npath = "legal"\n'))
