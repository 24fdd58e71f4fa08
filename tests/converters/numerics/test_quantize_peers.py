"""Codes, scales and packing against the libraries whose formats these are, byte for byte."""

import pytest
import torch
from quantization_peers import (
    FP8,
    INT8,
    ct_block,
    ct_channel,
    ct_nvfp4,
    ct_packed,
    ct_tensor,
    deepseek_block,
    finite_as,
    hard_weights,
    modelopt_export,
)

from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)

CT = Arithmetic.COMPRESSED_TENSORS
NAMES = list(hard_weights(4, 16))
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def weights(name: str, dtype: torch.dtype, rows: int = 67, columns: int = 320) -> torch.Tensor:
    return finite_as(hard_weights(rows, columns)[name], dtype)


def largest(weight: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """Return the maximum of a group of weights; factor > 1: another member has it."""
    return (weight.abs().max() * factor).to(weight.dtype).clamp(max=torch.finfo(weight.dtype).max).float().view(1, 1)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return ours.dtype == theirs.dtype and torch.equal(
        ours.contiguous().view(-1).view(torch.uint8), theirs.contiguous().view(-1).view(torch.uint8)
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_tensors_channel(name: str, dtype: torch.dtype) -> None:
    weight = weights(name, dtype)
    for transform, kind in ((QuantizeFp8Channel(CT), FP8), (QuantizeInt8(CT), INT8)):
        codes, scale = transform(weight)
        expected_codes, expected_scale = ct_channel(weight, kind)
        assert same(scale, expected_scale)
        assert same(codes, expected_codes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 1.75])
def test_compressed_tensors_tensor(name: str, dtype: torch.dtype, factor: float) -> None:
    weight = weights(name, dtype)
    codes, scale = QuantizeFp8Tensor(CT)(weight, largest(weight, factor))
    expected_codes, expected_scale = ct_tensor(weight, largest(weight, factor))
    assert same(scale, expected_scale)
    assert same(codes, expected_codes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns"), [(256, 384), (129, 130), (5, 7)])
def test_compressed_tensors_block(dtype: torch.dtype, rows: int, columns: int) -> None:
    for name in NAMES:
        weight = weights(name, dtype, rows, columns)
        codes, scale = QuantizeFp8Block(CT)(weight)
        expected_codes, expected_scale = ct_block(weight, 128, 128)
        assert same(scale, expected_scale), name
        assert same(codes, expected_codes), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "columns"), [(0, 320), (0, 318), (0, 5), (32, 320), (64, 320), (128, 384)])
def test_compressed_tensors_packed(dtype: torch.dtype, group: int, columns: int) -> None:
    for name in NAMES:
        weight = weights(name, dtype, 13, columns)
        words, scale = QuantizeInt8Packed(CT, group)(weight)
        expected_words, expected_scale = ct_packed(weight, group)
        assert same(scale, expected_scale), name
        assert same(words, expected_words), name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1.0, 1.75])
def test_compressed_tensors_nvfp4(name: str, dtype: torch.dtype, factor: float) -> None:
    weight = weights(name, dtype)
    packed, local, divisor = QuantizeNvfp4(CT, ScaleSearch.NONE)(weight, largest(weight, factor))
    expected = ct_nvfp4(weight, largest(weight, factor))
    assert same(divisor, expected[2])
    assert same(local, expected[1])
    assert same(packed, expected[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_deepseek_block(name: str, dtype: torch.dtype) -> None:
    weight = weights(name, dtype, 256, 384)
    codes, scale = QuantizeFp8Block(Arithmetic.FLOAT32, inverse=True)(weight)
    expected_codes, expected_scale = deepseek_block(weight, 128, 128)
    assert same(scale, expected_scale)
    assert same(codes, expected_codes)


# preset of modelopt -> our transform; those with a scale for the whole tensor also get its maximum
MODELOPT = {
    "FP8_PER_CHANNEL_PER_TOKEN_CFG": QuantizeFp8Channel(Arithmetic.MODELOPT),
    "FP8_2D_BLOCKWISE_WEIGHT_ONLY_CFG": QuantizeFp8Block(Arithmetic.MODELOPT),
    "FP8_DEFAULT_CFG": QuantizeFp8Tensor(Arithmetic.MODELOPT),
    "INT8_WEIGHT_ONLY_CFG": QuantizeInt8(Arithmetic.MODELOPT),
    "W4A16_NVFP4_CFG": QuantizeNvfp4(Arithmetic.MODELOPT, ScaleSearch.NONE),
}
PER_TENSOR = ("FP8_DEFAULT_CFG", "W4A16_NVFP4_CFG")
CASES = [(config, 1.0) for config in MODELOPT] + [(config, 1.75) for config in PER_TENSOR]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("config", "factor"), CASES)
def test_modelopt(name: str, dtype: torch.dtype, config: str, factor: float) -> None:
    # its blocks must fill the weight: two of them each way
    weight = weights(name, dtype, 256, 256 if "BLOCK" in config else 64)
    ours = MODELOPT[config](weight, largest(weight, factor))
    if config in PER_TENSOR and not weight.any():
        # modelopt divides by zero there and writes NaN
        assert not ours[0].float().any()
        assert all(torch.isfinite(scale.float()).all() and (scale.float() > 0).all() for scale in ours[1:])
        return
    theirs = modelopt_export(weight, config, largest(weight, factor) if factor > 1 else None)
    assert same(ours[0], theirs["weight"])
    assert same(ours[1], theirs["weight_scale"])
    if len(ours) == 3:
        assert same(ours[2], theirs["weight_scale_2"])
