"""Rows of official tensors, read from a checkpoint in any layout and format, with the codes and scales behind them.

Nothing is refused here for its value: whoever compares wants to see NaN and Inf too.
Shapes: R rows, C columns of the weight, S rows and G columns of a scale.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.checkpoint.dtypes import itemsize, torch_dtype
from converters.formats.weights import WHOLE, Coding, Part, Use, WeightFormat, cells
from converters.layout import Place, Stored
from converters.schema import Tensor
from converters.source import Source

if TYPE_CHECKING:
    import torch

    from converters.quant.lattice import Lattice

_NVFP4 = frozenset({Coding.NVFP4_DIVISOR, Coding.NVFP4_FACTOR})


@dataclass(frozen=True, slots=True)
class Tile:
    """Whole rows of one place: a piece of an official tensor in one element of a stored tensor.

    Rows count from the first row of the piece.
    """

    source: Source
    place: Place

    @property
    def stored(self) -> Stored:
        """The stored tensor."""
        return self.place.stored

    @property
    def format(self) -> WeightFormat:
        """How it is stored."""
        return self.source.weights[self.stored.name].format

    @property
    def num_rows(self) -> int:
        """Rows of the piece."""
        return self.place.piece.rows[1] - self.place.piece.rows[0]

    @property
    def scales(self) -> tuple[Part, ...]:
        """The parts that decode the codes: one scale, or the local and the global one."""
        return self.format.used(Use.SCALE)

    @property
    def grain(self) -> int:
        """Rows that share a scale; blocks of rows are multiples of it. 1 also where one scale serves all rows."""
        return max((part.grain[0] for part in self.scales), default=1) or 1

    def codes(self, start: int, stop: int) -> "torch.Tensor":
        """Return values or codes as they are on disk, (stop - start, bytes of a row in elements)."""
        (part,) = self.format.used(Use.CODES)
        return self._rows(part, self.place.row + start, self.place.row + stop)

    def bits(self, start: int, stop: int) -> "torch.Tensor":
        """Return codes by their bits, int32 (R, C); see `lattice.code_bits`."""
        from converters.quant.lattice import code_bits

        found = self.format
        assert found.coding is not None, found
        return code_bits(self.codes(start, stop), found.coding, found.num_bits, self.stored.columns)

    def scale(self, part: Part, start: int, stop: int) -> "torch.Tensor":
        """Return the rows of a scale that serve rows [start, stop), in its dtype: (S, G)."""
        first, last = self.place.row + start, self.place.row + stop
        grain = part.grain[0] or self.stored.rows
        return self._rows(part, first // grain, cells(last, grain))

    def combined_scale(self, start: int, stop: int) -> "torch.Tensor":
        """Return what codes are multiplied with, fp32 (R, G), R or 1 rows."""
        import torch

        scales_SG = [self.scale(part, start, stop).float() for part in self.scales]
        if self.format.coding in _NVFP4:
            divides = self.format.coding is Coding.NVFP4_DIVISOR
            return scales_SG[0] / scales_SG[1] if divides else scales_SG[0] * scales_SG[1]
        (scale_SG,) = scales_SG
        grain = self.scales[0].grain[0]
        if grain <= 1:
            return scale_SG
        rows_R = torch.arange(self.place.row + start, self.place.row + stop)
        return scale_SG[torch.div(rows_R, grain, rounding_mode="floor") - (self.place.row + start) // grain]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.scales[0].grain[1] or self.stored.columns

    def wide_scale(self, index: int, start: int, stop: int) -> "torch.Tensor":
        """Return one of the scales for every element of the rows, fp32 (R, C)."""
        import torch

        from converters.quant.halfstep import spread

        part = self.scales[index]
        rows_R = torch.arange(self.place.row + start, self.place.row + stop)
        first = (self.place.row + start) // (part.grain[0] or self.stored.rows)
        index_R = torch.div(rows_R, part.grain[0] or self.stored.rows, rounding_mode="floor") - first
        scale_RG = self.scale(part, start, stop).float()[index_R]
        columns = self.stored.columns
        return spread(scale_RG, part.grain[1] or columns, columns).expand(stop - start, columns)

    def decoded(self, start: int, stop: int) -> "torch.Tensor":
        """Return codes times scales, fp32 (R, C)."""
        from converters.quant.halfstep import spread
        from converters.quant.lattice import look_up

        found = self.format
        values_V = self.lattice.values_V
        scale_RC = spread(self.combined_scale(start, stop), self.group, self.stored.columns)
        assert found.coding is not None, found
        return look_up(values_V, self.bits(start, stop)).mul_(scale_RC)

    @property
    def lattice(self) -> "Lattice":
        """The values that its codes can have."""
        from converters.quant.lattice import lattice_of

        found = self.format
        assert found.coding is not None, found
        return lattice_of(found.coding, found.used(Use.CODES)[0].dtype, found.num_bits)

    def _rows(self, part: Part, start: int, stop: int) -> "torch.Tensor":
        """Return rows of a part of this element as a matrix, whatever dims it has on disk."""
        import torch

        name, reader = self.stored.part(part.suffix), self.source.reader
        entry = reader.entry(name)
        grid = cells(self.stored.rows, part.grain[0])
        width = entry.nbytes // max(1, grid * (self.stored.stack or 1))
        data = torch.empty((stop - start) * width, dtype=torch.uint8)
        reader.read_into(name, (self.place.element * grid + start) * width, data.numpy().data)
        return data.view(torch_dtype(entry.dtype)).view(stop - start, width // itemsize(entry.dtype))


def tiles(source: Source, tensor: Tensor) -> tuple[Tile, ...]:
    """Return where an official tensor lies: pieces one above the other, or side by side, or both."""
    return tuple(Tile(source, place) for place in source.stored_layout.places(tensor))


def official_rows(
    pieces: tuple[Tile, ...], tensor: Tensor, start: int, stop: int, read: Callable[[Tile, int, int], "torch.Tensor"]
) -> "torch.Tensor":
    """Return rows [start, stop) of an official tensor, put together from what `read` returns of each piece's rows."""
    import torch

    blocks = []
    for tile in pieces:
        top, bottom = tile.place.piece.rows
        first, last = max(start, top), min(stop, bottom)
        if first < last:
            blocks.append((tile, first - start, read(tile, first - top, last - top)))
    columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
    if len(blocks) == 1 and blocks[0][2].shape == (stop - start, columns):
        return blocks[0][2]
    result_RC = torch.empty(stop - start, columns, dtype=blocks[0][2].dtype)
    for tile, first, block in blocks:
        left, right = tile.place.piece.columns
        result_RC[first : first + len(block), left:right] = block
    return result_RC


def read_values(tile: Tile, start: int, stop: int) -> "torch.Tensor":
    """Return rows as values: plain ones in their dtype, decoded ones in fp32."""
    return tile.codes(start, stop) if tile.format.is_plain else tile.decoded(start, stop)


def row_bytes(tile: Tile) -> int:
    """Return the bytes of a row of codes."""
    (part,) = tile.format.used(Use.CODES)
    entry = tile.source.reader.entry(tile.stored.part(part.suffix))
    return entry.nbytes // max(1, tile.stored.rows * (tile.stored.stack or 1))


def shares_tensor_scale(tile: Tile) -> bool:
    """Return whether one scale serves all rows and columns."""
    return any(part.grain == (WHOLE, WHOLE) for part in tile.scales)
