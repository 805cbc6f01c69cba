"""The blob store: equal weights are kept once, here or in an object store (S3, spoken by moto's server)."""

import secrets
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from server.registry import retention
from server.registry import views as registry_views
from server.registry.peft import export as adapter_export
from server.registry.registry import AdapterRegistry
from tests.toys.registry import begun, blob, grow, publish, v
from umbel import peft_dir
from umbel.adapter import AdapterRef
from umbel.errors import Conflict, NotFound, RegistryError

V0, V1 = (AdapterRef("support", version) for version in (0, 1))


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty place in a bucket."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    files = fsspec.filesystem("s3", skip_instance_cache=True)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    name = f"adapters-{secrets.token_hex(4)}"  # moto's buckets outlive its server
    files.mkdir(name)
    yield f"s3://{name}/umbel"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    server.stop()


def test_versions_are_published_to_s3_and_read_back_by_another_process(tmp_path: Path, bucket: str) -> None:
    registry = begun(tmp_path / "r", blobs=bucket)
    assert publish(registry, 1) == V1
    registry.accept("support", 1, "r", {})
    assert not (tmp_path / "r" / "blobs").exists()
    registry.close()
    again = AdapterRegistry(tmp_path / "r")
    assert again.blobs.url == bucket
    assert again.read(again.resolve("support@live"))[0] == blob(1)
    assert registry_views.verify(again) == {"versions": 2, "damages": []}
    exported = adapter_export.export(again, V1, tmp_path / "out")
    assert (exported / peft_dir.WEIGHTS).read_bytes() == blob(1)
    assert not (exported / peft_dir.WEIGHTS).is_symlink()
    with pytest.raises(Conflict, match="keeps its weights at s3://adapters-"):
        AdapterRegistry(tmp_path / "r", blobs="s3://elsewhere")


def test_a_flipped_bit_and_a_lost_object_in_s3_are_found_and_named(tmp_path: Path, bucket: str) -> None:
    registry = begun(tmp_path, blobs=bucket)
    digest = registry.manifest(V0).digest
    files = fsspec.filesystem("s3")
    content = bytearray(files.cat_file(f"{bucket}/{digest}"))
    content[-1] ^= 1
    files.pipe_file(f"{bucket}/{digest}", bytes(content))
    (damage,) = registry.verify(V0)
    assert damage.startswith(f"{bucket}/{digest}: its sha256")
    files.rm_file(f"{bucket}/{digest}")
    with pytest.raises(RegistryError, match=f"{bucket}/{digest} is missing"):
        registry.read(V0)


def test_gc_empties_the_bucket_of_what_nothing_refers_to(tmp_path: Path, bucket: str) -> None:
    registry = begun(tmp_path, blobs=bucket)
    _, rejected = grow(registry, "ar")
    registry.blobs.put(b"left by a killed publisher")
    garbage = retention.collect(registry, who="eva", why="test")
    assert garbage.versions == (rejected,)
    assert len(garbage.blobs) == 2
    kept = {registry.manifest(ref).digest for ref in (V0, V1)}
    assert set(registry.blobs.digests()) == kept
    assert {path.rsplit("/", 1)[-1] for path in fsspec.filesystem("s3").find(bucket, refresh=True)} == kept


def test_the_index_is_made_anew_from_files_here_and_weights_there(tmp_path: Path, bucket: str) -> None:
    grow(begun(tmp_path, blobs=bucket), "a")
    (tmp_path / "registry.sqlite").unlink()
    again = AdapterRegistry(tmp_path)
    assert again.read(again.resolve("support@live"))[0] == blob(1)
    again.close()
    for name in ("registry.sqlite", "registry.json"):
        (tmp_path / name).unlink()
    with pytest.raises(RegistryError, match="weights are not here; restore it, or say where"):
        AdapterRegistry(tmp_path)
    told = AdapterRegistry(tmp_path, create=True, blobs=bucket)
    assert told.read(told.resolve("support@live"))[0] == blob(1)


def test_a_url_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RegistryError, match=r"nowhere://x: not a place for weights"):
        AdapterRegistry(tmp_path, create=True, blobs="nowhere://x")
    assert list(tmp_path.iterdir()) == []


def test_equal_weights_are_kept_once_and_a_version_is_found_by_its_content(tmp_path: Path) -> None:
    registry = begun(tmp_path)
    first = publish(registry, 7)
    registry.publish("support", blob(7), round=8, run_id="r", parent="p")
    digest = registry.manifest(first).digest
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == sorted(
        [digest, registry.manifest(v(0)).digest]
    )
    assert registry.resolve(f"support@sha256:{digest[:12]}") == v(2), "the newest version with this content"
    with pytest.raises(NotFound):
        registry.resolve(f"support@sha256:{digest[:7]}")
