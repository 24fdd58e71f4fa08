"""Weights in grouped layout stand for what was put in, whatever the order."""

import random

import pytest
import torch

from converters.errors import InputError
from converters.numerics.dequantize import unpack_e2m1
from converters.numerics.fp8 import quantize_block, quantize_channel
from converters.numerics.nvfp4 import quantize_nvfp4
from converters.quant.scheme import Arithmetic, ScaleSearch
from runtime.moe.packing import ExpertPacker, Matrix, Sizes
from runtime.moe.weights import ExpertScheme, interleave, plain_weights, unpacked_e2m1
from tests.runtime.moe.expert_layers import exact_values, random_experts

# 160 and 144: blocks of 128 that are cut off
SIZES = Sizes(num_routed=2, num_shared=1, hidden_size=160, intermediate_size=144)
SHAPES = {Matrix.GATE: (144, 160), Matrix.UP: (144, 160), Matrix.DOWN: (160, 144)}


def coded(scheme: ExpertScheme, weight: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return codes and scales of a weight, and what they stand for, by the library's own arithmetic."""
    match scheme:
        case ExpertScheme.FP8_CHANNEL:
            codes, scale = quantize_channel(weight, Arithmetic.FLOAT32)
            return (codes, scale), codes.float() * scale.float()
        case ExpertScheme.FP8_BLOCK:
            codes, scale = quantize_block(weight, Arithmetic.FLOAT32)
            wide = scale.float().repeat_interleave(128, 0).repeat_interleave(128, 1)
            return (codes, scale), codes.float() * wide[: weight.shape[0], : weight.shape[1]]
        case ExpertScheme.NVFP4:
            largest = torch.tensor([[8.0]])
            codes, local, factor = quantize_nvfp4(weight, largest, Arithmetic.MODELOPT, ScaleSearch.NONE)
            wide = (local.float() * factor).repeat_interleave(16, 1)
            return (codes, local, factor), unpack_e2m1(codes) * wide
        case _ if scheme.is_plain:
            return (weight.to(scheme.code_dtype),), weight.to(scheme.code_dtype).float()
    scale = weight.abs().amax(1, keepdim=True) / 127
    codes = (weight / scale).round().to(torch.int8)
    return (codes, scale), codes.float() * scale


@pytest.mark.parametrize("scheme", ExpertScheme)
def test_packed_weights_are_those_put_in_bit_for_bit(scheme):
    torch.manual_seed(0)
    packer, expected = ExpertPacker(scheme, SIZES, torch.device("cpu")), {}
    places = [(expert, matrix) for expert in range(3) for matrix in Matrix]
    random.Random(1).shuffle(places)
    for place in places:
        assert not packer.is_complete
        parts, expected[place] = coded(scheme, torch.randn(SHAPES[place[1]]))
        packer.put(*place, *parts)
    weights = packer.weights()
    up, down = weights.up_values(torch.float32), weights.down_values(torch.float32)
    for expert in range(3):
        assert torch.equal(up[expert, 0::2], expected[expert, Matrix.GATE])
        assert torch.equal(up[expert, 1::2], expected[expert, Matrix.UP])
        assert torch.equal(down[expert], expected[expert, Matrix.DOWN])
    assert weights.num_experts == 3
    assert weights.up.codes.dtype is scheme.code_dtype


def test_one_scale_for_a_weight_is_that_of_each_row():
    packer = ExpertPacker(ExpertScheme.FP8_CHANNEL, Sizes(1, 0, 32, 16), torch.device("cpu"))
    for matrix, scale in zip(Matrix, (0.5, 2.0, 3.0), strict=True):
        shape = (32, 16) if matrix is Matrix.DOWN else (16, 32)
        packer.put(0, matrix, torch.ones(shape).to(torch.float8_e4m3fn), torch.tensor([scale]))
    weights = packer.weights()
    assert weights.up.scales.tolist() == [[0.5, 2.0] * 16]
    assert weights.down.scales.tolist() == [[3.0] * 32]


@pytest.mark.parametrize("order", [(Matrix.GATE, Matrix.UP), (Matrix.UP, Matrix.GATE)])
def test_gate_and_up_with_different_global_scales_are_refused(order):
    packer = ExpertPacker(ExpertScheme.NVFP4, Sizes(1, 0, 32, 16), torch.device("cpu"))
    codes, local = torch.zeros(16, 16, dtype=torch.uint8), torch.ones(16, 2).to(torch.float8_e4m3fn)
    packer.put(0, order[0], codes, local, torch.tensor([0.5]))
    with pytest.raises(InputError) as error:
        packer.put(0, order[1], codes, local, torch.tensor([0.25]))
    assert str(error.value) == (
        "expert 0: expected one global scale for gate and up, found 0.5 and 0.25. Use --moe-backend vanilla."
    )


def test_e2m1_codes_are_decoded_as_elsewhere():
    codes = torch.arange(256, dtype=torch.uint8)[None]
    assert torch.equal(unpacked_e2m1(codes), unpack_e2m1(codes))


def test_interleaved_rows_alternate():
    gate, up = torch.arange(6.0).view(1, 3, 2), -torch.arange(6.0).view(1, 3, 2)
    both = interleave(gate, up)
    assert torch.equal(both[:, 0::2], gate)
    assert torch.equal(both[:, 1::2], up)


def test_plain_weights_take_the_scheme_of_their_dtype():
    gate = torch.randn(3, 4, 8, dtype=torch.float16)
    weights = plain_weights(gate, gate, gate.transpose(1, 2), num_shared=1)
    assert (weights.scheme, weights.num_routed, weights.num_shared) == (ExpertScheme.FP16, 2, 1)
    assert (weights.hidden_size, weights.intermediate_size) == (8, 4)


@pytest.mark.parametrize("scheme", ExpertScheme)
def test_values_are_rounded_once_from_exact_products(scheme):
    """One rounding for the product of scales, one for that with the code: 2 units of 2^-24, and then that to bf16."""
    weights = random_experts(scheme, 2, 1, 160, 144)
    for exact, values in zip(
        exact_values(weights), (weights.up_values(torch.float32), weights.down_values(torch.float32)), strict=True
    ):
        assert ((values.double() - exact).abs() <= 2.1 * 2.0**-24 * exact.abs()).all()
    assert torch.equal(weights.up_values(torch.bfloat16), weights.up_values(torch.float32).bfloat16())
    chosen = torch.tensor([2, 0])
    assert torch.equal(weights.down_values(torch.float32, chosen), weights.down_values(torch.float32)[chosen])
