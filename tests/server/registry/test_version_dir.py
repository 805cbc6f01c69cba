"""A version on disk: written whole, and every flipped bit is found and named."""

import os
import subprocess
from pathlib import Path

import pytest

from server.registry import views as registry_views
from server.registry.registry import AdapterRegistry
from tests.toys.registry import begun, blob, flip, grow, publish, v
from umbel.adapter import AdapterRef
from umbel.errors import RegistryError


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


V1 = AdapterRef("support", 1)


FILES = ["adapter_config.json", "adapter_model.safetensors", "manifest.json", "SHA256SUMS"]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_in_any_region_of_any_file_is_found_and_named(tmp_path: Path, name: str) -> None:
    registry = begun(tmp_path)
    grow(registry, "aa")
    path = registry.directory(V1) / name
    size = path.stat().st_size
    # The safetensors header, its length, the first and the last tensor, braces, keys, digits, line ends: all of them.
    for at in sorted(
        {0, 1, 7, 8, 9, size // 4, size // 3, size // 2, size - 2, size - 1, *range(0, size, 1 + size // 40)}
    ):
        for bit in (1, 32, 128):
            flip(path, at, bit)
            damages = registry_views.verify(registry)["damages"]
            assert len(damages) == 1, (at, bit)
            assert str(path.resolve()) in damages[0]
            with pytest.raises(RegistryError, match=path.resolve().name):
                registry.read(V1)
            flip(path, at, bit)
    assert registry_views.verify(registry) == {"versions": 3, "damages": []}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_is_missing_is_named(tmp_path: Path, name: str) -> None:
    registry = begun(tmp_path)
    path = (registry.directory(v(0)) / name).resolve()
    path.unlink()
    assert [damage for damage in registry.verify(v(0)) if str(path) in damage and "is missing" in damage]


def test_sha256sum_alone_can_check_a_version(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    check = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    assert subprocess.run(check, cwd=registry.directory(v(0)), capture_output=True, check=False).returncode == 0
    flip(registry.directory(v(0)) / "adapter_model.safetensors", 99)
    assert subprocess.run(check, cwd=registry.directory(v(0)), capture_output=True, check=False).returncode == 1
