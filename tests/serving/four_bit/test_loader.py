"""SGLang loads of a packed base what its fingerprint counts, and nothing that a kernel would read wrongly."""

import copy
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.configs.load_config import LoadConfig

from serving.four_bit.hook import choose_loader
from serving.four_bit.library import bitsandbytes
from serving.four_bit.loader import FourBitLoader
from serving.four_bit.weight import FourBitWeight
from umbel.base.files import weight_files
from umbel.base.packed import METHOD
from umbel.errors import UnsupportedModel


def test_only_a_packed_base_gets_the_loader() -> None:
    original = object()
    for quantization in (None, "awq"):
        model = SimpleNamespace(quantization=quantization)
        assert choose_loader(lambda *_: original, LoadConfig(), model) is original
    assert choose_loader(lambda *_: original, LoadConfig()) is original
    assert isinstance(
        choose_loader(lambda *_: original, LoadConfig(), SimpleNamespace(quantization=METHOD)), FourBitLoader
    )


def test_a_file_that_the_fingerprint_does_not_count_is_not_loaded(packed: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(packed, tmp_path / "model"))
    shutil.copyfile(model / "model.safetensors", model / "consolidated.safetensors")
    files, safetensors = FourBitLoader(LoadConfig())._prepare_weights(str(model), None)
    assert (files, safetensors) == ([str(model / "model.safetensors")], True)
    assert files == [str(file) for file in weight_files(model)]


def weight() -> FourBitWeight:
    torch.manual_seed(0)
    return FourBitWeight(*bitsandbytes().functional.quantize_4bit(torch.randn(96, 160), compress_statistics=True))


@pytest.mark.parametrize(
    "change",
    [
        lambda state: setattr(state, "blocksize", 32),
        lambda state: setattr(state, "blocksize", 128),
        lambda state: setattr(state, "quant_type", "nf4"),
        lambda state: setattr(state, "shape", torch.Size((96, 161))),
        lambda state: setattr(state, "absmax", state.absmax[1:]),
        lambda state: setattr(state.state2, "absmax", state.state2.absmax[1:]),
    ],
    ids=[
        "a smaller block",
        "a larger block",
        "another code",
        "another shape",
        "a scale less",
        "a scale of scales less",
    ],
)
def test_a_state_that_is_not_of_its_bytes_is_refused_by_name(change: object) -> None:
    whole = weight()
    whole.require_whole("up_proj.weight", "fp4")
    state = copy.deepcopy(whole.state)
    change(state)  # type: ignore[operator]
    with pytest.raises(UnsupportedModel, match=r"^up_proj.weight: 7680 bytes and .* copy the packed directory again"):
        FourBitWeight(whole.packed, state).require_whole("up_proj.weight", "fp4")
