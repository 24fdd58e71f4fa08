"""What the values of a tensor themselves show: nothing, ones, NaN, a factor, coarser steps, a flipped bit."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.diagnosis.cause import CauseCode
from converters.diagnosis.explained import Explained
from converters.diagnosis.hypothesis import Hypothesis, Rows, blocks, candidate_rows, own_rows, wrong_places
from converters.diagnosis.orders import Guess
from converters.quant.certificate import Relation
from converters.quant.halfstep import ROUNDOFF, SLACK, spread
from converters.quant.judge import Pair
from converters.quant.lattice import look_up
from converters.quant.tiles import Tile, official_rows
from converters.schema import Role

if TYPE_CHECKING:
    import torch

# so few elements are told one by one
FEW = 8
_E4M3_MAX, _INT8_MAX = 448.0, 127.0
_NORMS = (Role.NORM, Role.QK_NORM)


def constant(pair: Pair) -> Explained | None:
    """Return that a tensor is zero, all ones (a norm's), or has NaN or Inf, if it is so and its source is not."""
    import torch

    low, high, bad = math.inf, -math.inf, 0
    rows = candidate_rows(pair)
    for start, stop in blocks(pair):
        values_RC = rows(start, stop).float()
        bad += int((~torch.isfinite(values_RC)).sum())
        low, high = min(low, float(values_RC.min())), max(high, float(values_RC.max()))
    if bad:
        words = "it has NaN or Inf"
        return Explained(pair.tensor, CauseCode.NON_FINITE, words, f"{bad} of {pair.tensor.numel} elements")
    if low == high == 0:
        return Explained(pair.tensor, CauseCode.ZERO, "it is zero", f"all {pair.tensor.numel} elements are 0")
    if low == high == 1 and pair.tensor.spec.role in _NORMS:
        words, told = "its gain is lost", f"all {pair.tensor.numel} elements are 1, as in a norm without weights"
        return Explained(pair.tensor, CauseCode.IDENTITY_GAIN, words, told)
    return None


def few_elements(pair: Pair) -> Explained | None:
    """Return which elements differ, if they are few; of each, whether it is by a single bit."""
    found: list[tuple[int, int]] = []
    for start, stop in blocks(pair):
        found += wrong_places(pair, start, stop)
        if len(found) > FEW:
            return None
    if not found or len(found) > pair.tensor.numel // 4:
        return None
    told = [_flip(pair, row, column) for row, column in found]
    places = ", ".join(f"[{row}, {column}]" for row, column in found)
    many = "element" if len(found) == 1 else f"{len(found)} elements"
    words = f"{many} {places} {'differs' if len(found) == 1 else 'differ'}"
    if all(bit for _, bit in told):
        words += " by a single bit" + ("" if len(found) == 1 else " each")
    rest = f"; the other {pair.tensor.numel - len(found)} are right"
    return Explained(pair.tensor, CauseCode.FEW_ELEMENTS, words, "; ".join(text for text, _ in told) + rest)


def _dtype(pair: Pair) -> "torch.dtype":
    import torch

    from converters.checkpoint.dtypes import torch_dtype

    return torch_dtype(pair.dtype) if pair.after[0].format.is_plain else torch.float32


def _flip(pair: Pair, row: int, column: int) -> tuple[str, bool]:
    """Return what became of one element, and whether its stored bits differ from right ones in one place."""
    before, after = (float(rows(row, row + 1)[0, column].float()) for rows in (own_rows(pair), candidate_rows(pair)))
    words, place = f"{before:.6g} became {after:.6g}", _single_bit(pair, row, column)
    return (f"{words}, bit {place} flipped", True) if place is not None else (words, False)


def _single_bit(pair: Pair, row: int, column: int) -> int | None:
    """Return the one bit in which the stored element differs from a right one; None if there are several."""
    right, stored = _stored_bits(pair, row, column)
    changes = [bits ^ stored for bits in right]
    return next((change.bit_length() - 1 for change in changes if change.bit_count() == 1), None)


def _stored_bits(pair: Pair, row: int, column: int) -> tuple[list[int], int]:
    """Return the bits that would be right for an element, and those that are stored."""
    import torch

    if pair.after[0].format.is_plain:
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[_dtype(pair).itemsize]
        mask = (1 << 8 * _dtype(pair).itemsize) - 1
        expected, found = (
            int(rows(row, row + 1)[0, column].to(_dtype(pair)).view(kind)) & mask
            for rows in (own_rows(pair), candidate_rows(pair))
        )
        return [expected], found
    tile = next(tile for tile in pair.after if tile.place.piece.rows[0] <= row < tile.place.piece.rows[1])
    own = row - tile.place.piece.rows[0]
    scale_RC = spread(tile.combined_scale(own, own + 1), tile.group, tile.stored.columns)
    local = column - tile.place.piece.columns[0]
    if not 0 <= local < tile.stored.columns:
        return [], 0
    scale = float(scale_RC[0, local if scale_RC.shape[1] > 1 else 0])
    quotient = float(own_rows(pair)(row, row + 1)[0, column].float()) / scale if scale else math.nan
    lattice = tile.lattice
    inside_V = (lattice.low_V <= quotient) & (quotient <= lattice.high_V)
    return inside_V.nonzero()[:, 0].tolist(), int(tile.bits(own, own + 1)[0, local])


@dataclass(slots=True)
class _Factor:
    """The factors that explain all elements so far: an interval."""

    low: float = -math.inf
    high: float = math.inf

    def take(self, low_N: "torch.Tensor", high_N: "torch.Tensor") -> bool:
        """Narrow it by the interval of each element; return whether any factor is left."""
        if low_N.numel():
            self.low, self.high = max(self.low, float(low_N.max())), min(self.high, float(high_N.min()))
        return self.low <= self.high


def gain(pair: Pair, baked: float) -> Explained | None:
    """Return the one factor that the source's values were multiplied with, if one explains every element.

    Args:
        pair: the tensor.
        baked: routed_scaling_factor, which is told by name.
    """
    for sign in (1.0, -1.0):
        factor = _factor(pair, sign)
        if factor is not None and not factor.low <= 1 <= factor.high:
            return _gain_words(pair, sign, factor, baked)
        if factor is not None and sign < 0:
            words, told = "its signs are turned", f"all {pair.tensor.numel} elements are -1 times the source's"
            return Explained(pair.tensor, CauseCode.NEGATED, words, told)
    return None


def _gain_words(pair: Pair, sign: float, factor: _Factor, baked: float) -> Explained:
    middle, width = sign * (factor.low + factor.high) / 2, (factor.high - factor.low) / 2
    shortest = sign * _shortest(factor.low, factor.high)
    told = f"one factor {middle:.6g} +- {width:.1g} explains all {pair.tensor.numel} elements"
    for value, name in ((baked, "routed_scaling_factor"), (1 / baked, "1 / routed_scaling_factor")):
        if factor.low <= value <= factor.high and baked != 1 and sign > 0:
            words = f"it is multiplied by {name}, {value:.6g}"
            return Explained(pair.tensor, CauseCode.FACTOR_BAKED_IN, words, told)
    return Explained(pair.tensor, CauseCode.GAIN, f"it is multiplied by {shortest:.6g}", told)


def _shortest(low: float, high: float) -> float:
    """Return the number with the fewest decimals within an interval: what tensors with one factor have in common."""
    middle = (low + high) / 2
    return next((value for digits in range(8) for value in (round(middle, digits),) if low <= value <= high), middle)


def _factor(pair: Pair, sign: float) -> _Factor | None:
    """Return the factors that map the source's values to what the candidate's stand for."""
    import torch

    found, own = _Factor(0.0), own_rows(pair)
    for start, stop in blocks(pair):
        low_RC, high_RC = _bounds(pair, start, stop)
        source_RC = own(start, stop).double() * sign
        if bool(((source_RC == 0) & ~((low_RC <= 0) & (high_RC >= 0))).any()):
            return None
        is_up, is_down = source_RC > 0, source_RC < 0
        left, right = low_RC.double() / source_RC, high_RC.double() / source_RC
        lows, highs = torch.cat((left[is_up], right[is_down])), torch.cat((right[is_up], left[is_down]))
        if not found.take(lows, highs):
            return None
    return found if math.isfinite(found.high) and found.high > 0 else None


def _bounds(pair: Pair, start: int, stop: int) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Return between what the source's values lie that would have become the candidate's, fp32 (R, C) both."""
    import torch

    if pair.relation not in (Relation.ROUNDED, Relation.GRID):
        values_RC = candidate_rows(pair)(start, stop)
        roundoff = ROUNDOFF.get(values_RC.dtype, SLACK)
        ends = values_RC.double() * (1 - roundoff), values_RC.double() * (1 + roundoff)
        return torch.minimum(*ends), torch.maximum(*ends)

    def side(table: str) -> "torch.Tensor":
        def read(tile: Tile, first: int, last: int) -> "torch.Tensor":
            scale_RC = spread(tile.combined_scale(first, last), tile.group, tile.stored.columns)
            ends_RC = look_up(getattr(tile.lattice, table), tile.bits(first, last))
            return ends_RC * scale_RC

        return official_rows(pair.after, pair.tensor, start, stop, read)

    low_RC, high_RC = side("low_V"), side("high_V")
    slack = ROUNDOFF.get(own_rows(pair)(start, start + 1).dtype, SLACK)
    return low_RC - low_RC.abs() * slack, high_RC + high_RC.abs() * slack


def rounding_guesses(pair: Pair) -> Iterator[Guess]:
    """Yield formats that values may have gone through on their way, with less precision than they are stored in."""
    import torch

    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield _rounded_guess(pair, f"its values went through {name}", _through(own_rows(pair), dtype))
    yield _rounded_guess(pair, "its values went through float8_e4m3fn", _through_e4m3(own_rows(pair)))
    for limit, name in ((_E4M3_MAX, "FP8 per row"), (_INT8_MAX, "INT8 per row")):
        yield _rounded_guess(pair, f"its values went through {name}", _through_codes(own_rows(pair), limit))
    if pair.relation is Relation.DEQUANTIZED:
        words, told = "its codes were written as if they were values", "all elements are the codes without their scales"
        yield Explained(pair.tensor, CauseCode.UNSCALED, words, told), Hypothesis(_unscaled(pair))


def _rounded_guess(pair: Pair, words: str, rows: Rows) -> Guess:
    codes = {Role.ROUTER: CauseCode.ROUTER_QUANTIZED, Role.ROUTER_BIAS: CauseCode.BIAS_ROUNDED}
    code = codes.get(pair.tensor.spec.role, CauseCode.ROUNDED_FURTHER)
    told = f"all {pair.tensor.numel} elements are the source's, rounded that way"
    return Explained(pair.tensor, code, words, told), Hypothesis(rows)


def _through(rows: Rows, dtype: "torch.dtype") -> Rows:
    def read(start: int, stop: int) -> "torch.Tensor":
        values_RC = rows(start, stop)
        return values_RC.to(dtype).to(values_RC.dtype)

    return read


def _through_e4m3(rows: Rows) -> Rows:
    def read(start: int, stop: int) -> "torch.Tensor":
        values_RC = rows(start, stop)
        return _e4m3(values_RC).to(values_RC.dtype)

    return read


def _e4m3(values: "torch.Tensor") -> "torch.Tensor":
    """Return the nearest E4M3 values in fp32, saturating."""
    import torch

    # what a bare cast makes of larger values, 448 or NaN, differs between releases of torch
    return values.clamp(-_E4M3_MAX, _E4M3_MAX).to(torch.float8_e4m3fn).float()


def _through_codes(rows: Rows, limit: float) -> Rows:
    import torch

    def read(start: int, stop: int) -> "torch.Tensor":
        values_RC = rows(start, stop)
        scale_R1 = values_RC.float().abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / limit
        quotient_RC = values_RC.float() / scale_R1
        codes_RC = _e4m3(quotient_RC) if limit == _E4M3_MAX else quotient_RC.round()
        return (codes_RC * scale_R1).to(values_RC.dtype)

    return read


def _unscaled(pair: Pair) -> Rows:
    def read(tile: Tile, start: int, stop: int) -> "torch.Tensor":
        return look_up(tile.lattice.values_V, tile.bits(start, stop))

    return lambda start, stop: official_rows(pair.before, pair.tensor, start, stop, read)
