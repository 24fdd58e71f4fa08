"""Make the outputs of a unit from its source rows, block by block; and measure what quantization costs on the way."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.blocks import (
    Digest,
    as_bytes,
    digest_extra_reads,
    largest_magnitude,
    read_beside,
    read_block,
    row_bytes,
)
from converters.checkpoint.plan import SourceRows, Unit
from converters.errors import InputError
from converters.quant.quality import SAMPLE_EVERY, TensorQuality
from converters.transforms.restore import Sampler, is_quantizing

if TYPE_CHECKING:
    import torch

    from converters.pipeline import Run


class Magnitudes:
    """Largest magnitudes of groups of weights, each found once, by the worker that first needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[tuple[SourceRows, ...], threading.Lock] = {}
        self._found: dict[tuple[SourceRows, ...], torch.Tensor] = {}

    def of(self, group: tuple[SourceRows, ...], run: "Run") -> "torch.Tensor":
        """Return the largest magnitude of a group, fp32 (1, 1).

        Raises:
            InputError: a value is NaN or Inf.
        """
        with self._lock:
            own_lock = self._locks.setdefault(group, threading.Lock())
        with own_lock:
            if group not in self._found:
                self._found[group] = largest_magnitude(run.reader, group, run.scratch, run.options.copy_block_bytes)
            return self._found[group]


class Making:
    """A unit being made.

    Args:
        unit: what to make.
        run: where to read, and how much at once.
        digest: takes all that decides the outputs, in the order of `source_digest_of`; None if nobody asks.
    """

    def __init__(self, unit: Unit, run: "Run", digest: Digest | None) -> None:
        self.unit, self.run, self.digest = unit, run, digest
        self._sampler = Sampler(unit.transform) if is_quantizing(unit.transform) else None
        self._largest: tuple[torch.Tensor, ...] = ()

    @property
    def quality(self) -> TensorQuality | None:
        """Errors of the codes, once all blocks are made; None where nothing is quantized."""
        return self.unit.quality if self._sampler is None else self._sampler.quality

    def blocks(self) -> "Iterator[tuple[int, tuple[torch.Tensor, ...]]]":
        """Yield the outputs' blocks from top to bottom, each with its first row."""
        import torch

        unit, run = self.unit, self.run
        if not unit.sources:
            yield 0, unit.transform(torch.empty(0))
        if unit.group:
            largest = run.magnitudes.of(unit.group, run)
            self._largest = (largest,)
            if self.digest is not None:
                self.digest.update(as_bytes(largest))
        for source, span in spans(unit, run):
            yield span.row, self._block(source, span)
            if self.digest is not None and span.stop == source.rows:
                digest_extra_reads(run.reader, source, self.digest, run.options.copy_block_bytes)

    def _block(self, source: SourceRows, span: "Span") -> "tuple[torch.Tensor, ...]":
        """Return what becomes of some rows of a source, with what stands to the right appended."""
        import torch

        bands = self._bands(source, span)
        if len(bands) == 1:
            return bands[0]
        slot, joined = source.num_reads, list[torch.Tensor]()
        for side in zip(*bands, strict=True):
            width = sum(band.shape[1] for band in side)
            # a buffer that stays, as those of reads do: fresh ones of this size make the process grow
            buffer = self.run.scratch.take(len(side[0]) * width * side[0].element_size(), slot + len(joined))
            out = torch.from_numpy(buffer).view(side[0].dtype).view(-1, width)
            joined.append(torch.cat(side, dim=1, out=out))
        return tuple(joined)

    def _bands(self, source: SourceRows, span: "Span", slot: int = 0) -> "list[tuple[torch.Tensor, ...]]":
        """Return what becomes of some rows of a source, and of those to its right, from left to right."""
        reader, scratch = self.run.reader, self.run.scratch
        rows_RC = read_block(reader, source.name, source.start + span.start, source.start + span.stop, scratch, slot)
        if self.digest is not None and not slot:
            # what stands to the right is read again for it, as a whole: it must not depend on the size of blocks
            self.digest.update(as_bytes(rows_RC))
        beside = [
            read_beside(reader, beside, span.start, span.stop, scratch, slot + number)
            for number, beside in enumerate(source.beside, 1)
        ]
        blocks = self._transform(rows_RC, beside, source, span)
        if source.columns is not None:
            blocks = tuple(block[:, source.columns.start : source.columns.stop] for block in blocks)
        if source.right is None:
            return [blocks]
        return [blocks, *self._bands(source.right, span, slot + len(beside) + 1)]

    def _transform(
        self, rows_RC: "torch.Tensor", beside: "list[torch.Tensor]", source: SourceRows, span: "Span"
    ) -> "tuple[torch.Tensor, ...]":
        try:
            blocks = self._accelerated(rows_RC, beside)
            if blocks is None:
                blocks = self.unit.transform(rows_RC, *beside, *self._largest)
        except InputError as error:
            raise InputError(
                f"tensor {source.name}, rows from {source.start + span.start}, {error.subject}",
                expected=error.expected,
                found=error.found,
                next_step=error.next_step,
            ) from error
        if self._sampler is not None:
            self._sampler.add(span.row, rows_RC, blocks, SAMPLE_EVERY)
        return blocks

    def _accelerated(self, rows_RC: "torch.Tensor", beside: "list[torch.Tensor]") -> "tuple[torch.Tensor, ...] | None":
        """Return what an accelerator makes of some rows; None if none does."""
        accelerator = self.run.options.accelerator
        # its outputs last until it is called again: too short where bands wait for the others to their right
        if accelerator is None or any(source.right is not None for source in self.unit.sources):
            return None
        return accelerator.apply(self.unit.transform, rows_RC, *beside, *self._largest)


@dataclass(frozen=True, slots=True)
class Span:
    """Rows [start, stop) of a source; the first of them makes row `row` of the outputs."""

    start: int
    stop: int
    row: int


def spans(unit: Unit, run: "Run") -> Iterator[tuple[SourceRows, Span]]:
    """Yield the blocks in which a unit's sources are read, from top to bottom."""
    row = 0
    for source in unit.sources:
        assert row % unit.grain == 0, unit
        step = run.options.block_rows(unit, row_bytes(run.reader, source))
        for start in range(0, source.rows, step):
            yield source, Span(start, min(start + step, source.rows), row + start)
        row += source.rows
