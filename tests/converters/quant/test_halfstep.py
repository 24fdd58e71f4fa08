"""Half a step, by enumeration: what each code covers, and what the judgement of blocks makes of neighbours."""

import math
from itertools import pairwise

import pytest
import torch

from converters.formats.weights import Coding
from converters.numerics import fp8, int8, nvfp4
from converters.numerics.dequantize import unpack_int32
from converters.quant.halfstep import (
    SLACK,
    Block,
    Division,
    group_amax,
    is_right_tensor_scale,
    judge_block,
    wrong_local_scales,
    wrong_scales,
)
from converters.quant.lattice import Lattice, code_bits, lattice_of, look_up
from converters.quant.scheme import Arithmetic, ScaleSearch

E4M3 = lattice_of(Coding.SCALED, "F8_E4M3", 8)
E2M1 = lattice_of(Coding.NVFP4_DIVISOR, "U8", 4)
INT8 = lattice_of(Coding.SCALED, "I8", 8)
PACKED = lattice_of(Coding.PACKED_INT, "I32", 8)
INT4 = lattice_of(Coding.PACKED_INT, "I32", 4)


def test_values_of_e4m3_are_those_of_torch() -> None:
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert torch.equal(E4M3.values_V.nan_to_num(-1), theirs.nan_to_num(-1))
    assert (E4M3.low_V > E4M3.high_V).nonzero().flatten().tolist() == [0x7F, 0xFF]


def test_values_of_packed_integers_are_those_that_are_unpacked() -> None:
    codes = torch.arange(-128, 128).to(torch.int8).view(1, -1)
    words = int8.pack_int32(codes)
    bits = code_bits(words, Coding.PACKED_INT, 8, 256)
    assert torch.equal(look_up(PACKED.values_V, bits), unpack_int32(words, 8, 256))
    nibbles = torch.arange(256, dtype=torch.uint8).view(1, -1).view(torch.int32)
    bits = code_bits(nibbles, Coding.PACKED_INT, 4, 512)
    assert torch.equal(look_up(INT4.values_V, bits), unpack_int32(nibbles, 4, 512))


@pytest.mark.parametrize("lattice", [E4M3, E2M1, INT8, PACKED, INT4])
def test_ranges_of_codes_meet_in_the_middle_and_cover_everything(lattice: Lattice) -> None:
    rows = zip(lattice.values_V.tolist(), lattice.low_V.tolist(), lattice.high_V.tolist(), strict=True)
    covered = sorted({row for row in rows if not math.isnan(row[0])})
    assert covered[0][1] == -math.inf
    assert covered[-1][2] == math.inf
    for (value, _, high), (above, low, _) in pairwise(covered):
        assert high == low == (value + above) / 2


def test_rounding_of_torch_falls_into_the_range_of_its_code() -> None:
    values = torch.randn(1 << 16, generator=torch.Generator().manual_seed(0)) * 100
    codes = values.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).int()
    assert bool(((values >= E4M3.low_V[codes]) & (values <= E4M3.high_V[codes])).all())
    for step in (-1, 1):
        others = codes + step
        inside = (values >= E4M3.low_V[others & 0xFF]) & (values <= E4M3.high_V[others & 0xFF])
        assert not bool(inside.any())


def blocks(dtype: torch.dtype, arithmetic: Arithmetic) -> dict[str, tuple[Block, Lattice]]:
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scale = fp8.quantize_channel(weight, arithmetic)
    made = {"fp8": (Block(weight, code_bits(codes, Coding.SCALED, 8, 96), scale.float(), 96), E4M3)}
    codes, scale = int8.quantize_int8(weight, arithmetic, 32)
    made["int8"] = (Block(weight, code_bits(codes, Coding.SCALED, 8, 96), scale.float(), 32), INT8)
    largest = weight.float().abs().max().view(1, 1)
    codes, local, whole = nvfp4.quantize_nvfp4(weight, largest, arithmetic, ScaleSearch.NONE)
    bits = code_bits(codes, Coding.NVFP4_DIVISOR, 4, 96)
    made["nvfp4"] = (Block(weight, bits, local.float() / whole, 16), E2M1)
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["fp8", "int8", "nvfp4"])
@pytest.mark.parametrize("arithmetic", [Arithmetic.FLOAT32, Arithmetic.COMPRESSED_TENSORS])
def test_every_code_but_the_right_one_is_outside(arithmetic: Arithmetic, kind: str, dtype: torch.dtype) -> None:
    """All elements at once, each with the next code: none of them may pass, and as written all must."""
    block, lattice = blocks(dtype, arithmetic)[kind]
    is_narrow = arithmetic is Arithmetic.COMPRESSED_TENSORS and kind != "nvfp4"
    division = Division.WEIGHT_DTYPE if is_narrow else Division.FLOAT32
    assert not judge_block(block, lattice, division).outside_RC.any()
    order = lattice.values_V.nan_to_num(math.inf).argsort(stable=True)
    ranks = order.argsort()
    for step in (-1, 1):
        rank = ranks[block.bits_RC] + step
        bits = order[rank.clamp(0, len(order) - 1)].int()
        moved = judge_block(Block(block.source_RC, bits, block.scale_RG, block.group), lattice, division)
        same = look_up(lattice.values_V, bits) == look_up(lattice.values_V, block.bits_RC)
        assert bool((moved.outside_RC | same | is_tie(block, lattice, division, bits)).all())
        assert float(moved.outside_RC.float().mean()) > 0.9 - 0.1 * is_narrow


