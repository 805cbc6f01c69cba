"""A weight in 4 bits is code times scale; products with it are those of the weight unpacked, in any runs of rows."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from serving.four_bit import weight as module
from serving.four_bit.library import bitsandbytes
from serving.four_bit.linear import FourBitLinear
from serving.four_bit.weight import FourBitWeight

bnb = bitsandbytes()


def packed(n: int, k: int, *, double: bool = True, quant_type: str = "nf4") -> FourBitWeight:
    torch.manual_seed(0)
    made = bnb.functional.quantize_4bit(torch.randn(n, k), compress_statistics=double, quant_type=quant_type)
    return FourBitWeight(*made)


@pytest.mark.parametrize(("n", "k"), [(96, 160), (64, 96), (128, 48), (33, 576), (50, 2), (7, 64), (3, 21)])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_unpacking_is_code_times_scale(n: int, k: int, double: bool, quant_type: str) -> None:
    """Where the block size does not divide a row, too: there bitsandbytes' own kernel may read other scales."""
    weight = packed(n, k, double=double, quant_type=quant_type)
    nibbles = torch.stack([weight.packed.flatten() >> 4, weight.packed.flatten() & 15], dim=1).flatten()
    values = weight.state.code[nibbles[: n * k].long()]
    scales = weight.scales().repeat_interleave(weight.state.blocksize)[: n * k]
    assert torch.equal(weight.unpacked(torch.float32), (values * scales).view(n, k))


@pytest.mark.parametrize(("n", "k"), [(96, 160), (7, 64), (130, 192), (33, 2)])
@pytest.mark.parametrize("values", [1, 700, 5000])
def test_runs_of_rows_give_the_numbers_of_the_whole(
    monkeypatch: pytest.MonkeyPatch, n: int, k: int, values: int
) -> None:
    weight = packed(n, k)
    dense, x = weight.unpacked(torch.float32), torch.randn(3, 5, k, requires_grad=True)
    monkeypatch.setattr(module, "RUN", values)
    scales = weight.scales()
    rows = [weight.unpacked(torch.float32, run, scales) for run in weight.runs()]
    assert torch.equal(torch.cat(rows), dense), "each row once, in order"
    y = FourBitLinear(weight)(x)
    up = torch.randn(3, 5, n)
    y.backward(up)
    assert torch.allclose(y, F.linear(x, dense), atol=1e-5)
    assert x.grad is not None
    assert torch.allclose(x.grad, up @ dense, atol=1e-4)


def test_no_more_than_a_run_is_unpacked_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, seen = packed(512, 128), []
    real = FourBitWeight.unpacked

    def unpacked(self: FourBitWeight, *args: object) -> torch.Tensor:
        seen.append(real(self, *args).numel())  # type: ignore[arg-type]
        return real(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "RUN", 8192)
    monkeypatch.setattr(FourBitWeight, "unpacked", unpacked)
    x = torch.randn(4, 128, requires_grad=True)
    FourBitLinear(weight)(x).sum().backward()
    assert len(seen) == 2 * 512 * 128 // 8192
    assert max(seen) == 8192


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_is_that_of_the_unpacked_weight(dtype: torch.dtype, double: bool) -> None:
    weight = packed(96, 160, double=double)
    layer, dense = FourBitLinear(weight), weight.unpacked(dtype)
    x, up = torch.randn(3, 5, 160, dtype=dtype), torch.randn(3, 5, 96, dtype=dtype)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    one, other = layer(ours), F.linear(theirs, dense)
    one.backward(up)
    other.backward(up)
    assert torch.equal(one, other)
    assert ours.grad is not None
    assert theirs.grad is not None
    assert torch.equal(ours.grad, theirs.grad)
    assert layer.weight.grad is None


def test_no_unpacked_weight_is_kept_for_the_backward_pass() -> None:
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda one: one):
        FourBitLinear(packed(128, 128))(torch.randn(4, 128, requires_grad=True)).sum()
    assert not [tensor for tensor in kept if tensor.numel() >= 128 * 128]


def test_importing_bitsandbytes_asks_no_network() -> None:
    script = (
        "import socket, sys\n"
        "def refuse(*args, **more): raise SystemExit(f'asked the network for {args}')\n"
        "socket.getaddrinfo = socket.socket.connect = socket.create_connection = refuse\n"
        "from serving.four_bit.library import bitsandbytes\n"
        "bitsandbytes()\n"
        "assert 'kernels' not in sys.modules or sys.modules['kernels'] is not None\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=Path(__file__).parents[3])


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="only there bitsandbytes repacks")
def test_why_no_layer_is_bitsandbytes_own() -> None:
    """Its first evaluation rewrites a state that SGLang shares: who else reads it gets another product."""
    weight, x = packed(64, 64), torch.randn(2, 64)
    before = bnb.matmul_4bit(x, weight.packed.t(), weight.state)
    own = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.float32)
    own.weight = bnb.nn.Params4bit(weight.packed, quant_state=weight.state, bnb_quantized=True, module=own)
    own.eval()(x)
    assert weight.state.packing_format_for_cpu
    assert not torch.allclose(bnb.matmul_4bit(x, weight.packed.t(), weight.state), before, atol=0.1)
