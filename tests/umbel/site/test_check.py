"""All files that a site file names are checked at once."""

from pathlib import Path

import pytest

from tests.toys.sites.site_file import GOOD, GUARD, load
from umbel.errors import ConfigError, UnsupportedModel
from umbel.site.check import check_files


def complete(folder: Path) -> None:
    """Make the files that GOOD names."""
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
