"""The only composer: read rows, transform them, write them, shard by shard, in bounded memory.

Every worker takes one unit at a time and walks through its rows in blocks. Offsets come from the plan, so the bytes
written do not depend on the number of workers or the order in which they finish.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from converters.blocks import (
    Digest,
    Scratch,
    as_bytes,
    digest_extra_reads,
    largest_magnitude,
    read_beside,
    read_block,
    row_bytes,
)
from converters.checkpoint.journal import ShardRecord, TensorRecord
from converters.checkpoint.plan import OutputPlan, Shard, SourceRows, Unit
from converters.checkpoint.reader import CheckpointReader
from converters.checkpoint.writer import ShardWriter
from converters.errors import InputError, ResourceError
from converters.transforms.rows import Copy

if TYPE_CHECKING:
    import torch

    from converters.feed import Feed
    from converters.update import Previous

DEFAULT_MAX_MEMORY = 512 << 20
# large enough to keep the disk busy, small enough that a block and its working copies stay in the cache of a core
BLOCK_BYTES = 1 << 20
COPY_BLOCK_BYTES = 8 << 20
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a plan: threads, and the bytes that all blocks in flight may take together."""

    workers: int = 0
    max_memory: int = DEFAULT_MAX_MEMORY

    @property
    def num_workers(self) -> int:
        """Threads, 0 meaning one per core."""
        return self.workers or len(os.sched_getaffinity(0))

    def block_rows(self, unit: Unit, row_bytes: int) -> int:
        """Return how many source rows a worker holds at once."""
        share = int(self.max_memory / self.num_workers / unit.transform.working_bytes)
        wanted = COPY_BLOCK_BYTES if unit.transform.working_bytes == 1.0 else BLOCK_BYTES
        rows = min(wanted, share) // max(1, row_bytes)
        return max(unit.grain, rows // unit.grain * unit.grain)


def peak_block_bytes(plan: OutputPlan, reader: CheckpointReader, options: RunOptions) -> int:
    """Return the most bytes that blocks take at once: the workers' largest block, working copies included.

    The interpreter, its libraries and the tables of names come on top of this.

    Raises:
        ResourceError: max_memory does not hold one row for each worker.
    """
    largest, where = 0.0, ""
    for shard in plan.shards:
        for unit in shard.units:
            widest = max((row_bytes(reader, source) for source in unit.sources), default=0)
            rows = min(options.block_rows(unit, widest), unit.num_rows)
            block = rows * widest * unit.transform.working_bytes
            if block > largest:
                largest, where = block, unit.outputs[0].name
    peak = ceil(largest * options.num_workers)
    if peak > options.max_memory:
        raise ResourceError(
            "--max-memory",
            expected=f"at least {peak} bytes, for {where}",
            found=f"{options.max_memory}",
            next_step="Raise it or use fewer workers.",
        )
    return peak


class Stop(Exception):
    """Ends a worker between two blocks, because another one failed or the run was interrupted."""


@dataclass(frozen=True, slots=True)
class Run:
    """What the workers of one run share: where to read, how much at once, whom to tell, and whether to stop."""

    reader: CheckpointReader
    options: RunOptions
    on_bytes: Progress
    stop: threading.Event = field(default_factory=threading.Event)
    scratch: Scratch = field(default_factory=Scratch)
    previous: "Previous | None" = None
    on_unit: Callable[[str], None] | None = None
    feed: "Feed | None" = None
    magnitudes: "Magnitudes" = field(default_factory=lambda: Magnitudes())

    def step(self, nbytes: int) -> None:
        """Report progress; end the worker if the run is over."""
        if self.stop.is_set():
            raise Stop
        self.on_bytes(nbytes)


class Magnitudes:
    """Largest magnitudes of groups of weights, each found once, by the worker that first needs it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._locks: dict[tuple[SourceRows, ...], threading.Lock] = {}
        self._found: dict[tuple[SourceRows, ...], torch.Tensor] = {}

    def of(self, group: tuple[SourceRows, ...], reader: CheckpointReader, scratch: Scratch) -> "torch.Tensor":
        """Return the largest magnitude of a group, fp32 (1, 1).

        Raises:
            InputError: a value is NaN or Inf.
        """
        with self._lock:
            own_lock = self._locks.setdefault(group, threading.Lock())
        with own_lock:
            if group not in self._found:
                self._found[group] = largest_magnitude(reader, group, scratch)
            return self._found[group]


class ShardRun:
    """A shard being written: the worker that finishes its last unit publishes it."""

    def __init__(self, dst: Path, shard: Shard, on_shard: Callable[[ShardRecord], None]) -> None:
        self.shard = shard
        self.writer = ShardWriter(dst, shard)
        self._on_shard = on_shard
        self._lock = threading.Lock()
        self._records: dict[str, TensorRecord] = {}
        self._units_left = len(shard.units)

    def unit_done(self, records: dict[str, TensorRecord]) -> None:
        """Take the digests of a unit; publish the shard after the last one."""
        with self._lock:
            self._records |= records
            self._units_left -= 1
            if self._units_left:
                return
        self.writer.finish()
        records = {entry.name: self._records[entry.name] for entry in self.shard.entries}
        self._on_shard(ShardRecord(self.shard.file, self.shard.file_bytes, records))


def write_shards(shards: Sequence[Shard], dst: Path, run: Run, on_shard: Callable[[ShardRecord], None]) -> None:
    """Write shards into dst, calling on_shard, from a worker's thread, when one has its final name and is synced.

    Two shards are in flight at most, so that one is synced while the next is being filled.

    Raises:
        InputError: a source tensor is unreadable or holds NaN or Inf.
        ResourceError: the disk is full.
    """
    started: list[ShardRun] = []
    jobs: set[Future[None]] = set()
    with single_threaded_ops(), ThreadPoolExecutor(run.options.num_workers, "glm4moe") as pool:
        try:
            for shard in shards:
                if run.feed is not None:
                    if not run.feed.is_ready(shard):
                        # what the shard before it needs goes when it is done, and may have to make room
                        _finish(jobs)
                    run.feed.before(shard)
                shard_run = ShardRun(dst, shard, on_shard)
                started.append(shard_run)
                shard_run.writer.open()
                own = {pool.submit(_write_unit, unit, shard_run, run) for unit in shard.units}
                _finish(jobs)
                jobs = own
            _finish(jobs)
        finally:
            # a file must not be closed under a worker that still writes to it
            run.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for shard_run in started:
                shard_run.writer.abort()


def _finish(jobs: set[Future[None]]) -> None:
    """Wait for jobs; raise the first failure as soon as there is one."""
    done, _ = wait(jobs, return_when=FIRST_EXCEPTION)
    for job in done:
        job.result()


def _write_unit(unit: Unit, shard_run: ShardRun, run: Run) -> None:
    if run.on_unit:
        run.on_unit(f"{shard_run.shard.file} {unit.outputs[0].name}")
    kept = run.previous.copy(unit, shard_run.writer.write, run.step) if run.previous else None
    shard_run.unit_done(kept if kept is not None else _make_unit(unit, shard_run, run))


def _make_unit(unit: Unit, shard_run: ShardRun, run: Run) -> dict[str, TensorRecord]:
    digests = {output.name: hashlib.sha256() for output in unit.outputs}
    source_digest = hashlib.sha256()
    is_copy = isinstance(unit.transform, Copy) and all(source.is_whole for source in unit.sources)
    for row, blocks in made_blocks(unit, run, None if is_copy else source_digest):
        for output, block in zip(unit.outputs, blocks, strict=True):
            if row and not output.grain:
                continue
            data = as_bytes(block)
            digests[output.name].update(data)
            shard_run.writer.write(output.name, output.offset(row, unit.num_rows), data)
            run.step(len(data))
    hexes = {name: digest.hexdigest() for name, digest in digests.items()}
    source_hex = hexes[unit.outputs[0].name] if is_copy else source_digest.hexdigest()
    return {name: TensorRecord(value, source_hex) for name, value in hexes.items()}


def made_blocks(unit: Unit, run: Run, digest: Digest | None) -> "Iterator[tuple[int, tuple[torch.Tensor, ...]]]":
    """Yield the outputs' blocks from top to bottom, each with its first row; digest takes what is read for them."""
    import torch

    if not unit.sources:
        yield 0, unit.transform(torch.empty(0))
    extra: tuple[torch.Tensor, ...] = ()
    if unit.group:
        largest = run.magnitudes.of(unit.group, run.reader, run.scratch)
        extra = (largest,)
        if digest is not None:
            digest.update(as_bytes(largest))
    row = 0
    for source in unit.sources:
        assert row % unit.grain == 0, unit
        step = run.options.block_rows(unit, row_bytes(run.reader, source))
        for start in range(0, source.rows, step):
            yield row + start, _make(unit, source, start, min(start + step, source.rows), run, digest, extra)
        if digest is not None:
            digest_extra_reads(run.reader, source, digest)
        row += source.rows


def _make(
    unit: Unit,
    source: SourceRows,
    start: int,
    stop: int,
    run: Run,
    digest: Digest | None,
    extra: "tuple[torch.Tensor, ...]",
    slot: int = 0,
) -> "tuple[torch.Tensor, ...]":
    """Return what becomes of rows [start, stop) of a source, with what stands to the right appended."""
    import torch

    rows_RC = read_block(run.reader, source.name, source.start + start, source.start + stop, run.scratch, slot)
    if digest is not None:
        digest.update(as_bytes(rows_RC))
    beside = [
        read_beside(run.reader, beside, start, stop, run.scratch, slot + number)
        for number, beside in enumerate(source.beside, 1)
    ]
    blocks = _transform(unit, rows_RC, [*beside, *extra], source.name, source.start + start)
    if source.columns is not None:
        blocks = tuple(block[:, source.columns.start : source.columns.stop] for block in blocks)
    if source.right is not None:
        # what is read there goes into the digest later, as a whole: it must not depend on the size of blocks
        rest = _make(unit, source.right, start, stop, run, None, extra, slot + len(beside) + 1)
        blocks = tuple(torch.cat(pair, dim=1) for pair in zip(blocks, rest, strict=True))
    return blocks


def _transform(
    unit: Unit, rows_RC: "torch.Tensor", beside: "list[torch.Tensor]", name: str, start: int
) -> "tuple[torch.Tensor, ...]":
    try:
        return unit.transform(rows_RC, *beside)
    except InputError as error:
        raise InputError(
            f"tensor {name}, rows from {start}, {error.subject}",
            expected=error.expected,
            found=error.found,
            next_step=error.next_step,
        ) from error


@contextmanager
def single_threaded_ops() -> Iterator[None]:
    """Let each worker compute on its own core: torch's inner threads would only fight over them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
