"""Every code of every format, against the libraries' own decoders or the definition of the format."""

import pytest
import torch
from quantized import E2M1, nvfp4_values

from converters.errors import InputError
from converters.formats.weights import Coding
from converters.numerics.dequantize import decode, dequantize_nvfp4, scale_groups, unpack_e2m1, unpack_int32
from converters.transforms.dequantize import Dequantize


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.contiguous().view(torch.int32)


@pytest.mark.parametrize("columns", [256, 255, 1])
def test_every_fp8_code_has_its_value(columns: int) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(3, 1)[:, :columns].contiguous().view(torch.float8_e4m3fn)
    assert torch.equal(bits(decode(codes)), bits(codes.float()))


def test_every_fp8_code_has_its_value_beside_every_other() -> None:
    pairs = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    codes = pairs.view(torch.float8_e4m3fn).view(256, -1)
    assert torch.equal(bits(decode(codes)), bits(codes.float()))


def test_every_int8_code_has_its_value() -> None:
    codes = torch.arange(-128, 128, dtype=torch.int8).view(2, -1)
    assert decode(codes).flatten().tolist() == list(range(-128, 128))


def test_every_e2m1_pair_is_low_nibble_first_with_its_sign() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(16, 16)
    values = unpack_e2m1(codes)
    assert torch.equal(bits(values), bits(nvfp4_values(codes)))
    assert values[0, :16].tolist() == [value for low in E2M1 for value in (low, 0.0)]
    assert torch.signbit(values[0, 16]).item(), "code 8 is minus zero"


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("columns", [64, 61, 5])
def test_int_codes_are_unpacked_as_compressed_tensors_does(num_bits: int, columns: int) -> None:
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    half = 1 << (num_bits - 1)
    codes = torch.arange(-half, half, dtype=torch.int8).repeat(columns * 3)[: columns * 6].view(6, columns).contiguous()
    words = pack_to_int32(codes, num_bits)
    assert torch.equal(unpack_int32(words, num_bits, columns), codes.float())
    assert torch.equal(unpack_from_int32(words, num_bits, codes.shape), codes)


@pytest.mark.parametrize(("columns", "group"), [(12, 4), (13, 4), (3, 4), (8, 1)])
def test_each_group_of_columns_has_its_scale_and_the_last_may_be_cut_off(columns: int, group: int) -> None:
    values = torch.randn(5, columns)
    scale = torch.rand(5, -(-columns // group))
    expected = torch.stack([values[:, c] * scale[:, c // group] for c in range(columns)], dim=1)
    assert torch.equal(scale_groups(values.clone(), scale, group), expected)


def test_nvfp4_scales_are_combined_before_the_code_is_multiplied() -> None:
    """The order decides the last bit: code * (local / global), as compressed-tensors and engines compute it."""
    codes = torch.randint(0, 256, (64, 32), dtype=torch.uint8)
    local = (torch.rand(64, 4) * 400 + 1).to(torch.float8_e4m3fn)
    for divides in (True, False):
        scale = torch.full((64, 1), 893.25 if divides else 0.00117)
        combined = local.float() / scale if divides else local.float() * scale
        expected = nvfp4_values(codes) * combined.repeat_interleave(16, 1)
        assert torch.equal(dequantize_nvfp4(codes, local, scale, divides=divides), expected)


def test_source_rows_are_left_as_they_are() -> None:
    """With fp32 scales, `.float()` is no copy: an operation in place would change what is read next."""
    codes, scale = torch.ones(4, 6, dtype=torch.int8), torch.full((4, 1), 0.5)
    Dequantize(Coding.SCALED, 8, 6, 6, "F32")(codes, scale)
    assert torch.equal(codes, torch.ones(4, 6, dtype=torch.int8))
    assert torch.equal(scale, torch.full((4, 1), 0.5))


def test_weight_that_does_not_fit_the_dtype_is_refused() -> None:
    codes = torch.full((2, 4), 448.0).to(torch.float8_e4m3fn)
    with pytest.raises(InputError, match="cast to F16: expected values that fit, found 448000"):
        Dequantize(Coding.SCALED, 8, 4, 4, "F16")(codes, torch.full((2, 1), 1000.0))
