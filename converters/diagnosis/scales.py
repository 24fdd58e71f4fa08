"""Hypotheses about codes and scales: which way round they are stored, which scale belongs to which codes.

Each says how the codes on disk are to be read so that they stand for the source's weights.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from converters.diagnosis.cause import CauseCode
from converters.diagnosis.explained import Explained
from converters.diagnosis.hypothesis import Codes, Hypothesis, Recode, own_rows
from converters.diagnosis.orders import Guess, members
from converters.formats.weights import WHOLE, Coding
from converters.quant.halfstep import group_amax, spread
from converters.quant.judge import Pair
from converters.quant.tiles import Tile, tiles
from converters.source import Source

if TYPE_CHECKING:
    import torch

_NVFP4 = (Coding.NVFP4_DIVISOR, Coding.NVFP4_FACTOR)
_INTEGER_BITS = {Coding.SCALED: ("I8",), Coding.PACKED_INT: ("I32",)}
# a scale and its inverse, both rounded to bf16
_INVERSE_ROUNDOFF = 2.0**-7


def scale_guesses(candidate: Source, pair: Pair) -> Iterator[Guess]:
    """Yield every way in which the codes or scales of a quantized tensor may be stored wrongly."""
    if pair.after[0].format.is_plain:
        return
    yield from _code_guesses(pair)
    yield _guess(pair, CauseCode.SCALE_INVERTED, *_inverted_words(pair)), Hypothesis(recode=_inverted)
    if _is_cut_in_block(pair):
        yield _cut_in_block(pair)
    if max(len(tile.scale(tile.scales[0], 0, tile.num_rows)) for tile in pair.after) > 1:
        yield from _grid_guesses(pair)
    yield from _siblings_scales(candidate, pair)


def ideal_scale_guesses(pair: Pair) -> Iterator[Guess]:
    """Yield that the codes are right and only the scales are not; they follow from the source's magnitudes."""
    first = pair.after[0].format
    if first.is_plain or first.coding in _NVFP4 or len(pair.after[0].scales) > 1:
        return
    stored_SG, ideal_SG = _grid(pair.after[0]), _ideal_grid(pair, pair.after[0], 0)
    code, words = CauseCode.SCALE_WRONG, "its codes are right, its scales are not"
    if bool((stored_SG == 1).all()):
        code, words = CauseCode.SCALE_LOST, "its scales are all 1, and its codes are right"
    elif bool(((stored_SG * ideal_SG - 1).abs() <= _INVERSE_ROUNDOFF).all()):
        code, words = CauseCode.SCALE_INVERTED, "its scales are stored as the inverse"
    ratio_SG = stored_SG / ideal_SG
    told = f"stored scales are {float(ratio_SG.min()):.4g} to {float(ratio_SG.max()):.4g} times those of the codes"
    if code is CauseCode.SCALE_INVERTED:
        told += ", which is 1/s^2 of the right s"
    for index in range(len(pair.after[0].lattice.ranges)):

        def recode(tile: Tile, start: int, stop: int, index: int = index) -> Codes:
            return _with_grid(tile, _ideal_grid(pair, tile, index), start, stop)

        yield _guess(pair, code, words, told), Hypothesis(recode=recode)


def _code_guesses(pair: Pair) -> Iterator[Guess]:
    found, elements = pair.after[0].format, pair.tensor.numel
    told = f"all {elements} elements are within half a step when read that way"
    if found.num_bits == 4:
        words = "the two codes of each byte are in the other order"
        yield _guess(pair, CauseCode.NIBBLE_ORDER, words, told), Hypothesis(recode=_other_nibbles)
    dtype = found.parts[0].dtype
    if found.coding is not None and dtype in _INTEGER_BITS.get(found.coding, ()):
        for offset in (1, -1):
            words = f"its codes are {'above' if offset < 0 else 'below'} the right ones by one: a zero point off by one"
            yield _guess(pair, CauseCode.ZERO_POINT, words, told), Hypothesis(recode=_offset(offset))


def _other_nibbles(tile: Tile, start: int, stop: int) -> Codes:
    bits_RC = tile.bits(start, stop)
    return Codes(bits_RC.view(len(bits_RC), -1, 2).flip(2).reshape(bits_RC.shape), *_stored_scale(tile, start, stop))


def _offset(offset: int) -> Recode:
    def recode(tile: Tile, start: int, stop: int) -> Codes:
        mask = (1 << tile.format.num_bits) - 1
        return Codes((tile.bits(start, stop) + offset) & mask, *_stored_scale(tile, start, stop))

    return recode


