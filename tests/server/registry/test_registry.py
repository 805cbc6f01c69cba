"""The registry: versions are published once, resolved, read back, and numbered without gaps by two publishers."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from server.registry import views as registry_views
from server.registry.registry import AdapterRegistry
from server.registry.round_log import RoundState
from tests.toys.registry import PIN, begun, blob, grow, publish
from tests.toys.site import BASE, SHAPES
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import NotFound


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


def test_a_round_publishes_once(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    first = publish(registry, 1)
    again = registry.publish("support", blob(5), round=1, run_id="r", parent="p")
    assert again.ref == first
    assert registry.read(first)[0] == blob(1)


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


V1 = AdapterRef("support", 1)


def test_a_registry_can_be_moved_as_a_whole(tmp_path: Path) -> None:
    grow(begun(tmp_path / "here"), "a")
    shutil.move(tmp_path / "here", tmp_path / "there")
    registry = AdapterRegistry(tmp_path / "there")
    assert registry_views.verify(registry)["damages"] == []
    peft_dir.decode((registry.directory(V1) / "adapter_model.safetensors").read_bytes())
