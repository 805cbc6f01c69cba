"""`umbel adapter …`, each command as a process of its own, as an operator types it."""

import importlib.util
import json
from pathlib import Path

import pytest

from tests.toys.command_line import refusal, umbel

if not importlib.util.find_spec("flwr"):
    pytest.skip("the registry is in Flower's environment", allow_module_level=True)

from server.registry.registry import AdapterRegistry
from tests.toys.registry import begun, flip, grow, publish
from umbel.adapter import AdapterRef


@pytest.fixture
def root(tmp_path: Path) -> Path:
    registry = begun(tmp_path / "r")
    grow(registry, "aaro")
    registry.close()
    return tmp_path / "r"


def said(command: str, root: Path, *arguments: str | Path) -> str:
    """Return the output of a command that succeeds."""
    ended = umbel("adapter", command, "--registry", root, *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def test_ls_and_show_print_what_is_there(root: Path) -> None:
    lines = said("ls", root).splitlines()
    assert [line.split()[0] for line in lines] == [f"support@v{version}" for version in range(5)]
    assert lines[2].endswith("head, live")
    assert lines[3].endswith("rejected")
    rows = json.loads(said("ls", root, "--json"))
    assert rows[1]["aliases"] == ["previous"]
    assert rows[4]["aliases"] == ["shadow"]
    assert json.loads(said("show", root, "support@live"))["weights"] == {"a": 0.25, "b": 0.75}
    assert "'support@v7' is not in" in refusal("adapter", "show", "--registry", root, "support@v7")


def test_diff_and_lineage_tell_versions_apart(root: Path, tmp_path: Path) -> None:
    text = said("diff", root, "support@v1", "support@live")
    assert "version: 1 → 2" in text
    assert "relative distance" in text
    assert json.loads(said("diff", root, "support@v1", "support@v1", "--json"))["fields"] == {}
    assert said("lineage", root, "support").count("\n") == 5
    assert said("lineage", root, "support", "--picture", tmp_path / "l.svg") == f"{tmp_path / 'l.svg'}\n"
    assert (tmp_path / "l.svg").read_text().count("support@v") >= 4


def test_alias_and_rollback_need_a_reason_and_keep_it(root: Path) -> None:
    for command in (["alias", "support@v1", "stable"], ["rollback", "support"]):
        assert "say why" in refusal("adapter", *command, "--registry", root)
    assert said("alias", root, "support@v1", "stable", "--why", "audit") == "support@stable is support@v1\n"
    rolled = umbel("adapter", "rollback", "support", "--registry", root, "--why", "worse answers")
    assert "training goes on from support@v1" in rolled.stdout
    assert "support@v4 is being judged, and will be promoted if" in rolled.stderr, "when its round began is not known"
    assert said("alias", root, "support", "stable", "--remove", "--why", "over") == "support@stable is removed\n"
    history = said("alias", root, "support").splitlines()
    assert len(history) == 6
    assert "head → v1, live → v1" in history[4]
    assert history[4].endswith("worse answers")
    assert json.loads(said("alias", root, "support", "--json"))[-1]["to"] == {"stable": None}
    assert AdapterRegistry(root).resolve("support@head") == AdapterRef("support", 1)


def test_verify_names_the_file_and_ends_with_1(root: Path) -> None:
    assert said("verify", root) == "5 versions read, 0 damaged files\n"
    config = root / "support" / "v000002" / "adapter_config.json"
    flip(config, 30)
    ended = umbel("adapter", "verify", "--registry", root)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[0].startswith(f"{config}: its sha256 is not the one that was published")
    assert said("verify", root, "support@v1") == "1 versions read, 0 damaged files\n"


def test_export_gc_and_reindex(root: Path, tmp_path: Path) -> None:
    assert said("export", root, "support@live", tmp_path / "out", "--base", "org/base") == f"{tmp_path / 'out'}\n"
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
    assert said("gc", root).splitlines()[0] == "would remove the weights of support@v3"
    assert len(list((root / "blobs").iterdir())) == 5
    assert said("gc", root, "--yes").splitlines()[0] == "removed the weights of support@v3"
    assert len(list((root / "blobs").iterdir())) == 4
    (root / "registry.sqlite").unlink()
    listed = umbel("adapter", "ls", "--registry", root)
    assert len(listed.stdout.splitlines()) == 5
    assert "events.jsonl is missing" in listed.stderr
    assert said("reindex", root).splitlines()[-1] == "5 versions listed, 0 things not restored"


def test_show_and_export_say_which_kinds_of_base_trained_a_version(tmp_path: Path) -> None:
    registry = begun(tmp_path / "r")
    publish(registry, 1, bases={"bfloat16": 0.4, "nf4": 0.6}, kin="1" * 64)
    registry.close()
    assert json.loads(said("show", tmp_path / "r", "support@v1"))["bases"] == {"bfloat16": 0.4, "nf4": 0.6}
    assert "bases: None → " in said("diff", tmp_path / "r", "support@v0", "support@v1")
    (tmp_path / "base").mkdir()
    recipe = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}
    (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": recipe}))
    for base, warned in (("org/base", False), (tmp_path / "base", True)):
        into = tmp_path / f"out-{warned}"
        ended = umbel("adapter", "export", "--registry", tmp_path / "r", "support@v1", into, "--base", base)
        assert (ended.returncode, ended.stdout) == (0, f"{into}\n")
        assert ended.stderr.startswith("support@v1: trained on nf4 (0.6) and bfloat16 (0.4); on the other") == warned
        assert bool(ended.stderr) == warned


def test_an_alias_that_is_not_there_is_not_removed(root: Path) -> None:
    refused = refusal("adapter", "alias", "support", "nothing", "--remove", "--why", "x", "--registry", root)
    assert refused == f"support@nothing is not in {root}; there is head, live"


def test_a_picture_that_cannot_be_written_says_where(root: Path, tmp_path: Path) -> None:
    refused = refusal("adapter", "lineage", "support", "--picture", tmp_path / "no" / "l.svg", "--registry", root)
    assert refused.endswith("l.svg: cannot be written (No such file or directory); name a file in a folder")


def test_reindex_ends_with_1_when_something_was_not_restored(root: Path) -> None:
    (root / "support" / "v000002" / "manifest.json").write_text("{")
    ended = umbel("adapter", "reindex", "--registry", root)
    assert ended.returncode == 1
    assert ended.stdout.splitlines()[-1] == "4 versions listed, 1 things not restored"


def test_verify_names_what_is_none_of_the_registrys_and_a_half_copied_version_and_ends_with_1_for_the_latter(
    root: Path,
) -> None:
    (root / "support" / "old.bak").mkdir()
    named = said("verify", root).splitlines()
    assert named[0].startswith(
        f"{root / 'support' / 'old.bak'}: is none of the registry's; nothing reads it; move it out"
    )
    assert named[1] == "5 versions read, 0 damaged files"
    (root / "support" / "v000005").mkdir()
    for command in ("verify", "reindex"):
        ended = umbel("adapter", command, "--registry", root)
        assert ended.returncode == 1
        assert f"{root / 'support' / 'v000005'}: not an adapter version" in ended.stdout
        assert f"move it out of {root}, then `umbel adapter reindex`" in ended.stdout
    assert len(said("ls", root).splitlines()) == 5
    kept = said("gc", root, "--yes").splitlines()
    assert kept[0] == "removed the weights of support@v3"
    assert kept[1].startswith("kept weights that no version here names, because of")
