"""Codes multiplied out by their bits against the conversion of torch."""

import pytest
import torch

from converters.numerics.fp8 import dequantize_channel
from runtime.model.codes import multiply_out


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_every_code_has_the_bits_of_the_conversion(scale_dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(3, 1)
    scales = torch.tensor([[1.0], [0.3], [1e-40]]).to(scale_dtype)
    expected, out = dequantize_channel(codes, scales), torch.empty(3, 256)
    assert multiply_out(codes, scales, out) is out
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))
    assert torch.equal(multiply_out(codes, scales).view(torch.int32), expected.view(torch.int32))
    assert int(out.isnan().sum()) == 3 * 2


@pytest.mark.parametrize("block", [1, 3 * 254, 1 << 18])
def test_codes_without_nan_have_the_bits_of_the_conversion(block, monkeypatch):
    """Scales: one, usual, subnormal, so large that all products but some overflow, and not finite."""
    monkeypatch.setattr("runtime.model.codes._BLOCK_CODES", block)
    finite = [code for code in range(256) if code & 0x7F != 0x7F]
    codes = torch.tensor(finite, dtype=torch.uint8).view(torch.float8_e4m3fn).repeat(5, 1)
    for scales in ([1.0, 0.3, 1e-40, 7e-46, 3.1e-4], [1.0, 3e38, 1e30, torch.inf, torch.nan]):
        scale = torch.tensor(scales)[:, None]
        expected = dequantize_channel(codes, scale)
        assert torch.equal(multiply_out(codes, scale).view(torch.int32), expected.view(torch.int32))


def test_no_codes_are_no_values():
    assert multiply_out(torch.empty(0, 4, dtype=torch.float8_e4m3fn), torch.empty(0, 1)).shape == (0, 4)
