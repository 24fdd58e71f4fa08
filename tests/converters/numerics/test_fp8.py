"""FP8 per channel: the format by enumeration, its scales, and compressed-tensors as the judge of bytes."""

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.errors import InputError
from converters.numerics.fp8 import E4M3_MAX, channel_scales, dequantize_channel, quantize_channel
from converters.quant.scheme import Arithmetic

ARGS = QuantizationArgs(num_bits=8, type="float", symmetric=True, strategy="channel")


def peer(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales as compressed-tensors computes them."""
    scale_O1, zero_point = calculate_qparams(weight_OI.amin(1, keepdim=True), weight_OI.amax(1, keepdim=True), ARGS)
    return quantize(weight_OI, scale_O1, zero_point, ARGS, dtype=torch.float8_e4m3fn), scale_O1


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.uint8).flatten().tolist()


def matrices() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(7)
    normal = torch.randn(67, 301, generator=g)
    outlier = normal.clone()
    outlier[:, 5] *= 1000
    return {
        "normal": normal,
        "heavy-tailed": normal / torch.rand(67, 301, generator=g).clamp_min(1e-3),
        "all-zero": torch.zeros(3, 40),
        "zero rows": normal * (torch.arange(67) % 3 > 0)[:, None],
        "denormal": normal * 1e-39,
        "tiny": normal * 1e-30,
        "huge": normal * 1e37,
        "single outlier": outlier,
        "negative only": -normal.abs(),
        "one column": normal[:, :1],
        "one element": torch.tensor([[-0.3]]),
        "negative zero": torch.full((2, 8), -0.0),
    }


@pytest.mark.parametrize("name", matrices())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_compressed_tensors_arithmetic_is_theirs_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    weight_OI = matrices()[name].to(dtype)
    codes, scales = quantize_channel(weight_OI, Arithmetic.COMPRESSED_TENSORS)
    expected_codes, expected_scales = peer(weight_OI)
    assert scales.dtype == dtype
    assert bits(scales) == bits(expected_scales)
    assert bits(codes) == bits(expected_codes)


@pytest.mark.parametrize("name", matrices())
def test_default_arithmetic_has_their_scales_and_no_more_error(name: str) -> None:
    weight_OI = matrices()[name].to(torch.bfloat16)
    codes, scales = quantize_channel(weight_OI, Arithmetic.FLOAT32)
    peer_codes, peer_scales = peer(weight_OI)
    assert bits(scales) == bits(peer_scales)
    ours = (dequantize_channel(codes, scales).double() - weight_OI.double()).norm()
    theirs = (dequantize_channel(peer_codes, peer_scales).double() - weight_OI.double()).norm()
    assert ours <= theirs


def test_default_arithmetic_has_less_error_on_gaussian_weights() -> None:
    weight_OI = torch.randn(256, 1024, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    errors = {}
    for arithmetic in Arithmetic:
        restored = dequantize_channel(*quantize_channel(weight_OI, arithmetic))
        errors[arithmetic] = float((restored - weight_OI.float()).norm() / weight_OI.float().norm())
    assert 0.0262 < errors[Arithmetic.FLOAT32] < errors[Arithmetic.COMPRESSED_TENSORS] < 0.0269


@pytest.mark.parametrize("arithmetic", Arithmetic)
def test_every_code_survives_a_round_trip(arithmetic: Arithmetic) -> None:
    """With scale 1 every E4M3 value quantizes to itself, both signs and the zeros included."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(torch.float8_e4m3fn).float()
    finite = values[torch.isfinite(values)]
    assert len(finite) == 254
    quantized, scale = quantize_channel(finite[None].to(torch.bfloat16), arithmetic)
    assert scale.item() == 1.0
    expected = codes[torch.isfinite(values)].tolist()
    if arithmetic is Arithmetic.COMPRESSED_TENSORS:
        expected = [0 if code == 0x80 else code for code in expected]  # their zero point cancels a negative zero
    assert bits(quantized) == expected


@pytest.mark.parametrize("arithmetic", Arithmetic)
def test_ties_go_to_the_even_code_and_neighbours_to_the_nearer_one(arithmetic: Arithmetic) -> None:
    """Every midpoint of two neighbouring codes, positive and negative, and the points just beside it."""
    values = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    low, high = values[:-1], values[1:]
    middle = (low + high) / 2
    even = torch.where(torch.arange(len(low)) % 2 == 0, low, high)
    nudge = (high - low) / 64
    for sign in (1.0, -1.0):
        points = torch.cat([middle, middle - nudge, middle + nudge, torch.tensor([E4M3_MAX])]) * sign
        expected = torch.cat([even, low, high, torch.tensor([E4M3_MAX])]) * sign
        codes, scale = quantize_channel(points[None], arithmetic)
        assert scale.item() == 1.0
        assert torch.equal(codes.float()[0], expected)


def test_scale_rounded_down_saturates_instead_of_becoming_nan() -> None:
    """A bf16 scale below amax / 448 puts the largest weight above 448, which the bare cast turns into NaN."""
    candidates = (torch.arange(256) / 256 + 1).to(torch.bfloat16)[:, None]
    codes, scales = quantize_channel(candidates, Arithmetic.FLOAT32)
    assert bool((candidates.float() / scales.float() > E4M3_MAX).any())
    assert torch.equal(codes.float(), torch.full_like(candidates.float(), E4M3_MAX))


def test_zero_row_has_machine_epsilon_as_scale_and_zero_codes() -> None:
    codes, scales = quantize_channel(torch.zeros(2, 16, dtype=torch.bfloat16), Arithmetic.FLOAT32)
    assert scales.flatten().tolist() == [0.0078125, 0.0078125]
    assert bits(codes) == [0] * 32


@pytest.mark.parametrize("arithmetic", Arithmetic)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weight_is_left_as_it_was(arithmetic: Arithmetic, dtype: torch.dtype) -> None:
    """An in-place division once wrote the scaled values back into fp32 weights, for which .float() is no copy."""
    weight_OI = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight_OI.clone()
    quantize_channel(weight_OI, arithmetic)
    assert torch.equal(weight_OI, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_non_finite_weight_is_refused_with_its_row(value: float) -> None:
    weight_OI = torch.ones(4, 8)
    weight_OI[2, 3] = value
    with pytest.raises(InputError, match="row 2: expected finite weights"):
        channel_scales(weight_OI)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), st.floats(-20, 10))
