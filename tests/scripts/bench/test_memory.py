"""The memory benchmark's verdict on figures that are made up."""

from types import SimpleNamespace

import pytest

from scripts.tools.bench.memory import show

MB = 10**6


def status(added: int, shared: int = 5) -> SimpleNamespace:
    memory = {"before": 100 * MB, "view": 101 * MB, "after": (120 + added) * MB, "calibration": (150 + added) * MB}
    return SimpleNamespace(memory=memory, state_bytes=20 * MB, shared_tensors=shared, frozen_tensors=5)


def test_it_prints_the_memory_beyond_the_loras_own_state(capsys: pytest.CaptureFixture[str]) -> None:
    show(1000 * MB, status(10), {"before": 50 * MB, "after": 1090 * MB, "state": 20 * MB})
    out = capsys.readouterr().out
    assert "base: 1000 MB; 5 of 5 frozen tensors shared" in out
    assert "private MB added: 10.0 (allowed 32)" in out
    assert "LoRA state 20.0, given back after the step 30.0" in out
    assert "likewise: 1020.0, that is 102 times as much" in out


@pytest.mark.parametrize("measured", [status(33), status(10, shared=4)])
def test_more_than_is_allowed_or_a_copied_tensor_is_an_error(measured: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="over what is allowed"):
        show(1000 * MB, measured, {"before": 0, "after": MB, "state": 0})
