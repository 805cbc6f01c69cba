"""A warning where a CPU would emulate the site's number format."""

from pathlib import Path

import pytest

from umbel.site import slow_dtype as module
from umbel.site.config import SiteConfig
from umbel.site.slow_dtype import slow_dtype
from umbel.site.template import site_toml

OLD = "fpu sse2 avx2 avx512f avx512_vnni"


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without an accelerator, in a folder: what its `dev` and `cpuinfo` say."""
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(module, "DEVICES", tmp_path / "dev")
    monkeypatch.setattr(module, "CPUINFO", tmp_path / "cpuinfo")
    return tmp_path


def told(machine: Path, flags: str, key: str = "flags\t\t", **engine: str) -> str | None:
    (machine / "cpuinfo").write_text(f"processor\t: 0\n{key}: {flags}\nbugs\t\t: spectre_v1\n\nprocessor\t: 1\n")
    (machine / "site.toml").write_text(site_toml({"engine": engine}))
    return slow_dtype(SiteConfig.load(machine / "site.toml"))


def test_a_cpu_that_emulates_the_default_is_told_of_with_the_remedy(machine: Path) -> None:
    for device in ("auto", "cpu"):
        said = told(machine, OLD, device=device)
        assert said is not None
        assert "[engine].dtype is bfloat16" in said
        assert 'set dtype = "float32" at every site' in said
        assert "avx512_bf16" in said


@pytest.mark.parametrize(
    ("flags", "key", "dtype"),
    [
        (f"{OLD} avx512_bf16", "flags\t\t", "bfloat16"),
        (f"{OLD} amx_bf16", "flags\t\t", "bfloat16"),
        ("avx2 avx_ne_convert", "flags\t\t", "bfloat16"),
        ("fp asimd bf16", "Features\t", "bfloat16"),
        (f"{OLD} avx512_fp16", "flags\t\t", "float16"),
        (OLD, "flags\t\t", "float32"),
        ("fp asimd", "Features\t", "float32"),
    ],
)
def test_nothing_is_said_of_a_cpu_that_computes_it(machine: Path, flags: str, key: str, dtype: str) -> None:
    assert told(machine, flags, key, dtype=dtype) is None


@pytest.mark.parametrize(
    ("flags", "dtype"), [("avx512_bf16", "float16"), ("avx512_fp16", "bfloat16"), ("not_avx512_bf16x", "bfloat16")]
)
def test_instructions_for_another_format_are_no_help(machine: Path, flags: str, dtype: str) -> None:
    said = told(machine, flags, dtype=dtype)
    assert said is not None
    assert dtype in said


@pytest.mark.parametrize("device", ["nvidia0", "dxg", "kfd"])
def test_nothing_is_said_where_an_accelerator_computes(machine: Path, device: str) -> None:
    (machine / "dev" / device).touch()
    assert told(machine, OLD) is None
    assert told(machine, OLD, device="cuda") is None
    assert told(machine, OLD, device="cpu") is not None, "the operator wants the CPU"


def test_nothing_is_said_of_a_cpu_that_linux_does_not_describe(machine: Path) -> None:
    assert told(machine, "", key="cpu model\t") is None
    (machine / "cpuinfo").unlink()
    assert slow_dtype(SiteConfig.load(machine / "site.toml")) is None
