"""Make the outputs of units that copy: bytes of rows, cut by columns or put side by side, without torch."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from converters.blocks import Cells, Digest, digest_extra_reads, read_bytes
from converters.checkpoint.dtypes import itemsize
from converters.checkpoint.plan import SourceRows, Unit
from converters.making import Making, Span, spans
from converters.quant.quality import TensorQuality
from converters.transforms.rows import Copy

if TYPE_CHECKING:
    import torch

    from converters.pipeline import Run


class Blocks(Protocol):
    """A unit being made, whoever makes it."""

    @property
    def quality(self) -> TensorQuality | None:
        """Errors of the codes, once all blocks are made."""

    def blocks(self) -> "Iterator[tuple[int, tuple[torch.Tensor | Cells, ...]]]":
        """Yield the outputs' blocks from top to bottom, each with its first row."""


def begin(unit: Unit, run: "Run", digest: Digest | None) -> Blocks:
    """Return what makes a unit; see `Making` for the arguments."""
    return Copying(unit, run, digest) if is_bytewise(unit) else Making(unit, run, digest)


def is_bytewise(unit: Unit) -> bool:
    """Return whether a unit's output is made of bytes of its sources, none of which has to be understood."""
    return isinstance(unit.transform, Copy) and bool(unit.sources) and not any(map(_has_beside, unit.sources))


def _has_beside(rows: SourceRows) -> bool:
    return bool(rows.beside) or (rows.right is not None and _has_beside(rows.right))


class Copying:
    """A unit that copies being made, as by `Making`, but in arrays of numpy: to import torch alone takes a second.

    Args:
        unit: what to make; see `is_bytewise`.
        run: where to read, and how much at once.
        digest: takes all that decides the output, in the order of `source_digest_of`; None if nobody asks.
    """

    def __init__(self, unit: Unit, run: "Run", digest: Digest | None) -> None:
        self.unit, self.run, self.digest = unit, run, digest

    @property
    def quality(self) -> TensorQuality | None:
        """Errors of the codes, as the plan has them."""
        return self.unit.quality

    def blocks(self) -> Iterator[tuple[int, tuple[Cells]]]:
        """Yield the output's blocks from top to bottom, each with its first row: (R, C) as integers of its width."""
        for source, span in spans(self.unit, self.run):
            yield span.row, (self._joined(list(self._bands(source, span)), source.num_reads),)
            if self.digest is not None and span.stop == source.rows:
                digest_extra_reads(self.run.reader, source, self.digest, self.run.options.copy_block_bytes)

    def _bands(self, source: SourceRows, span: Span) -> Iterator[Cells]:
        """Yield some rows of a source, and those to its right, from left to right."""
        reader, scratch, slot, band = self.run.reader, self.run.scratch, 0, source
        while True:
            data = read_bytes(reader, band.name, band.start + span.start, band.start + span.stop, scratch, slot)
            if self.digest is not None and not slot:
                # what stands to the right is read again for it, as a whole: it must not depend on the size of blocks
                self.digest.update(data.data)
            cells_RC = data.view(f"u{itemsize(reader.entry(band.name).dtype)}").reshape(span.stop - span.start, -1)
            yield cells_RC if band.columns is None else cells_RC[:, band.columns.start : band.columns.stop]
            if band.right is None:
                return
            band, slot = band.right, slot + 1

    def _joined(self, bands: list[Cells], slot: int) -> Cells:
        if len(bands) == 1:
            return bands[0]
        rows, width = len(bands[0]), sum(band.shape[1] for band in bands)
        # a buffer that stays, as those of reads do: fresh ones of this size make the process grow
        buffer = self.run.scratch.take(rows * width * bands[0].itemsize, slot)
        return np.concatenate(bands, axis=1, out=buffer.view(bands[0].dtype).reshape(rows, width))
