"""The official tensors of a checkpoint in any layout and format, read whole into memory: what a model is loaded from.

A tensor is planned as a conversion to the split layout would plan it, so that a loaded weight is the converted one.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.blocks import Scratch, read_beside, read_block, row_bytes
from converters.checkpoint.dtypes import torch_dtype
from converters.checkpoint.plan import SourceRows, Unit
from converters.checkpoint.reader import CheckpointReader
from converters.formats.compressed_tensors import WEIGHT_SCALE
from converters.formats.weights import WHOLE, Coding, Use, WeightFormat
from converters.layout import Layout, StoredLayout
from converters.relayout import find_bands
from converters.schema import Tensor
from converters.source import Source
from converters.transforms.rows import Copy
from converters.units import UnitPlanner

if TYPE_CHECKING:
    import torch

    Empty = Callable[[torch.Size, torch.dtype], torch.Tensor]

# bytes of rows that are decoded at a time
_BLOCK_BYTES = 16 << 20
_CHANNEL = (1, WHOLE)


@dataclass(frozen=True, slots=True)
class OfficialTensors:
    """Plans how to read the official tensors of a source."""

    source: Source
    _split: StoredLayout
    _keeping: UnitPlanner
    _decoding: UnitPlanner

    @classmethod
    def of(cls, source: Source, dtype: str) -> "OfficialTensors":
        """Return the official tensors of a source; weights whose codes are not kept are rounded to a dtype."""
        split = StoredLayout(source.schema, Layout.SPLIT)
        keeping = UnitPlanner(source, split, dtype=None, dequantize=False)
        return cls(source, split, keeping, UnitPlanner(source, split, dtype=dtype, dequantize=True))

    def format(self, tensor: Tensor) -> WeightFormat:
        """Return how a tensor is stored."""
        return self.source.weights[self.source.stored_layout.places(tensor)[0].stored.name].format

    def units(self, tensor: Tensor) -> dict[str, Unit]:
        """Return what to read by name: the tensor and, where FP8 codes are kept, its scales (O, 1).

        Codes are kept where they have one scale for each output row; everything else is decoded.

        Raises:
            UsageError: it is stored in parts that do not go together.
        """
        keeps = self.format(tensor).is_plain or self._is_fp8_channel(tensor)
        planner = self._keeping if keeps else self._decoding
        wanted = {tensor.name, scale_name(tensor)}
        units = {unit.outputs[0].name: unit for unit in planner.units(self._split.stored[tensor.name])}
        return {name: unit for name, unit in units.items() if name in wanted}

    def stored_parts(self, tensor: Tensor) -> tuple[Unit, ...] | None:
        """Return how to read codes and then scales as they are, in the order of the scheme.

        None where there are none, or where the weight is put together from several that have scales of their own.

        Raises:
            UsageError: it is stored in parts that do not go together.
        """
        stored, found = self._split.stored[tensor.name], self.format(tensor)
        bands = find_bands(self.source, stored.elements[0])
        if found.is_plain or any(len(band) != 1 for band in bands):
            return None
        units = {unit.outputs[0].name: unit for unit in self._keeping.units(stored)}
        parts = (*found.used(Use.CODES), *found.used(Use.SCALE))
        return tuple(units[stored.part(part.suffix)] for part in parts)

    def decoded(self, tensor: Tensor) -> Unit:
        """Return how to read a weight multiplied out, or as it is if it is not quantized."""
        units = {unit.outputs[0].name: unit for unit in self._decoding.units(self._split.stored[tensor.name])}
        return units[tensor.name]

    def _is_fp8_channel(self, tensor: Tensor) -> bool:
        found = self.format(tensor)
        scales = [(part.suffix, part.grain) for part in found.used(Use.SCALE)]
        if found.coding is not Coding.SCALED or scales != [(WEIGHT_SCALE, _CHANNEL)]:
            return False
        # side by side, two scales would belong to one row
        bands = find_bands(self.source, self._split.stored[tensor.name].elements[0])
        return found.used(Use.CODES)[0].dtype == "F8_E4M3" and all(len(band) == 1 for band in bands)


def scale_name(tensor: Tensor) -> str:
    """Return what the scale of a weight is called in the split layout."""
    return f"{tensor.module}.{WEIGHT_SCALE}"


def read_bytes(reader: CheckpointReader, unit: Unit) -> int:
    """Return the bytes that `read_unit` reads."""
    return sum(source.rows * row_bytes(reader, source) for source in unit.sources)


def read_unit(reader: CheckpointReader, unit: Unit, empty: "Empty | None" = None) -> "torch.Tensor":
    """Return the output of a unit, a vector of scales as (O, 1), in a tensor that `empty` makes, if it is given.

    Values that need no decoding are returned as they are, NaN and Inf included: whoever asks for them wants to know
    what such a model does.

    Raises:
        InputError: a code or scale that is decoded is NaN or Inf.
    Memory: the result; if it is put together or decoded, one source's rows or a block on top.
    """
    import torch

    (output,) = unit.outputs
    is_matrix = len(output.shape) > 1 or output.name.endswith(WEIGHT_SCALE)
    shape = (output.rows, -1) if is_matrix else output.shape
    columns = output.row_bytes // torch_dtype(output.dtype).itemsize
    size, dtype = torch.Size((output.rows, columns)), torch_dtype(output.dtype)
    result_RC = torch.empty(size, dtype=dtype) if empty is None else empty(size, dtype)
    if len(unit.sources) == 1 and unit.sources[0].is_whole and isinstance(unit.transform, Copy):
        (source,) = unit.sources
        data = result_RC.view(-1).view(torch.uint8).numpy().data
        reader.read_into(source.name, source.start * reader.entry(source.name).row_bytes, data)
        return result_RC.view(shape)
    row, scratch = 0, Scratch()
    for source in unit.sources:
        step = max(1, _BLOCK_BYTES // max(1, row_bytes(reader, source)))
        for start in range(0, source.rows, step):
            stop = min(start + step, source.rows)
            result_RC[row + start : row + stop] = _block(reader, unit, source, (start, stop), scratch)
        row += source.rows
    return result_RC.view(shape)


def _raw(reader: CheckpointReader, name: str, start: int, stop: int) -> "torch.Tensor":
    """Return rows [start, stop) of a tensor seen as a matrix."""
    import torch

    entry = reader.entry(name)
    data = torch.empty((stop - start) * entry.row_bytes, dtype=torch.uint8)
    reader.read_into(name, start * entry.row_bytes, data.numpy().data)
    return data.view(torch_dtype(entry.dtype)).view(stop - start, -1)


def _block(
    reader: CheckpointReader, unit: Unit, source: SourceRows, span: tuple[int, int], scratch: Scratch
) -> "torch.Tensor":
    """Return what becomes of some rows of a source, with what stands to the right appended."""
    import torch

    first, last = source.start + span[0], source.start + span[1]
    if isinstance(unit.transform, Copy):
        block_RC = _raw(reader, source.name, first, last)
    else:
        rows_RC = read_block(reader, source.name, first, last, scratch)
        beside = [
            read_beside(reader, beside, *span, scratch, number) for number, beside in enumerate(source.beside, start=1)
        ]
        (block_RC,) = unit.transform(rows_RC, *beside)
    if source.columns is not None:
        block_RC = block_RC[:, source.columns.start : source.columns.stop]
    if source.right is None:
        return block_RC
    # the buffers are free again: a transform that is no copy makes new tensors
    return torch.cat((block_RC, _block(reader, unit, source.right, span, scratch)), dim=1)