def _stored_scale(tile: Tile, start: int, stop: int) -> tuple["torch.Tensor", int]:
    return tile.combined_scale(start, stop), tile.group


def _inverted(tile: Tile, start: int, stop: int) -> Codes:
    """Read the one scale, or NVFP4's global one, as its inverse."""
    bits_RC = tile.bits(start, stop)
    if tile.format.coding not in _NVFP4:
        return Codes(bits_RC, tile.combined_scale(start, stop).reciprocal(), tile.group)
    local_RG, whole_11 = (tile.scale(part, start, stop).float() for part in tile.scales)
    multiplies = tile.format.coding is Coding.NVFP4_DIVISOR
    return Codes(bits_RC, local_RG * whole_11 if multiplies else local_RG / whole_11, tile.group)


def _inverted_words(pair: Pair) -> tuple[str, str]:
    tile = pair.after[0]
    scale = float(tile.scale(tile.scales[-1], 0, 1).float().flatten()[0])
    which = "global scale is" if tile.format.coding in _NVFP4 else "scales are"
    ratio = 1 / scale**2 if scale else 0.0
    told = f"the first is {scale:.6g}: values are {1 / ratio if ratio else 0:.4g} times too large, about 1/s^2 of the "
    told += "right s; all elements are within half a step with 1/s"
    return f"its {which} stored as the inverse", told


def _grid(tile: Tile) -> "torch.Tensor":
    """Return all cells of the first scale of the stored tensor that a tile lies in, fp32 (S, G)."""
    return tile.scale(tile.scales[0], -tile.place.row, tile.stored.rows - tile.place.row).float()


def _with_grid(tile: Tile, grid_SG: "torch.Tensor", start: int, stop: int) -> Codes:
    """Return codes with a grid of scales in the place of the stored one."""
    import torch

    grain = tile.scales[0].grain[0] or tile.stored.rows
    rows_R = torch.arange(tile.place.row + start, tile.place.row + stop)
    scale_RG = grid_SG[torch.div(rows_R, grain, rounding_mode="floor")]
    if tile.format.coding in _NVFP4:
        whole_11 = tile.scale(tile.scales[1], 0, 1).float()
        scale_RG = scale_RG / whole_11 if tile.format.coding is Coding.NVFP4_DIVISOR else scale_RG * whole_11
    return Codes(tile.bits(start, stop), scale_RG, tile.group)


def _grid_guesses(pair: Pair) -> Iterator[Guess]:
    shape = tuple(_grid(pair.after[0]).shape)
    if min(shape) > 1:
        words = "its scales lie by columns, where rows of them are read"
        told = f"all elements are within half a step with the {shape[0]} x {shape[1]} scales transposed"
        yield _guess(pair, CauseCode.SCALE_TRANSPOSED, words, told), Hypothesis(recode=_transposed)
    if pair.after[0].format.coding not in _NVFP4 and len(pair.after) == 1:
        yield from _exchanged_cells(pair)


def _transposed(tile: Tile, start: int, stop: int) -> Codes:
    grid_SG = _grid(tile)
    return _with_grid(tile, grid_SG.reshape(grid_SG.shape[1], grid_SG.shape[0]).T, start, stop)


def _exchanged_cells(pair: Pair) -> Iterator[Guess]:
    """Yield that the scales that do not follow from the source hold each other's values, if there are two of them."""
    tile = pair.after[0]
    stored_SG = _grid(tile)
    for index in range(len(tile.lattice.ranges)):
        wrong = (stored_SG != _ideal_grid(pair, tile, index)).nonzero().tolist()
        if len(wrong) != 2:
            continue
        (r0, c0), (r1, c1) = wrong
        right_SG = stored_SG.clone()
        right_SG[r0, c0], right_SG[r1, c1] = stored_SG[r1, c1], stored_SG[r0, c0]

        def recode(tile: Tile, start: int, stop: int, grid_SG: "torch.Tensor" = right_SG) -> Codes:
            return _with_grid(tile, grid_SG, start, stop)

        words = f"its scales {wrong[0]} and {wrong[1]} are exchanged"
        told = f"{float(stored_SG[r0, c0]):.6g} and {float(stored_SG[r1, c1]):.6g}; with them put right all elements "
        told += "are within half a step"
        yield _guess(pair, CauseCode.SCALES_EXCHANGED, words, told), Hypothesis(recode=recode)