def is_tie(block: Block, lattice: Lattice, division: Division, bits: torch.Tensor) -> torch.Tensor:
    """Where the quotient is a midpoint, as far as fp32 can tell, both of its codes are right."""
    scale = block.scale_RG.repeat_interleave(block.group, dim=1)
    quotient = block.source_RC.float() / scale
    if division is Division.WEIGHT_DTYPE:
        quotient = quotient.to(block.source_RC.dtype).float()
    low, high = look_up(lattice.low_V, bits), look_up(lattice.high_V, bits)
    slack = 0 if division is Division.WEIGHT_DTYPE else quotient.abs() * SLACK
    return ((quotient - low).abs() <= slack) | ((quotient - high).abs() <= slack)


def test_clipping_is_counted() -> None:
    weight = torch.tensor([[6.0, 6.5, -7.0, 1.0] * 4])
    block = Block(weight, torch.tensor([[7, 7, 15, 2] * 4], dtype=torch.int32), torch.ones(1, 1), 16)
    judged = judge_block(block, E2M1, Division.FLOAT32)
    assert (int(judged.outside_RC.sum()), judged.clipped) == (0, 8)
    squares, errors, _ = judged.sums_R3[0].tolist()
    assert (squares, errors) == (4 * (36 + 42.25 + 49 + 1), 4 * (0.25 + 1))


def test_group_amax_of_ragged_blocks() -> None:
    weight = torch.arange(1.0, 36.0).view(5, 7)
    assert group_amax(weight, 4, 2).tolist() == [[11.0, 14.0], [25.0, 28.0], [32.0, 35.0]]
    assert group_amax(-weight, 0).flatten().tolist() == [7.0, 14.0, 21.0, 28.0, 35.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_scale_is_right_in_its_own_rounding_only(dtype: torch.dtype) -> None:
    amax = torch.rand(1000, 1, generator=torch.Generator().manual_seed(2)) + 0.01
    scale = (amax / 448).to(dtype)
    assert not wrong_scales(amax, scale, (448.0,)).any()
    width = torch.int16 if dtype is torch.bfloat16 else torch.int32
    # fp32 scales are granted the roundings of a reciprocal and a product
    far = 1 if dtype is torch.bfloat16 else 8
    for step in (-far, far):
        assert wrong_scales(amax, (scale.view(width) + step).view(dtype), (448.0,)).all()
    for value in (0.0, -1.0, math.inf, math.nan):
        assert wrong_scales(torch.ones(1, 1), torch.tensor([[value]]), (448.0,)).all()


def test_magnitudes_that_are_subnormal_may_be_raised() -> None:
    """ModelOpt's export keeps away from them: fp16's smallest normal number is 6.1e-5."""
    amax, least = torch.tensor([[5e-5]]), torch.finfo(torch.float16).smallest_normal
    for scale, is_wrong in ((5e-5, False), (least, False), (5.5e-5, True), (2 * least, True)):
        assert bool(wrong_scales(amax, torch.tensor([[scale]]) / 448, (448.0,), least).any()) is is_wrong


def test_zeros_take_any_positive_scale() -> None:
    zeros = torch.zeros(1, 1)
    assert not wrong_scales(zeros, torch.tensor([[0.0078125]]), (448.0,)).any()
    assert wrong_scales(zeros, torch.tensor([[0.0]]), (448.0,)).any()
    assert is_right_tensor_scale(0.0, 1.0, 2688.0, 2.0**-8)


@pytest.mark.parametrize("code", [0x01, 0x08, 0x38, 0x40, 0x60])
def test_local_scales_of_a_search_stay_in_its_range(code: int) -> None:
    local = torch.tensor([[code]], dtype=torch.uint8).view(torch.float8_e4m3fn)
    amax = local.float() * 6
    factor = torch.tensor(1.0)

    def is_wrong(offset: int, *, searched: bool) -> bool:
        moved = torch.tensor([[max(0, code + offset)]], dtype=torch.uint8).view(torch.float8_e4m3fn)
        return bool(wrong_local_scales(amax, moved, factor, 2.0**-24, searched=searched))

    assert [is_wrong(offset, searched=False) for offset in (-1, 0, 1)] == [True, False, True]
    assert [is_wrong(offset, searched=True) for offset in (-1, 0, 7, 8)] == [code == 1, False, False, True]


@pytest.mark.parametrize("by", [0.5, 0.99, 1.01, 2.0, -1.0, math.nan, math.inf, 0.0])
def test_a_tensor_scale_is_right_within_its_rounding(by: float) -> None:
    assert is_right_tensor_scale(3.0, 3.0 / 2688, 2688.0, 2.0**-24)
    assert is_right_tensor_scale(3.0, 3.0 / 2688 * 1.003, 2688.0, 2.0**-8)
    assert not is_right_tensor_scale(3.0, by * 3.0 / 2688, 2688.0, 2.0**-8)
