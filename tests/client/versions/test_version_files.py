"""Files of versions: bad ones are refused before anything is stored, changed ones before anything is loaded."""

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from client.journal import Version
from client.versions.version_files import directory, to_load, verify
from tests.toys.deployment import BASE, HELD_BASE, RANK, Deployment, adapter, manifest_of, quick, run
from tests.toys.engine import ToyMachine, site_config
from umbel import peft_dir
from umbel.adapter import AdapterRef, Lifecycle
from umbel.errors import AdapterError, BaseMismatch, Conflict
from umbel.messages import ShadowReport
from umbel.site.config import SiteConfig

V1, V2, V3 = (AdapterRef("support", version) for version in (1, 2, 3))
REFUSALS: list[tuple[str, bytes, dict[str, Any], type[Exception], str]] = [
    ("NaN", adapter(9, value=np.nan), {}, AdapterError, "NaN"),
    ("infinity", adapter(9, value=np.inf), {}, AdapterError, "infinity"),
    ("shape", adapter(9, rank=RANK + 1), {}, AdapterError, "has shape"),
    ("rank", adapter(9, rank=5), {"rank": 5}, AdapterError, "rank 5 is not within 1..4"),
    ("dtype", adapter(9, ml_dtypes.bfloat16), {}, AdapterError, "is bfloat16; a version is float32, and this site"),
    ("base", adapter(9), {"base": "f" * 64}, BaseMismatch, f"this site holds {BASE.digest[:12]}"),
    ("kin", adapter(9), {"base": "f" * 64, "kin": "2" * 64}, BaseMismatch, "a base that was packed from it"),
    ("not mixed", adapter(9), {"base": "f" * 64}, BaseMismatch, "run with mixed-bases=true"),
    ("name", adapter(9), {"name": "other"}, AdapterError, "other@v9 is no version of support"),
    ("digest", adapter(9), {"digest": "f" * 64}, AdapterError, "not those of its manifest"),
    ("bytes", b"junk", {}, AdapterError, "not a safetensors file"),
    ("reused", adapter(9), {"version": 1}, Conflict, "support@v1 is already here with other weights"),
]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> ToyMachine:
    made = ToyMachine()
    quick(monkeypatch, made)
    return made


@pytest.mark.parametrize(
    ("blob", "changes", "error", "reason"), [c[1:] for c in REFUSALS], ids=[c[0] for c in REFUSALS]
)
def test_a_bad_adapter_is_refused_before_anything_is_stored_or_loaded(
    tmp_path: Path, machine: ToyMachine, blob: bytes, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    async def story(site: Deployment) -> None:
        await site.deploy(1)
        before, files, calls = site.after_a_kill(), sorted((tmp_path / "adapters").rglob("*")), machine.calls.copy()
        with pytest.raises(error, match=reason):
            site.deployer.receive(manifest_of(**{"version": 9, "blob": blob, **changes}), blob)
        await site.quiet()
        assert (site.after_a_kill(), sorted((tmp_path / "adapters").rglob("*"))) == (before, files)
        assert machine.calls == calls, "the engine has heard nothing of it"
        assert site.engine.answers("support") == "support@v1"
        assert [version.ref for version in site.journal.versions()] == [V1]

    run(tmp_path, machine, story)


def test_a_version_for_all_that_are_kin_is_served_whatever_base_it_names(tmp_path: Path, machine: ToyMachine) -> None:
    async def story(site: Deployment) -> None:
        ref = site.push(1, base="f" * 64, kin=HELD_BASE.kin)
        await site.judged(ref)
        await site.deployer.promote(ref, forced=True)
        assert site.engine.answers("support") == "support@v1"
        assert verify(site.config, site.journal.get(ref)) == directory(site.config, ref)

    run(tmp_path, machine, story)


@pytest.fixture
def config(tmp_path: Path) -> SiteConfig:
    return site_config(tmp_path)


@pytest.fixture
def stored(config: SiteConfig) -> Version:
    """A version whose files are as they were received."""
    blob = adapter(1)
    manifest = manifest_of(1, blob)
    peft_dir.write(directory(config, V1), blob, manifest, base="tiny")
    return Version(manifest, ShadowReport(ref=str(V1), state=Lifecycle.CANDIDATE))


def test_a_version_is_kept_as_the_engine_loads_it(tmp_path: Path) -> None:
    """Rounded to the engine's dtype, under the digest of what was rounded."""
    config, blob = site_config(tmp_path, dtype="bfloat16"), adapter(1)
    manifest = manifest_of(1, blob)
    stored, weights = to_load(config, manifest, blob)
    peft_dir.write(directory(config, V1), weights, stored, base="tiny")
    version = Version(manifest, ShadowReport(ref=str(V1), state=Lifecycle.CANDIDATE))
    assert weights == peft_dir.encode(peft_dir.rounded(peft_dir.decode(blob), "bfloat16"))
    assert (stored.digest, stored.rounding_of) == (peft_dir.digest(weights), manifest.digest)
    assert verify(config, version) == directory(config, V1)
    other = Version(manifest.model_copy(update={"digest": "f" * 64}), version.report)
    with pytest.raises(AdapterError, match="not the support@v1 that was received"):
        verify(config, other)
    assert to_load(config, stored, weights) == (stored, weights), "what is in its dtype already stays"


def test_what_the_dtype_of_the_engine_cannot_hold_is_refused(tmp_path: Path) -> None:
    blob = adapter(1, value=1e6)
    with pytest.raises(AdapterError, match="numbers that float16 cannot hold"):
        to_load(site_config(tmp_path, dtype="float16"), manifest_of(1, blob), blob)


def test_files_as_they_were_received_are_found(config: SiteConfig, stored: Version, tmp_path: Path) -> None:
    assert verify(config, stored) == tmp_path / "adapters" / "support-v1"


def test_files_of_another_version_are_refused(config: SiteConfig, stored: Version) -> None:
    other = Version(stored.manifest.model_copy(update={"round": 7}), stored.report)
    with pytest.raises(AdapterError, match="not the support@v1 that was received"):
        verify(config, other)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"r": 1}, "r is not 2"),
        ({"target_modules": ["q_proj"]}, "target_modules is"),
        ({"bias": "all"}, "bias is 'all'"),
    ],
)
def test_settings_that_would_have_the_engine_compute_something_else_are_refused(
    config: SiteConfig, stored: Version, change: dict[str, Any], reason: str
) -> None:
    settings(config, **change)
    with pytest.raises(AdapterError, match=reason):
        verify(config, stored)


def test_settings_may_lack_what_an_older_release_did_not_write_and_no_more(config: SiteConfig, stored: Version) -> None:
    settings(config, without="bias")
    verify(config, stored)
    settings(config, without="target_modules")
    with pytest.raises(AdapterError, match="target_modules is None"):
        verify(config, stored)


def settings(config: SiteConfig, without: str = "", **changes: Any) -> None:
    """Change `adapter_config.json`."""
    path = directory(config, V1) / peft_dir.CONFIG
    found = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in found.items() if key != without}))
