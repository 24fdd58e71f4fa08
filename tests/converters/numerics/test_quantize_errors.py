"""How far codes are from weights: half a step in fp32 arithmetic, less with a scale search; and what others read."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from quantization_peers import (
    ct_nvfp4_values,
    ct_packed_values,
    ct_values,
    finite_as,
    hard_weights,
    modelopt_nvfp4_values,
)

from converters.numerics.dequantize import decode, dequantize_nvfp4, scale_groups, unpack_e2m1, unpack_int32
from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
NAMES = list(hard_weights(4, 16))
FLOAT32, CT, MODELOPT = Arithmetic.FLOAT32, Arithmetic.COMPRESSED_TENSORS, Arithmetic.MODELOPT
# a quotient is rounded to fp32 before it is rounded to a code: it may cross an exact midpoint by this part of itself
QUOTIENT = 2.0**-24


def largest(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().max().float().view(1, 1)


def e4m3_bound(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return half the distance of neighbouring codes, and what is beyond the last."""
    return torch.maximum(weight.abs() / 16, scale / 1024) + (weight.abs() - 448 * scale).clamp_min(0)


def int8_bound(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    beyond = torch.maximum(weight - 127.5 * scale, -weight - 128.5 * scale).clamp_min(0)
    return scale / 2 + beyond


def e2m1_bound(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    size = weight.abs() / scale
    half = torch.where(size < 2, 0.25, torch.where(size < 4, 0.5, 1.0))
    return (half + (size - 7).clamp_min(0)) * scale


def spread(scale: torch.Tensor, weight: torch.Tensor, rows: int = 1) -> torch.Tensor:
    """Return a scale for each weight, in fp64; blocks of 128 columns may be cut off."""
    scale = scale.double().repeat_interleave(rows, 0)[: len(weight)]
    group = 128 if rows > 1 else weight.shape[1] // scale.shape[1]
    return scale.repeat_interleave(group, 1)[:, : weight.shape[1]].expand(weight.shape)


Made = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def nvfp4_parts(weight: torch.Tensor, arithmetic: Arithmetic, search: ScaleSearch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return decoded weights and what codes are multiplied with, both fp32 (R, C)."""
    packed, local, overall = QuantizeNvfp4(arithmetic, search)(weight, largest(weight))
    rows = overall.expand(len(weight), 1)
    divides = arithmetic is not MODELOPT
    step = local.float() / rows if divides else local.float() * rows
    return dequantize_nvfp4(packed, local, rows, divides=divides), step.repeat_interleave(16, 1)


def fp8_channel(weight: torch.Tensor) -> Made:
    codes, scale = QuantizeFp8Channel(FLOAT32)(weight)
    return decode(codes).double(), spread(scale, weight), e4m3_bound(weight.double(), spread(scale, weight))


def fp8_tensor(weight: torch.Tensor) -> Made:
    codes, scale = QuantizeFp8Tensor(FLOAT32)(weight, largest(weight))
    return decode(codes).double(), spread(scale, weight), e4m3_bound(weight.double(), spread(scale, weight))


def fp8_block(weight: torch.Tensor) -> Made:
    codes, scale = QuantizeFp8Block(FLOAT32)(weight)
    wide = spread(scale, weight, 128)
    return decode(codes).double(), wide, e4m3_bound(weight.double(), wide)


def int8(weight: torch.Tensor) -> Made:
    codes, scale = QuantizeInt8(FLOAT32)(weight)
    return decode(codes).double(), spread(scale, weight), int8_bound(weight.double(), spread(scale, weight))


def int8_packed(weight: torch.Tensor) -> Made:
    words, scale = QuantizeInt8Packed(FLOAT32, 32)(weight)
    codes, wide = unpack_int32(words, 8, weight.shape[1]).double(), spread(scale, weight)
    return codes, wide, int8_bound(weight.double(), wide)


def nvfp4(search: ScaleSearch) -> Callable[[torch.Tensor], Made]:
    def made(weight: torch.Tensor) -> Made:
        packed, *_ = QuantizeNvfp4(FLOAT32, search)(weight, largest(weight))
        _, step = nvfp4_parts(weight, FLOAT32, search)
        return unpack_e2m1(packed).double(), step.double(), e2m1_bound(weight.double(), step.double())

    return made


FORMATS = {
    "fp8 channel": fp8_channel,
    "fp8 tensor": fp8_tensor,
    "fp8 block": fp8_block,
    "int8": int8,
    "int8 packed": int8_packed,
    "nvfp4": nvfp4(ScaleSearch.NONE),
    "nvfp4 mse": nvfp4(ScaleSearch.MSE),
}


def check_half_step(weight: torch.Tensor, made: Made) -> None:
    codes, scale, bound = made
    # twice that: this sum is rounded too, to fp64
    limit = bound + weight.double().abs() * QUOTIENT * 2
    assert bool(((codes * scale - weight.double()).abs() <= limit).all())


@pytest.mark.parametrize("weight", NAMES)
@pytest.mark.parametrize("name", FORMATS)
def test_every_code_is_within_half_a_step(name: str, weight: str) -> None:
    for dtype in DTYPES:
        weight_RC = finite_as(hard_weights(67, 320)[weight], dtype)
        check_half_step(weight_RC, FORMATS[name](weight_RC))


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 2**31), st.sampled_from(DTYPES), st.floats(-20, 10))
def test_every_code_of_random_weights_is_within_half_a_step(
    name: str, seed: int, dtype: torch.dtype, size: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight_RC = (torch.randn(5, 160, generator=generator) * 10 ** (size / 4)).to(dtype)
    check_half_step(weight_RC, FORMATS[name](weight_RC))


@pytest.mark.parametrize("weight", NAMES)
@pytest.mark.parametrize("transform", ["channel", "block", "int8", "packed"])
def test_fp32_arithmetic_has_no_more_error_than_compressed_tensors(transform: str, weight: str) -> None:
    """With the same scales on disk, the nearest code cannot be worse than one found by rounding twice."""
    weight_RC = finite_as(hard_weights(256, 384)[weight], torch.bfloat16)
    error = {}
    for arithmetic in (FLOAT32, CT):
        made = {
            "channel": QuantizeFp8Channel(arithmetic),
            "block": QuantizeFp8Block(arithmetic),
            "int8": QuantizeInt8(arithmetic),
            "packed": QuantizeInt8Packed(arithmetic, 128),
        }[transform](weight_RC)
        codes = unpack_int32(made[0], 8, 384) if transform == "packed" else decode(made[0])
        restored = codes.double() * spread(made[1], weight_RC, 128 if transform == "block" else 1)
        error[arithmetic] = float((restored - weight_RC.double()).norm())
    assert error[FLOAT32] <= error[CT] * (1 + QUOTIENT)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arithmetic", Arithmetic)
def test_scale_search_never_raises_the_error_of_a_group(arithmetic: Arithmetic, dtype: torch.dtype) -> None:
    for weight in NAMES:
        weight_RC = finite_as(hard_weights(67, 320)[weight], dtype)
        errors = []
        for search in (ScaleSearch.MSE, ScaleSearch.NONE):
            restored, _ = nvfp4_parts(weight_RC, arithmetic, search)
            errors.append((restored.double() - weight_RC.double()).square().unflatten(1, (-1, 16)).sum(2))
        assert bool((errors[0] <= errors[1]).all()), weight


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(list(Arithmetic)), st.floats(0, 4), st.floats(0, 1))
def test_scale_search_never_raises_the_error_of_a_random_group(
    seed: int, arithmetic: Arithmetic, power: float, zeros: float
) -> None:
    """From nearly equal weights to a single large one among zeros: sums of squares of a few and of many terms."""
    generator = torch.Generator().manual_seed(seed)
    weight_RC = torch.randn(64, 256, generator=generator)
    weight_RC = weight_RC.sign() * weight_RC.abs() ** power * (torch.rand(64, 256, generator=generator) >= zeros)
    errors = []
    for search in (ScaleSearch.MSE, ScaleSearch.NONE):
        restored, _ = nvfp4_parts(weight_RC, arithmetic, search)
        errors.append((restored.double() - weight_RC.double()).square().unflatten(1, (-1, 16)).sum(2))
    assert bool((errors[0] <= errors[1]).all())


def samples() -> dict[str, torch.Tensor]:
    """Return the weights of the table in quantization-formats.md, 7.1."""
    g = torch.Generator().manual_seed(1)
    gauss = torch.randn(256, 1536, generator=g)
    # a normal over the root of a chi-square with 5 degrees of freedom, per degree
    chi = torch.randn(5, 256, 1536, generator=g).square().mean(0).sqrt()
    outlier = torch.randn(256, 1536, generator=g)
    outlier[torch.rand(256, 1536, generator=g) < 0.0005] *= 20
    return {"gauss": gauss, "t5": gauss / chi, "outlier": outlier}


@pytest.mark.parametrize(
    ("sample", "plain", "searched"),
    [("gauss", 0.0951, 0.0812), ("t5", 0.0924, 0.0821), ("outlier", 0.0943, 0.0827)],
)
def test_scale_search_gets_to_the_error_of_an_exhaustive_one(sample: str, plain: float, searched: float) -> None:
    """The bands are 1 % wide: what two samples of this size differ by. A search over 112 steps gets .0821 to .0832."""
    weight_RC = (samples()[sample] * 0.02).to(torch.bfloat16)
    for search, expected in ((ScaleSearch.NONE, plain), (ScaleSearch.MSE, searched)):
        restored, _ = nvfp4_parts(weight_RC, FLOAT32, search)
        error = float((restored - weight_RC.float()).norm() / weight_RC.float().norm())
        assert abs(error - expected) < expected * 0.01


@pytest.mark.parametrize("sample", ["gauss", "t5", "outlier"])
def test_scale_search_finds_what_trying_all_scales_finds(sample: str) -> None:
    """All 126 scales for each group, against the seven neighbours that are tried."""
    weight_RC = samples()[sample][:16].to(torch.bfloat16)
    packed, local, divisor = QuantizeNvfp4(FLOAT32, ScaleSearch.MSE)(weight_RC, largest(weight_RC))
    restored = dequantize_nvfp4(packed, local, divisor.expand(len(weight_RC), 1), divides=True)
    found = (restored.double() - weight_RC.double()).square().sum()
    groups = weight_RC.double().unflatten(1, (-1, 16))
    every = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).double() / divisor.double().squeeze()
    values = unpack_e2m1(torch.arange(8, dtype=torch.uint8).view(1, -1))[0, 0::2].double()
    least = torch.full(groups.shape[:2], torch.inf, dtype=torch.float64)
    for step in every:
        distance = (groups.abs().unsqueeze(3) - values * step).abs().amin(3)
        least = torch.minimum(least, distance.square().sum(2))
    assert least.sum() <= found <= least.sum() * 1.001


@pytest.mark.parametrize("weight", ["normal", "zero rows", "single outlier", "columns of all sizes"])
def test_others_read_the_weights_that_we_read(weight: str) -> None:
    """compressed-tensors and modelopt decode what is written here to the values of converters.numerics.dequantize."""
    weight_RC = finite_as(hard_weights(256, 384)[weight], torch.bfloat16)
    codes, scale = QuantizeFp8Channel(FLOAT32)(weight_RC)
    assert torch.equal(ct_values(codes, scale, "channel"), scale_groups(decode(codes), scale, 384))
    codes, scale = QuantizeFp8Block(FLOAT32)(weight_RC)
    rows = scale.repeat_interleave(128, 0)
    assert torch.equal(ct_values(codes, scale, "block"), scale_groups(decode(codes), rows, 128))
    for group in (0, 32, 128):
        words, scale = QuantizeInt8Packed(FLOAT32, group)(weight_RC)
        ours = scale_groups(unpack_int32(words, 8, 384), scale, group or 384)
        assert torch.equal(ct_packed_values(words, scale, group, weight_RC.shape), ours)
    for search in ScaleSearch:
        made = QuantizeNvfp4(FLOAT32, search)(weight_RC, largest(weight_RC))
        ours, _ = nvfp4_parts(weight_RC, FLOAT32, search)
        assert torch.equal(ct_nvfp4_values(*made), ours)
        made = QuantizeNvfp4(MODELOPT, search)(weight_RC, largest(weight_RC))
        ours, _ = nvfp4_parts(weight_RC, MODELOPT, search)
        assert torch.equal(modelopt_nvfp4_values(*made), ours)
