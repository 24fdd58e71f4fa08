"""Codes found by bits are those of the division, for every bit pattern there is."""

import pytest
import quantization_twin as twin
import torch

from converters.errors import InputError
from converters.numerics import fp8_bits, nvfp4_patterns
from converters.numerics.nvfp4 import encode_pairs
from converters.numerics.nvfp4_scales import combined
from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import QuantizeNvfp4

PATTERNS = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)


def finite(dtype: torch.dtype) -> torch.Tensor:
    values = PATTERNS.view(dtype)
    return values[values.isfinite()]


@pytest.mark.parametrize("exponent", [-126, -60, -7, 0, 6])
def test_every_bf16_weight_over_every_bf16_scale_has_the_e4m3_code_of_the_quotient(exponent: int) -> None:
    weight = finite(torch.bfloat16)
    for significand in range(128, 256):
        scale_11 = torch.tensor([[significand * 2.0 ** (exponent - 7)]], dtype=torch.bfloat16)
        weight_1C = weight[weight.float().abs() < 464 * scale_11.float().view(())].unsqueeze(0)
        assert fp8_bits.suits(weight_1C, scale_11)
        codes_1C = torch.empty(weight_1C.shape, dtype=torch.uint8)
        fp8_bits.encode(weight_1C, scale_11, codes_1C)
        expected = (weight_1C.float() / scale_11.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(codes_1C, expected.view(torch.uint8)), significand


@pytest.mark.parametrize("scale", [2.0**-127, 2.0**8])
def test_scales_near_the_ends_of_the_range_are_left_to_the_division(scale: float) -> None:
    weight_OI = torch.zeros(1, 16, dtype=torch.bfloat16)
    assert not fp8_bits.suits(weight_OI, torch.tensor([[scale]], dtype=torch.bfloat16))
    assert fp8_bits.suits(weight_OI, torch.tensor([[1.0]], dtype=torch.bfloat16))
    assert not fp8_bits.suits(weight_OI.float(), torch.tensor([[1.0]]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("arithmetic", "scale"), [(Arithmetic.FLOAT32, 33600.125), (Arithmetic.FLOAT32, 3.7), (Arithmetic.MODELOPT, 2.9e-5)]
)
def test_bounds_count_the_e2m1_codes_of_every_weight_for_every_scale(
    dtype: torch.dtype, arithmetic: Arithmetic, scale: float
) -> None:
    tables = nvfp4_patterns.tables_of(scale, dtype, arithmetic)
    assert tables is not None
    weight = finite(dtype)
    weight_RC = torch.cat([weight, weight.new_zeros(-len(weight) % 16)]).unsqueeze(0)
    packed_RB = torch.empty(1, weight_RC.shape[1] // 2, dtype=torch.uint8)
    for code in range(1, 0x7F):
        local_RG = torch.full((1, weight_RC.shape[1] // 16), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        step_RG = combined(local_RG[:, :1], torch.tensor([[scale]]), arithmetic)
        encode_pairs(weight_RC.float() / step_RG, packed_RB)
        found, _ = nvfp4_patterns.encode(weight_RC, tables, local_RG)
        assert torch.equal(found, packed_RB), code


@pytest.mark.parametrize("largest", [3e38, 1e-37, 0.0])
@pytest.mark.parametrize("arithmetic", list(Arithmetic))
def test_bytes_are_those_of_the_twin_at_the_ends_of_the_range(arithmetic: Arithmetic, largest: float) -> None:
    weight_RC = (torch.randn(7, 64, generator=torch.Generator().manual_seed(1)).clamp(-1, 1) * largest).bfloat16()
    most_11 = weight_RC.abs().max().float().view(1, 1)
    ours = QuantizeNvfp4(arithmetic)(weight_RC, most_11)
    for mine, theirs in zip(ours, twin.nvfp4(weight_RC, most_11, arithmetic, ScaleSearch.NONE), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))


@pytest.mark.parametrize("start", [1, 2, 3])
def test_a_weight_may_begin_anywhere_in_memory(start: int) -> None:
    values = torch.randn(start + 5 * 48, generator=torch.Generator().manual_seed(2)).bfloat16()
    weight_RC, transform = values[start:].view(5, 48), QuantizeNvfp4(Arithmetic.FLOAT32)
    most_11 = weight_RC.abs().max().float().view(1, 1)
    for mine, theirs in zip(transform(weight_RC, most_11), transform(weight_RC.clone(), most_11), strict=True):
        assert torch.equal(mine.view(torch.uint8), theirs.view(torch.uint8))
    assert [len(output) for output in transform(weight_RC[:0], most_11)] == [0, 0, 1]


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_that_are_not_finite_are_refused_by_row(dtype: torch.dtype, value: float) -> None:
    weight_RC = torch.ones(9, 32, dtype=dtype)
    weight_RC[6, 17] = value
    with pytest.raises(InputError, match="row 6"):
        QuantizeNvfp4(Arithmetic.FLOAT32)(weight_RC, torch.ones(1, 1))
