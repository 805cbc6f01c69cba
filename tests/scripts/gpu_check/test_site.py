"""The device that is checked is a GPU, unless another one is asked for."""

import pytest
import torch

from scripts.tools.gpu_check.site import Device
from umbel.errors import ConfigError


@pytest.mark.parametrize(
    ("gpu", "wanted", "lag", "found"),
    [
        (True, "cuda", None, Device("cuda", "bfloat16", None)),
        (True, "any", None, Device("cuda", "bfloat16", None)),
        (False, "any", None, Device("cpu", "float32", None)),
        (False, "cuda", "1.5", Device("cpu", "float32", "1.5")),
    ],
)
def test_the_device_and_its_format(
    monkeypatch: pytest.MonkeyPatch, gpu: bool, wanted: str, lag: str | None, found: Device
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.delenv("UMBEL_LAG", raising=False)
    if lag:
        monkeypatch.setenv("UMBEL_LAG", lag)
    assert Device.find(wanted, None) == found
    assert Device.find(wanted, "float16").dtype == "float16"


def test_a_machine_without_a_gpu_is_told_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("UMBEL_LAG", raising=False)
    with pytest.raises(ConfigError, match="--device any, or with UMBEL_LAG"):
        Device.find("cuda", None)
