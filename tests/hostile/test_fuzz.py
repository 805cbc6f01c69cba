"""`scripts/fuzz`: a short run on each target, and a target that breaks, which it must find and save."""

from collections import Counter
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="the targets are in Flower's environment")

from scripts.tools.fuzz import main as fuzz
from scripts.tools.fuzz.target import Target, damaging
from scripts.tools.fuzz.targets import targets
from umbel.errors import WireError

NAMES = ["message", "records", "adapter", "manifest", "alias log", "alias table", "router", "site file", "example",
         "token file", "API keys", "public key"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_our_errors_comes_of_damaged_input(tmp_path: Path, name: str) -> None:
    every = {target.name: target for target in targets(tmp_path)}
    assert list(every) == NAMES
    counts = Counter[str]()
    assert fuzz.fuzz(every[name], examples=150, seed=1, counts=counts, out=tmp_path / "out") is None
    assert counts["cases"] >= 150
    assert counts["accepted"] > 0, "some are still valid"
    assert counts["failures"] == 0


def test_what_breaks_is_saved_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def read(data: bytes) -> None:
        if data[:1] == b"A" and len(data) > 2:
            raise KeyError("x")
        raise WireError("no")

    counts = Counter[str]()
    saved = fuzz.fuzz(Target("toy", damaging([b"ABCDEF"]), read), examples=300, seed=1, counts=counts, out=tmp_path)
    assert saved is not None
    assert saved.read_bytes()[:1] == b"A"
    assert 3 <= len(saved.read_bytes()) <= len("ABCDEF")
    assert f"toy: KeyError: 'x'\n  {saved.read_bytes()!r}\n  saved: {saved}\n" in capsys.readouterr().out
    assert counts["failures"] == 1
