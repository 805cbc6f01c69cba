"""The process that reads an adapter: what it writes, and what becomes of one that dies or does not end."""

import resource
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.imported import child
from client.imported.child import Made, Order, made, make
from tests.toys.deployment import SHAPES
from tests.toys.sites.peft_directory import digest_of, peft_directory
from umbel import peft_dir
from umbel.errors import AdapterError, NoRoom


def order(tmp_path: Path, **changes: Any) -> Order:
    fields: dict[str, Any] = {
        "name": "legal", "path": tmp_path / "legal", "shapes": SHAPES, "max_rank": 4,
        "target_modules": ("q_proj", "v_proj"), "dtype": "float32", "into": tmp_path / "served",
    }  # fmt: skip
    return Order(**{**fields, **changes})


def test_an_adapter_is_written_as_the_engine_loads_it(tmp_path: Path) -> None:
    digest = digest_of(peft_directory(tmp_path / "legal"))
    found = make(order(tmp_path))
    assert found == Made(digest=digest, source=found.source, rank=2)
    folder = tmp_path / "served" / f"legal-{digest[:16]}"
    assert peft_dir.digest((folder / peft_dir.WEIGHTS).read_bytes()) == digest
    assert sorted(path.name for path in folder.iterdir()) == [peft_dir.CONFIG, peft_dir.WEIGHTS]


def test_a_refusal_comes_back_as_it_is(tmp_path: Path) -> None:
    peft_directory(tmp_path / "legal", rank=8)
    with pytest.raises(AdapterError, match=r"its rank is 8, and \[engine\].max_lora_rank is 4; set that to 8"):
        make(order(tmp_path))
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_it_is_rounded_to_what_the_engine_computes_in(tmp_path: Path, dtype: str) -> None:
    peft_directory(tmp_path / "legal", alpha=3)
    found = made(order(tmp_path, dtype=dtype))
    exact = made(order(tmp_path, name="exact"))
    read = [peft_dir.decode((tmp_path / "served" / f"{name}-{one.digest[:16]}" / peft_dir.WEIGHTS).read_bytes())
            for name, one in (("legal", found), ("exact", exact))]  # fmt: skip
    for name, array in read[0].items():
        assert str(array.dtype) == dtype
        np.testing.assert_array_equal(array, read[1][name].astype(array.dtype))


def test_a_number_that_the_engines_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    peft_directory(tmp_path / "legal", value=1e6)
    with pytest.raises(AdapterError, match=r"lora_B.weight has numbers that float16 cannot hold"):
        made(order(tmp_path, dtype="float16"))
    made(order(tmp_path, dtype="bfloat16"))


def test_an_adapter_of_which_the_engines_dtype_leaves_nothing_is_refused(tmp_path: Path) -> None:
    folder = peft_directory(tmp_path / "legal")
    settings = (folder / peft_dir.CONFIG).read_text()
    (folder / peft_dir.CONFIG).write_text(settings.replace('"lora_alpha": 8', '"lora_alpha": 2e-9'))
    with pytest.raises(AdapterError, match="in float16 nothing of it is left, as B times its scaling rounds to zero"):
        made(order(tmp_path, dtype="float16"))
    made(order(tmp_path, dtype="bfloat16"))
    (folder / peft_dir.CONFIG).write_text(settings.replace('"lora_alpha": 8', '"lora_alpha": 0'))
    made(order(tmp_path, dtype="float16"))  # it changes nothing, and says so


def test_what_lies_damaged_is_written_again_and_what_is_whole_stays(tmp_path: Path) -> None:
    peft_directory(tmp_path / "legal")
    folder = tmp_path / "served" / f"legal-{made(order(tmp_path)).digest[:16]}"
    files = {path: path.read_bytes() for path in folder.iterdir()}
    whole = {path: path.stat().st_ino for path in files}
    made(order(tmp_path))
    assert {path: path.stat().st_ino for path in files} == whole
    (folder / peft_dir.WEIGHTS).write_bytes(b"damaged")
    (folder / peft_dir.CONFIG).unlink()
    made(order(tmp_path))
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


def test_settings_that_never_end_stop_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "LIMIT_S", 3.0)
    folder = peft_directory(tmp_path / "legal")
    settings = (folder / peft_dir.CONFIG).read_text()
    pattern = "(" * 3 + "[a-z0-9_.]+" + ")+" * 3 + "!"
    (folder / peft_dir.CONFIG).write_text(settings.replace('"r"', f'"alpha_pattern": {{"{pattern}": 1}}, "r"'))
    with pytest.raises(AdapterError, match="not read within 3 s; is a pattern of its settings one that never ends"):
        make(order(tmp_path))


def test_a_full_disk_is_no_fault_of_the_adapter(tmp_path: Path) -> None:
    peft_directory(tmp_path / "legal")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # which children inherit, as the limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(NoRoom, match="File too large"):
            make(order(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_folder_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    peft_directory(tmp_path / "legal")
    (tmp_path / "served").write_text("a file where the folder should be")
    with pytest.raises(AdapterError, match="Not a directory"):
        make(order(tmp_path))


def test_a_child_that_dies_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(AdapterError, match="legal: the process that reads it ended with status 1"):
        make(order(tmp_path))