def _ideal_grid(pair: Pair, tile: Tile, index: int) -> "torch.Tensor":
    """Return what the first scale of a stored tensor follows to from the source's magnitudes, fp32 (S, G).

    Rows of the stored tensor that belong to other official tensors keep what is stored.
    """
    import torch

    part, grid_SG = tile.scales[0], _grid(tile)
    top, left, right = tile.place.piece.rows[0], *tile.place.piece.columns
    grain_rows, read = part.grain[0] or tile.num_rows, own_rows(pair)
    dtype, step = tile.scale(part, 0, 1).dtype, max(grain_rows, pair.step // grain_rows * grain_rows)
    for start in range(0, tile.num_rows, step):
        source_RC = read(top + start, top + min(start + step, tile.num_rows))[:, left:right]
        amax_SG = group_amax(source_RC, part.grain[1], grain_rows)
        ideal_SG = (amax_SG / tile.lattice.ranges[index]).to(dtype).float()
        first = (tile.place.row + start) // grain_rows
        grid_SG[first : first + len(ideal_SG)] = torch.where(amax_SG > 0, ideal_SG, 1.0)
    return grid_SG


def _siblings_scales(candidate: Source, pair: Pair) -> Iterator[Guess]:
    """Yield that a tensor has the scales of one that engines fuse with it."""
    for other in members(candidate, pair.tensor):
        if other == pair.tensor or len(pair.after) != 1 or other.shape != pair.tensor.shape:
            continue
        (theirs,) = tiles(candidate, other)
        if theirs.format != pair.after[0].format:
            continue

        def recode(tile: Tile, start: int, stop: int, theirs: Tile = theirs) -> Codes:
            return Codes(tile.bits(start, stop), theirs.combined_scale(start, stop), theirs.group)

        words = f"it has scales that belong to {other.name}, and that one has its own"
        told = "all elements are within half a step with the scales of the other"
        yield _guess(pair, CauseCode.SCALES_EXCHANGED, words, told), Hypothesis(recode=recode)


def _is_cut_in_block(pair: Pair) -> bool:
    return any(_offsets(tile) != (0, 0) for tile in pair.after)


def _offsets(tile: Tile) -> tuple[int, int]:
    """Return how many rows and columns of its first block lie before a piece, were blocks counted from the whole."""
    grain_rows, grain_columns = tile.scales[0].grain
    rows, columns = tile.place.piece.rows[0] - tile.place.row, tile.place.piece.columns[0]
    return (rows % grain_rows if grain_rows > 1 else 0), (columns % grain_columns if grain_columns > 1 else 0)


def _cut_in_block(pair: Pair) -> Guess:
    tile = next(tile for tile in pair.after if _offsets(tile) != (0, 0))
    rows, columns = _offsets(tile)
    begin = " and ".join(f"{many} {kind}" for many, kind in ((rows, "rows"), (columns, "columns")) if many)
    words = (
        f"a slice of it is cut inside of a block: it begins {begin} into one, but its scales are read from its begin"
    )
    grain = " x ".join("all" if one == WHOLE else str(one) for one in tile.scales[0].grain)
    told = (
        f"slice {tile.stored.name}; all elements are within half a step with blocks of {grain} counted from the whole"
    )
    return _guess(pair, CauseCode.SLICE_CUT_IN_BLOCK, words, told), Hypothesis(recode=_blocks_of_the_whole)


def _blocks_of_the_whole(tile: Tile, start: int, stop: int) -> Codes:
    import torch

    (rows, columns), grid_SG = _offsets(tile), _grid(tile)
    grain_rows, grain_columns = tile.scales[0].grain
    row_R = torch.arange(tile.place.row + start, tile.place.row + stop) + rows
    row_R = torch.div(row_R, grain_rows or tile.stored.rows, rounding_mode="floor").clamp_(max=len(grid_SG) - 1)
    wide_RC = spread(grid_SG[row_R], grain_columns or tile.stored.columns, grid_SG.shape[1] * (grain_columns or 1))
    column_C = (torch.arange(tile.stored.columns) + columns).clamp_(max=wide_RC.shape[1] - 1)
    return Codes(tile.bits(start, stop), wide_RC[:, column_C] if grain_columns else wide_RC, 1)


def _guess(pair: Pair, code: CauseCode, statement: str, evidence: str) -> Explained:
    return Explained(pair.tensor, code, statement, evidence)
