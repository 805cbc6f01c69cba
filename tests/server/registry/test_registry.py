"""The registry on disk: immutable versions, two aliases, and an index that a crash cannot part from the files."""

import os
import sqlite3
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from server.registry.index import VersionIndex
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.registry import PIN, begun, blob, publish
from tests.toys.site import BASE, SHAPES
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import AdapterError, BaseMismatch, ConfigError, Conflict, NotFound, RegistryError
from umbel.messages import Hello


def test_first_version_is_pefts_untrained_adapter_and_head_but_not_live(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    assert registry.aliases("support") == {"head": AdapterRef("support", 0)}
    with pytest.raises(NotFound, match=r"support@live.*support@head, support@v0"):
        registry.resolve("support@live")
    tensors = load_file(registry.directory(AdapterRef("support", 0)) / "adapter_model.safetensors")
    peft_dir.validate(tensors, SHAPES, rank=2, max_rank=2)
    for module, (a, b) in peft_dir.factors(tensors).items():
        bound = 1 / np.sqrt(SHAPES[module][1])
        assert not b.any()
        assert 0 < np.abs(a).max() <= bound
    registry.begin("support", PIN, seed=99)
    assert len(registry.versions("support")) == 1


def test_versions_are_published_resolved_and_read_back(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    ref = publish(registry, 1)
    assert ref == AdapterRef("support", 1)
    assert registry.resolve("support@v1") == ref
    content, manifest = registry.read(ref)
    assert content == blob(1)
    assert (manifest.round, manifest.lineage, manifest.base) == (1, registry.lineage, BASE.digest)
    assert registry.resolve("support@head") == AdapterRef("support", 0)
    registry.accept("support", 1, "r", {"a": "fine"})
    assert registry.resolve("support@head") == registry.resolve("support@live") == ref
    assert [entry[0].version for entry in registry.history("support", "head")] == [0, 1]
    assert registry.rounds.find("support", 1).state is RoundState.PROMOTED
    for unknown in ("support@v2", "support", "other@head", "support@latest"):
        with pytest.raises(NotFound):
            registry.resolve(unknown)


def test_lineage_outlives_the_process_and_differs_between_registries(tmp_path: Path) -> None:
    one = begun(tmp_path / "one")
    assert AdapterRegistry(tmp_path / "one").lineage == one.lineage
    assert begun(tmp_path / "two").lineage != one.lineage


def test_a_flipped_bit_and_a_changed_manifest_are_detected(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    ref = publish(registry, 1)
    weights = registry.directory(ref) / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(RegistryError, match=r"sha256 is not the manifest's.*restore"):
        registry.read(ref)
    weights.write_bytes(blob(1))
    manifest = registry.directory(ref) / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"round": 1', '"round": 7'))
    with pytest.raises(RegistryError, match="not the one that was published"):
        registry.read(ref)


def test_a_round_publishes_once(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    first = publish(registry, 1)
    again = registry.publish("support", blob(5), round=1, run_id="r", parent="p")
    assert again.ref == first
    assert registry.read(first)[0] == blob(1)


def test_a_version_written_before_a_crash_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = begun(tmp_path)
    registry.rounds.record("support", 1, "r", RoundState.TRAINING)

    def killed(self: VersionIndex, manifest: object, sums: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(VersionIndex, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, 1)
    assert len(registry.versions("support")) == 1
    reopened = AdapterRegistry(tmp_path)
    assert [manifest.version for manifest in reopened.versions("support")] == [0, 1]
    record = reopened.rounds.find("support", 1)
    assert (record.state, record.version) == (RoundState.PUBLISHED, 1)
    assert publish(reopened, 2) == AdapterRef("support", 2)


def test_a_crash_while_files_are_written_leaves_nothing_that_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = begun(tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            publish(registry, 1)
    assert len(AdapterRegistry(tmp_path).versions("support")) == 1
    assert publish(registry, 1) == AdapterRef("support", 1)


def test_two_publishers_get_two_versions(tmp_path: Path) -> None:
    begun(tmp_path).close()
    refs: list[AdapterRef] = []

    def run(offset: int) -> None:
        own = AdapterRegistry(tmp_path)
        refs.extend(publish(own, offset + i) for i in range(4))
        own.close()

    threads = [threading.Thread(target=run, args=(offset,)) for offset in (1, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ref.version for ref in refs) == list(range(1, 9))


def test_only_one_run_at_a_time(tmp_path: Path) -> None:
    registry, other = begun(tmp_path), AdapterRegistry(tmp_path)
    slept: list[float] = []
    waiting = other.exclusive(3, clock=lambda: sum(slept), sleep=slept.append)
    with registry.exclusive(0), pytest.raises(RegistryError, match="another run"):
        waiting.__enter__()
    assert sum(slept) == 3
    with other.exclusive(0):
        pass


def test_runs_keep_their_first_round_and_a_new_run_goes_on_after_them(tmp_path: Path) -> None:
    rounds = begun(tmp_path).rounds
    assert rounds.begin_run("one", "support", "plan") == 1
    rounds.record("support", 1, "one", RoundState.FAILED, reasons={"*": "x"})
    rounds.record("support", 2, "one", RoundState.TRAINING)
    assert rounds.begin_run("one", "support", "plan") == 1
    assert rounds.begin_run("two", "support", "another plan") == 3
    closed = rounds.find("support", 2)
    assert closed.state is RoundState.FAILED
    assert "run one ended" in closed.reasons["*"]


def test_a_new_run_with_the_same_plan_takes_over_the_round_in_training(tmp_path: Path) -> None:
    rounds = begun(tmp_path).rounds
    rounds.begin_run("one", "support", "plan")
    rounds.record("support", 1, "one", RoundState.TRAINING)
    assert rounds.begin_run("two", "support", "plan") == 1
    assert rounds.find("support", 1).state is RoundState.TRAINING


def test_missing_and_foreign_registries_are_said_so(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match="no adapter registry here"):
        AdapterRegistry(tmp_path / "none")
    one, two = begun(tmp_path / "one"), begun(tmp_path / "two")
    publish(one, 1)
    one.directory(AdapterRef("support", 1)).rename(two.directory(AdapterRef("support", 1)))
    with pytest.raises(RegistryError, match="of another registry"):
        AdapterRegistry(tmp_path / "two")
    assert sqlite3.connect(tmp_path / "two" / "registry.sqlite").execute("PRAGMA journal_mode").fetchone() == ("wal",)


def hello(**changes: object) -> Hello:
    facts = {
        "site": "b", "adapters": ("support",), "fingerprint": BASE, "shapes": SHAPES, "dtype": "float32",
        "max_lora_rank": 8, "train_examples": 1, "eval_examples": 1, "live": {},
    }  # fmt: skip
    return Hello(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"fingerprint": BASE.model_copy(update={"tokenizer": "other"})}, BaseMismatch, "tokenizer differ"),
        ({"shapes": {**SHAPES, "model.layers.0.mlp.up_proj": (3, 3)}}, AdapterError, "up_proj differs"),
        ({"dtype": "bfloat16"}, AdapterError, r"serves in bfloat16.*\[engine\]\.dtype"),
        ({"adapters": ("suport",)}, ConfigError, "did you mean adapter='suport'"),
    ],
)
def test_a_site_that_does_not_match_the_pin_is_refused(changes: dict, error: type[Exception], reason: str) -> None:
    PIN.require(hello(), "support")
    with pytest.raises(error, match=reason):
        PIN.require(hello(**changes), "support")


def test_a_rule_without_mixed_ranks_needs_sites_that_hold_the_whole_rank() -> None:
    PIN.require_rank(hello())
    PIN.require(hello(max_lora_rank=1), "support")
    with pytest.raises(AdapterError, match=r"max_lora_rank"):
        PIN.require_rank(hello(max_lora_rank=1))


def test_another_pin_is_a_conflict(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    with pytest.raises(Conflict, match="pinned to another base"):
        registry.begin("support", PIN.model_copy(update={"rank": 4}), seed=3)
