"""A hypothesis about one tensor of a candidate, tested on its bytes: a few rows first, then all of them.

What a hypothesis says is what the tensor was made from (other rows of the source) or how its codes are to be read
(other scales). It explains plain values that then agree bit for bit, and codes that then lie within half a step.
Shapes: R rows, C columns, G groups of columns that share a scale.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.checkpoint.dtypes import torch_dtype
from converters.quant.certificate import Relation
from converters.quant.halfstep import Block, Division, judge_block, spread
from converters.quant.judge import Pair
from converters.quant.lattice import look_up
from converters.quant.tiles import Tile, official_rows, read_values, tiles
from converters.schema import Tensor
from converters.source import Source

if TYPE_CHECKING:
    import torch

Rows = Callable[[int, int], "torch.Tensor"]
"""Rows [start, stop) of an official tensor, (R, C) in any float dtype."""
Span = tuple[int, int]

SAMPLE_ROWS = 16
# codes chosen by GPTQ lie within no half step: what they were made from leaves a tenth of the energy at most
_GRID_SHARE = 0.1
# two decoders may multiply in another order
_DECODED_SLACK = 2.0**-20


@dataclass(frozen=True, slots=True)
class Codes:
    """Codes of some rows by their bits, what they are multiplied with, and the columns that share a scale."""

    bits_RC: "torch.Tensor"
    scale_RG: "torch.Tensor"
    group: int


Recode = Callable[[Tile, int, int], Codes]
"""How rows [start, stop) of a piece are to be read."""


@dataclass(frozen=True, slots=True)
class Hypothesis:
    """What would explain a tensor.

    Attributes:
        rows: what it was made from; None: the source's own rows.
        recode: how its codes are to be read; None: as they are stored.
        span: the rows that it speaks of; None: all.
    """

    rows: Rows | None = None
    recode: Recode | None = None
    span: Span | None = None


def as_stored(tile: Tile, start: int, stop: int) -> Codes:
    """Return codes and scales as they are."""
    return Codes(tile.bits(start, stop), tile.combined_scale(start, stop), tile.group)


def rows_of(source: Source, tensor: Tensor) -> Rows:
    """Return the rows of an official tensor of a source."""
    pieces = tiles(source, tensor)
    return lambda start, stop: official_rows(pieces, tensor, start, stop, read_values)


def own_rows(pair: Pair) -> Rows:
    """Return the rows that a tensor should have been made from."""
    return lambda start, stop: official_rows(pair.before, pair.tensor, start, stop, read_values)


def candidate_rows(pair: Pair) -> Rows:
    """Return the rows of the candidate as values."""
    return lambda start, stop: official_rows(pair.after, pair.tensor, start, stop, read_values)


def is_proved(pair: Pair, hypothesis: Hypothesis, *, sampled: bool = False) -> bool:
    """Return whether a hypothesis explains every element; of a few rows if `sampled`, which says less.

    Memory: a block of rows of both sides.
    """
    first, last = hypothesis.span or (0, pair.tensor.shape[0])
    if last <= first or not _explains(pair, hypothesis, _sample(first, last)):
        return False
    return sampled or _explains(pair, hypothesis, _blocks(pair, first, last))


def _explains(pair: Pair, hypothesis: Hypothesis, spans: Iterable[Span]) -> bool:
    return all(not unexplained(pair, hypothesis, start, stop) for start, stop in spans)


def _sample(first: int, last: int) -> list[Span]:
    """Return a few rows at the beginning, in the middle and at the end."""
    middle = (first + last) // 2
    spans = [(first, first + SAMPLE_ROWS), (middle, middle + SAMPLE_ROWS), (last - SAMPLE_ROWS, last)]
    return [(max(first, start), min(last, stop)) for start, stop in spans]


def _blocks(pair: Pair, first: int, last: int) -> Iterator[Span]:
    return ((start, min(start + pair.step, last)) for start in range(first, last, pair.step))


def blocks(pair: Pair) -> Iterator[Span]:
    """Yield all rows, a block each."""
    return _blocks(pair, 0, pair.tensor.shape[0])


def unexplained(pair: Pair, hypothesis: Hypothesis, start: int, stop: int) -> int:
    """Return how many elements of rows [start, stop) are not what the hypothesis makes them."""
    rows = hypothesis.rows or own_rows(pair)
    if pair.relation in (Relation.ROUNDED, Relation.GRID):
        found = (_outside(pair, tile, (rows, hypothesis.recode), start, stop) for tile in pair.after)
        return sum(int(outside_RC.sum()) for _, _, outside_RC in found)
    expected_RC, is_coded = rows(start, stop), not pair.after[0].format.is_plain
    found_RC = official_rows(pair.after, pair.tensor, start, stop, _reader(hypothesis.recode))
    if is_coded:
        expected_RC = expected_RC.float()
        # written so that NaN is never near
        return int((~((found_RC - expected_RC).abs() <= _DECODED_SLACK * expected_RC.abs())).sum())
    # NaN differs from itself, and so explains nothing
    return int((expected_RC.to(torch_dtype(pair.dtype)) != found_RC).sum())


def _reader(recode: Recode | None) -> Callable[[Tile, int, int], "torch.Tensor"]:
    if recode is None:
        return read_values

    def read(tile: Tile, start: int, stop: int) -> "torch.Tensor":
        codes = recode(tile, start, stop)
        scale_RC = spread(codes.scale_RG, codes.group, tile.stored.columns)
        return look_up(tile.lattice.values_V, codes.bits_RC).mul_(scale_RC)

    return read


def wrong_places(pair: Pair, start: int, stop: int) -> list[tuple[int, int]]:
    """Return row and column of every element of rows [start, stop) that is not what it must be."""
    rows = own_rows(pair)
    if pair.relation in (Relation.ROUNDED, Relation.GRID):
        found = (_outside(pair, tile, (rows, None), start, stop) for tile in pair.after)
        places = [
            (top + row, left + column) for top, left, mask_RC in found for row, column in mask_RC.nonzero().tolist()
        ]
        return sorted(places)
    expected_RC, found_RC = rows(start, stop), candidate_rows(pair)(start, stop)
    if pair.after[0].format.is_plain:
        expected_RC = expected_RC.to(torch_dtype(pair.dtype))
    return [(start + row, column) for row, column in (expected_RC != found_RC).nonzero().tolist()]


def _outside(
    pair: Pair, tile: Tile, how: tuple[Rows, Recode | None], start: int, stop: int
) -> tuple[int, int, "torch.Tensor"]:
    """Return first row and column of a piece within rows [start, stop), and which elements are beyond half a step."""
    import torch

    rows, recode = how
    top, bottom = tile.place.piece.rows
    left, right = tile.place.piece.columns
    first, last = max(start, top), min(stop, bottom)
    if first >= last:
        return first, left, torch.zeros(0, right - left, dtype=torch.bool)
    source_RC = rows(first, last)[:, left:right]
    codes = (recode or as_stored)(tile, first - top, last - top)
    block = Block(source_RC, codes.bits_RC, codes.scale_RG, codes.group)
    if pair.relation is Relation.GRID:
        squares, errors, _ = judge_block(block, tile.lattice, Division.FLOAT32).sums_R3.sum(dim=0).tolist()
        return first, left, torch.full_like(source_RC, errors > _GRID_SHARE * squares, dtype=torch.bool)
    masks = (judge_block(block, tile.lattice, division).outside_RC for division in Division)
    return first, left, min(masks, key=lambda mask_RC: int(mask_RC.sum()))
