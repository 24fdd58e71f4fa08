"""Blocks of rows, read into buffers that each thread keeps, and refused where a value is NaN or Inf."""

import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from converters.checkpoint.dtypes import itemsize, torch_dtype
from converters.checkpoint.plan import Beside, SourceRows
from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError
from converters.numerics.finite import first_non_finite

if TYPE_CHECKING:
    import torch

DIGEST_BLOCK_BYTES = 1 << 20
MAGNITUDE_BLOCK_BYTES = 1 << 20
_CACHE_LINE = 64
# elements of any dtype, as unsigned integers of their width
Cells: TypeAlias = np.ndarray[Any, np.dtype[np.unsignedinteger[Any]]]


class Digest(Protocol):
    """What hashlib's objects do, and `SourceDigest`."""

    def update(self, data: memoryview, /) -> None:
        """Take in more bytes."""


class Scratch(threading.local):
    """Read buffers of one thread, kept from block to block: one for each tensor that a block comes from.

    Fresh buffers would be cut out of the allocator's heaps, which keep what is freed between longer-lived pieces:
    memory that creeps up with the size of the checkpoint.
    """

    def __init__(self) -> None:
        self.buffers: list[Cells] = []

    def take(self, nbytes: int, slot: int = 0) -> Cells:
        """Return nbytes of uint8; they are overwritten by the next call for this slot in this thread."""
        while len(self.buffers) <= slot:
            self.buffers.append(np.empty(0, np.uint8))
        if len(self.buffers[slot]) < nbytes:
            self.buffers[slot] = np.empty(0, np.uint8)  # the old one goes before the new one comes
            buffer = np.empty(nbytes + _CACHE_LINE, np.uint8)
            self.buffers[slot] = buffer[-buffer.ctypes.data % _CACHE_LINE :][:nbytes]
        return self.buffers[slot][:nbytes]


def row_bytes(reader: CheckpointReader, source: SourceRows) -> int:
    """Return the bytes that are in memory for one row: its own, those beside it, those to the right."""
    own = reader.entry(source.name).row_bytes + sum(reader.entry(beside.name).row_bytes for beside in source.beside)
    return own if source.right is None else own + row_bytes(reader, source.right)


def read_bytes(reader: CheckpointReader, name: str, start: int, stop: int, scratch: Scratch, slot: int = 0) -> Cells:
    """Return the bytes of rows [start, stop); refuse NaN and Inf.

    Raises:
        InputError: a value is NaN or Inf, named by tensor and row.
    """
    entry = reader.entry(name)
    data = scratch.take((stop - start) * entry.row_bytes, slot)
    reader.read_into(name, start * entry.row_bytes, data.data)
    bad = first_non_finite(data.data, entry.dtype)
    if bad is not None:
        columns = entry.row_bytes // itemsize(entry.dtype)
        raise InputError(
            f"tensor {name}",
            expected="finite values",
            found=f"NaN or Inf at row {start + bad // columns}, column {bad % columns}",
            next_step="The file is damaged or the model is broken; fetch it again or check its source.",
        )
    return data


def read_block(
    reader: CheckpointReader, name: str, start: int, stop: int, scratch: Scratch, slot: int = 0
) -> "torch.Tensor":
    """Return rows [start, stop) as (R, C), a vector as (R, 1), a scalar as (1, 1); refuse NaN and Inf.

    Raises:
        InputError: a value is NaN or Inf, named by tensor and row.
    """
    import torch

    data = read_bytes(reader, name, start, stop, scratch, slot)
    return torch.from_numpy(data).view(torch_dtype(reader.entry(name).dtype)).view(stop - start, -1)


def read_beside(
    reader: CheckpointReader, beside: Beside, start: int, stop: int, scratch: Scratch, slot: int
) -> "torch.Tensor":
    """Return what stands beside source rows [start, stop), one row for each: (R, C).

    Raises:
        InputError: a value is NaN or Inf, named by tensor and row.
    """
    import torch

    first = beside.row(start)
    rows_SC = read_block(reader, beside.name, first, beside.row(stop - 1) + 1, scratch, slot)
    if beside.span == 1:
        return rows_SC
    if len(rows_SC) == 1:
        return rows_SC.expand(stop - start, -1)
    index_R = torch.div(torch.arange(start, stop) + beside.offset, beside.span, rounding_mode="floor")
    return rows_SC[index_R + (beside.start - first)]


def largest_magnitude(
    reader: CheckpointReader, group: Iterable[SourceRows], scratch: Scratch, block_bytes: int
) -> "torch.Tensor":
    """Return the largest magnitude among rows that are read as they are, fp32 (1, 1).

    Args:
        block_bytes: the most to read at once, unless a row is larger.
    Raises:
        InputError: a value is NaN or Inf, named by tensor and row.
    """
    import torch

    largest = torch.zeros((), dtype=torch.float32)
    for source in group:
        assert not source.beside, source
        assert source.right is None, source
        wanted = min(MAGNITUDE_BLOCK_BYTES, block_bytes)
        step = max(1, wanted // max(1, reader.entry(source.name).row_bytes))
        for start in range(source.start, source.stop, step):
            rows_RC = read_block(reader, source.name, start, min(start + step, source.stop), scratch)
            if source.columns is not None:
                rows_RC = rows_RC[:, source.columns.start : source.columns.stop]
            low, high = rows_RC.aminmax()
            largest = torch.maximum(largest, torch.maximum(low.neg(), high).float())
    return largest.view(1, 1)


def digest_extra_reads(reader: CheckpointReader, source: SourceRows, digest: Digest, block_bytes: int) -> None:
    """Add to a digest what is read for source rows besides themselves, in the order of `SourceRows.reads`.

    Args:
        block_bytes: the most to read at once.
    """
    _, *extra = source.reads()
    buffer = memoryview(bytearray(min(DIGEST_BLOCK_BYTES, block_bytes) if extra else 0))
    for name, start, stop in extra:
        digest_rows(reader, name, start, stop, digest, buffer)


def digest_rows(reader: CheckpointReader, name: str, start: int, stop: int, digest: Digest, buffer: memoryview) -> None:
    """Add rows [start, stop) of a tensor to a digest, a buffer at a time."""
    width = reader.entry(name).row_bytes
    position, end = start * width, stop * width
    while position < end:
        block = buffer[: min(len(buffer), end - position)]
        reader.read_into(name, position, block)
        digest.update(block)
        position += len(block)


def as_bytes(block: "torch.Tensor | Cells", scratch: Scratch | None = None) -> memoryview:
    """Return the bytes of a tensor or an array without copying them, if they lie one after the other.

    Args:
        scratch: whose first buffer takes the copy of an array where one has to be made; None: a fresh one.
    """
    if isinstance(block, np.ndarray):
        if not block.flags.c_contiguous:
            copied = (scratch or Scratch()).take(block.nbytes).view(block.dtype).reshape(block.shape)
            np.copyto(copied, block)
            block = copied
        return block.view(np.uint8).reshape(-1).data
    import torch

    return block.contiguous().view(torch.uint8).view(-1).numpy().data
