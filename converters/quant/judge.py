"""One official tensor of two checkpoints: read block by block from both, compared as their formats ask for.

Memory: a block of rows and its working copies, whatever the size of the tensor.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from converters.checkpoint.dtypes import FLOAT_DTYPES, torch_dtype
from converters.formats.weights import Coding, Part, Use
from converters.quant.certificate import Relation, TensorFigures
from converters.quant.halfstep import (
    ROUNDOFF,
    Block,
    Division,
    group_amax,
    judge_block,
    row_sums,
    wrong_local_scales,
    wrong_scales,
)
from converters.quant.tally import Tally
from converters.quant.tiles import Tile, official_rows, read_values, shares_tensor_scale
from converters.schema import Tensor

# elements of a block: its working copies stay in the cache of a core
BLOCK_ELEMENTS = 1 << 18
# bytes in use for each element of a block: values, codes and bounds of both sides in fp32
WORKING_BYTES = 64
PLAIN = "plain"
_NVFP4_RANGE = 448.0


@dataclass(frozen=True, slots=True)
class Rounding:
    """What is known of how the codes of a tensor were chosen.

    Attributes:
        searched: NVFP4's local scales may be those of least error rather than those of the largest magnitude.
        on_grid: codes were not rounded to nearest.
        division: the rounding of quotients to try first.
    """

    searched: bool = True
    on_grid: bool = False
    division: Division = Division.FLOAT32


@dataclass(frozen=True, slots=True)
class Pair:
    """An official tensor with its pieces in the source and in the candidate."""

    tensor: Tensor
    before: tuple[Tile, ...]
    after: tuple[Tile, ...]
    rounding: Rounding = Rounding()

    @property
    def relation(self) -> Relation:
        """What the candidate's tensor must be to the source's."""
        was_plain, is_plain = self.before[0].format.is_plain, self.after[0].format.is_plain
        if was_plain and is_plain:
            return Relation.EQUAL if self.source_dtype == self.dtype else Relation.CAST
        if was_plain:
            return Relation.GRID if self.rounding.on_grid else Relation.ROUNDED
        return Relation.DEQUANTIZED if is_plain else Relation.EQUAL

    @property
    def scheme(self) -> str:
        """How the candidate stores it."""
        return PLAIN if self.after[0].format.is_plain else self.after[0].format.name

    @property
    def source_dtype(self) -> str:
        """Dtype of the source's values or codes."""
        return self.before[0].format.used(Use.CODES)[0].dtype

    @property
    def dtype(self) -> str:
        """Dtype of the candidate's values or codes."""
        return self.after[0].format.used(Use.CODES)[0].dtype

    @property
    def step(self) -> int:
        """Rows of a block: multiples of the rows that share a scale."""
        columns = self.tensor.shape[1] if len(self.tensor.shape) > 1 else 1
        grain = max(tile.grain for tile in self.after)
        return max(grain, BLOCK_ELEMENTS // columns // grain * grain)

    def blocks(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of official rows, a block each."""
        rows = self.tensor.shape[0]
        return ((start, min(start + self.step, rows)) for start in range(0, rows, self.step))

    @property
    def working_bytes(self) -> int:
        """Memory in use for one block."""
        columns = self.tensor.shape[1] if len(self.tensor.shape) > 1 else 1
        return min(self.step, self.tensor.shape[0]) * columns * WORKING_BYTES


def judge_tensor(pair: Pair, on_block: Callable[[], None]) -> TensorFigures:
    """Compare a tensor; `on_block` is called after each block and may raise to end it."""
    if pair.relation in (Relation.ROUNDED, Relation.GRID):
        return _judge_codes(pair, on_block)
    tally = Tally()
    if not pair.before[0].format.is_plain and not pair.after[0].format.is_plain:
        _compare_codes(pair, tally, on_block)
    else:
        _compare_values(pair, tally, on_block)
    return tally.figures(pair, "", None)


def _judge_codes(pair: Pair, on_block: Callable[[], None]) -> TensorFigures:
    tally, division = _judge_rounding(pair, pair.rounding.division, on_block), pair.rounding.division
    if tally.outside and pair.relation is Relation.ROUNDED and pair.source_dtype != "F32":
        other = Division.WEIGHT_DTYPE if division is Division.FLOAT32 else Division.FLOAT32
        again = _judge_rounding(pair, other, on_block)
        if again.outside < tally.outside:
            tally, division = again, other
    return tally.figures(pair, division, _tensor_scale(pair.after[0]))


def _tensor_scale(tile: Tile) -> float | None:
    """Return the scale of the whole tensor as a factor, if there is one."""
    if not shares_tensor_scale(tile):
        return None
    value = float(tile.scale(tile.scales[-1], 0, 1).float())
    if tile.format.coding is Coding.NVFP4_DIVISOR:
        return 1 / value if value else math.inf
    return value


def _judge_rounding(pair: Pair, division: Division, on_block: Callable[[], None]) -> Tally:
    tally = Tally()
    for tile in pair.after:
        top = tile.place.piece.rows[0]
        left, right = tile.place.piece.columns
        for start in range(0, tile.num_rows, pair.step):
            stop = min(start + pair.step, tile.num_rows)
            whole_RC = official_rows(pair.before, pair.tensor, top + start, top + stop, read_values)
            source_RC = whole_RC[:, left:right]
            tally.amax = max(tally.amax, float(source_RC.abs().max()))
            bits_RC = tile.bits(start, stop)
            block = Block(source_RC, bits_RC, tile.combined_scale(start, stop), tile.group)
            judged = judge_block(block, tile.lattice, division)
            tally.clipped += judged.clipped
            tally.sums_R3.append(judged.sums_R3)
            outside_RC = judged.outside_RC
            if pair.relation is Relation.GRID:
                outside_RC = ~torch.isfinite(judged.decoded_RC)
            tally.add_outside(outside_RC, _describer(source_RC, judged.decoded_RC, top + start, left))
            _judge_scales(pair, tally, tile, (whole_RC, source_RC), start, stop)
            on_block()
    return tally


def _describer(source_RC: torch.Tensor, found_RC: torch.Tensor, top: int, left: int) -> Callable[[int, int], str]:
    def describe(row: int, column: int) -> str:
        before, after = float(source_RC[row, column]), float(found_RC[row, column])
        return f"at row {top + row}, column {left + column}: {before:.6g} became {after:.6g}"

    return describe


def _judge_scales(
    pair: Pair, tally: Tally, tile: Tile, rows: tuple[torch.Tensor, torch.Tensor], start: int, stop: int
) -> None:
    """Hold the scales of a block of rows against the source; that of the whole tensor is left to the end."""
    part = tile.scales[0]
    if part.grain == (0, 0):
        return
    whole_RC, source_RC = rows
    # a row's scale serves all of it, also where the row is stored in several pieces
    grain_rows = part.grain[0] or 1
    amax_SG = group_amax(source_RC if part.grain[1] else whole_RC, part.grain[1], grain_rows)
    scale_SG = tile.scale(part, start, stop)
    if tile.format.coding in (Coding.NVFP4_DIVISOR, Coding.NVFP4_FACTOR):
        factor = torch.tensor(_tensor_scale(tile), dtype=torch.float64)
        roundoff = ROUNDOFF.get(source_RC.dtype, ROUNDOFF[torch.float32])
        wrong_SG = wrong_local_scales(amax_SG, scale_SG, factor, roundoff, searched=pair.rounding.searched)
    else:
        least = torch.finfo(source_RC.dtype).smallest_normal
        wrong_SG = wrong_scales(amax_SG, scale_SG, tile.lattice.ranges, least)
    top, first_group = tile.place.piece.rows[0] + start, tile.place.piece.columns[0] // (part.grain[1] or 1)

    def describe(row: int, column: int) -> str:
        place = f"row {top + row * grain_rows}" + (f", group {first_group + column}" if part.grain[1] else "")
        scale, amax = float(scale_SG[row, column].float()), float(amax_SG[row, column])
        return f"{scale:.6g} for a magnitude of {amax:.6g} at {place}"

    tally.add_scales(wrong_SG, describe)


def _compare_values(pair: Pair, tally: Tally, on_block: Callable[[], None]) -> None:
    """Compare plain weights with what they were copied, cast or decoded from."""
    target = torch_dtype(pair.dtype)
    is_copy = pair.relation is Relation.EQUAL
    for start, stop in pair.blocks():
        before_RC = official_rows(pair.before, pair.tensor, start, stop, read_values)
        after_RC = official_rows(pair.after, pair.tensor, start, stop, read_values)
        expected_RC = (before_RC if is_copy else before_RC.to(target)).contiguous()
        differs_RC = _bits(expected_RC) != _bits(after_RC.contiguous())
        tally.add_outside(differs_RC, _describer(before_RC, after_RC, start, 0))
        if not is_copy:
            tally.sums_R3.append(row_sums(before_RC.float(), after_RC.float()))
        on_block()
    if is_copy and tally.outside:
        _add_sums(pair, tally, on_block)


def _add_sums(pair: Pair, tally: Tally, on_block: Callable[[], None]) -> None:
    """Measure how far apart two tensors are that should be equal."""
    for start, stop in pair.blocks():
        sides = [official_rows(side, pair.tensor, start, stop, read_values) for side in (pair.before, pair.after)]
        tally.sums_R3.append(row_sums(sides[0].float(), sides[1].float()))
        on_block()


def _bits(values_RC: torch.Tensor) -> torch.Tensor:
    return values_RC.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values_RC.element_size()])


def _compare_codes(pair: Pair, tally: Tally, on_block: Callable[[], None]) -> None:
    """Compare codes and scales that were copied, NVFP4's global scale maybe as its reciprocal."""
    ours, theirs = pair.before[0].format, pair.after[0].format
    is_inverted = {ours.coding, theirs.coding} == {Coding.NVFP4_DIVISOR, Coding.NVFP4_FACTOR}
    if (ours.num_bits, len(pair.before[0].scales)) != (theirs.num_bits, len(pair.after[0].scales)) or (
        ours.coding is not theirs.coding and not is_inverted
    ):
        tally.outside, tally.first = pair.tensor.numel, f"format {theirs.name}, {ours.name} in the source"
        return
    for start, stop in pair.blocks():
        bits = [official_rows(side, pair.tensor, start, stop, Tile.bits) for side in (pair.before, pair.after)]
        differs_RC = bits[0] != bits[1]
        for index in range(len(pair.after[0].scales)):
            read = partial(_read_scale, index)
            scales = [official_rows(side, pair.tensor, start, stop, read) for side in (pair.before, pair.after)]
            is_same_RC = scales[0] == scales[1]
            if is_inverted and index:
                is_same_RC = (scales[0].reciprocal() == scales[1]) | (scales[1].reciprocal() == scales[0])
            differs_RC |= ~is_same_RC
        if bool(differs_RC.any()):
            sides = [official_rows(side, pair.tensor, start, stop, read_values) for side in (pair.before, pair.after)]
            tally.add_outside(differs_RC, _describer(sides[0], sides[1], start, 0))
        on_block()
    if tally.outside:
        _add_sums(pair, tally, on_block)


def _read_scale(index: int, tile: Tile, start: int, stop: int) -> torch.Tensor:
    return tile.wide_scale(index, start, stop)


def scale_limit(tile: Tile) -> tuple[float, ...]:
    """Return what a scale for the whole tensor may map its largest magnitude to."""
    is_nvfp4 = tile.format.coding in (Coding.NVFP4_DIVISOR, Coding.NVFP4_FACTOR)
    return tuple(limit * (_NVFP4_RANGE if is_nvfp4 else 1.0) for limit in tile.lattice.ranges)


def scale_roundoff(pair: Pair) -> float:
    """Return the unit roundoff that the scale of a whole tensor may have been computed with."""
    part: Part = pair.after[0].scales[-1]
    dtypes = [dtype for dtype in (pair.source_dtype, part.dtype) if dtype in FLOAT_DTYPES]
    return max(ROUNDOFF[torch_dtype(dtype)] for dtype in dtypes)