def test_every_element_is_within_half_a_step_of_its_source(seed: int, dtype: torch.dtype, log_size: float) -> None:
    """|w - q s| <= max(|w| / 16, s / 1024), half the distance of neighbouring codes; saturation adds what is above."""
    generator = torch.Generator().manual_seed(seed)
    weight_OI = (torch.randn(5, 33, generator=generator) * 10 ** (log_size / 4)).to(dtype)
    codes, scales = quantize_channel(weight_OI, Arithmetic.FLOAT32)
    w, s = weight_OI.double(), scales.double()
    bound = torch.maximum(w.abs() / 16, s / 1024) + (w.abs() - E4M3_MAX * s).clamp_min(0)
    # one fp32 rounding of the quotient may move a value across an exact midpoint
    assert bool(((codes.double() * s - w).abs() <= bound * (1 + 2**-20)).all())


@pytest.mark.parametrize("size", [3.7e-5, 2e-4, 1e-5, 1e-3, 1.0])
def test_small_fp16_rows_keep_their_precision(size: float) -> None:
    """An fp16 scale is subnormal for such rows: the codes saturated, and weights lost up to 28 %."""
    weight_OI = (torch.randn(8, 256, generator=torch.Generator().manual_seed(0)) * size / 4).to(torch.float16)
    codes, scales = quantize_channel(weight_OI, Arithmetic.FLOAT32)
    assert scales.dtype == torch.float32
    error = (dequantize_channel(codes, scales) - weight_OI.float()).norm() / weight_OI.float().norm()
    assert error < 0.03
