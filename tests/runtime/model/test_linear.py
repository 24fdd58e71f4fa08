import pytest
import torch
import torch.nn.functional as F
from torch import nn

from converters.numerics.fp8 import Arithmetic, dequantize_channel, quantize_channel
from runtime.model import linear as linear_module
from runtime.model.linear import Linear
from runtime.moe.workspace import Workspace


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


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_linear_into_given_memory_has_the_bits_of_a_new_tensor(dtype, weight_dtype, has_bias):
    torch.manual_seed(0)
    weight, scale = torch.randn(24, 16), None
    if weight_dtype is torch.float8_e4m3fn:
        weight, scale = quantize_channel(weight, Arithmetic.FLOAT32)
    linear = filled(weight.to(weight_dtype), bias=torch.randn(24).to(dtype) if has_bias else None, scale=scale)
    for num_rows in (0, 1, 7):
        hidden, out = torch.randn(num_rows, 16).to(dtype), torch.empty(num_rows, 24, dtype=dtype)
        assert linear.forward_into(hidden, Workspace(hidden.device), out) is out
        assert torch.equal(out, linear(hidden))


def test_linear_into_given_memory_does_not_scale_codes_that_were_multiplied_out():
    linear = filled(torch.ones(2, 4), scale=torch.full((2, 1), 3.0))
    hidden = torch.ones(1, 4, dtype=torch.bfloat16)
    out = linear.forward_into(hidden, Workspace(hidden.device), torch.empty(1, 2, dtype=hidden.dtype))
    assert out.tolist() == linear(hidden).tolist() == [[4.0, 4.0]]
