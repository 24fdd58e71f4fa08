import pytest
import torch
import torch.nn.functional as F
from torch import nn

from converters.numerics.fp8 import Arithmetic, dequantize_channel, quantize_channel
from runtime.model import linear as linear_module
from runtime.model.linear import Linear


def filled(weight: torch.Tensor, *, bias: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> Linear:
    """Return a Linear with these tensors."""
    linear = Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    if scale is not None:
        linear.add_weight_scale()
        linear.weight_scale = nn.Parameter(scale, requires_grad=False)
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_linear_fp8_equals_dequantized_weight_exactly(dtype, scale_dtype):
    torch.manual_seed(0)
    codes, scale = quantize_channel(torch.randn(24, 16).to(scale_dtype), Arithmetic.FLOAT32)
    dequantized = dequantize_channel(codes, scale).to(dtype)
    hidden = torch.randn(3, 16, dtype=dtype)
    assert torch.equal(filled(codes, scale=scale.float())(hidden), filled(dequantized)(hidden))


def test_linear_parameters_are_weight_bias_and_scale():
    linear = Linear(4, 6, bias=True)
    linear.add_weight_scale()
    assert {name: tuple(p.shape) for name, p in linear.named_parameters()} == {
        "weight": (6, 4), "bias": (6,), "weight_scale": (6, 1)
    }  # fmt: skip


@pytest.mark.parametrize("rows", [1, 7, 24, 100])
def test_linear_forward_fp32_in_blocks_equals_one_product(monkeypatch, rows):
    monkeypatch.setattr(linear_module, "_FP32_ROWS", rows)
    torch.manual_seed(0)
    weight, bias, hidden = torch.randn(24, 16).bfloat16(), torch.randn(24).bfloat16(), torch.randn(3, 16).bfloat16()
    out = filled(weight, bias=bias).forward_fp32(hidden)
    assert out.dtype is torch.float32
    torch.testing.assert_close(out, F.linear(hidden.float(), weight.float(), bias.float()), rtol=0, atol=1e-6)
