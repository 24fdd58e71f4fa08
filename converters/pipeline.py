"""The only composer: read rows, transform them, write them, shard by shard, in bounded memory.

Every worker takes one unit at a time and walks through its rows in blocks. Offsets come from the plan, so the bytes
written do not depend on the number of workers or the order in which they finish.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

from converters.accelerator import Accelerator
from converters.blocks import Scratch, as_bytes, row_bytes
from converters.checkpoint.content_digest import Algorithm
from converters.checkpoint.journal import ShardRecord, TensorRecord
from converters.checkpoint.plan import Columns, OutputPlan, Shard, Unit
from converters.checkpoint.reader import CheckpointReader
from converters.checkpoint.writer import ShardWriter
from converters.copying import begin, is_bytewise
from converters.digests import OutputDigest, SourceDigest, is_plain_copy
from converters.errors import ResourceError
from converters.making import Magnitudes
from converters.together import all_columns, batches, shared_reads
from converters.waiting import wait_for_all
from converters.workers import start_pool

if TYPE_CHECKING:
    from converters.feed import Feed
    from converters.update import Previous

DEFAULT_MAX_MEMORY = 512 << 20
# large enough that a worker seldom waits for another's turn in the interpreter, which each operation ends with; what
# takes many working copies gets smaller ones, so that they still fit the cache that cores share
BLOCK_BYTES = 4 << 20
WORKING_BYTES = 40 << 20
COPY_BLOCK_BYTES = 2 << 20
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How to run a plan: threads, the bytes that all blocks in flight may take together, and what helps the CPU."""

    workers: int = 0
    max_memory: int = DEFAULT_MAX_MEMORY
    accelerator: Accelerator | None = None

    @property
    def num_workers(self) -> int:
        """Threads, 0 meaning one per core."""
        return self.workers or len(os.sched_getaffinity(0))

    @property
    def copy_block_bytes(self) -> int:
        """Bytes of the buffer through which a worker copies or hashes what it does not transform."""
        return max(1, min(COPY_BLOCK_BYTES, self.max_memory // self.num_workers))

    def block_rows(self, unit: Unit, row_bytes: int) -> int:
        """Return how many source rows a worker holds at once."""
        share = int(self.max_memory / self.num_workers / unit.working_bytes)
        working_bytes = unit.transform.working_bytes
        wanted = COPY_BLOCK_BYTES if working_bytes == 1.0 else min(BLOCK_BYTES, int(WORKING_BYTES / working_bytes))
        if self.accelerator is not None and self.accelerator.supports(unit.transform):
            wanted = self.accelerator.block_bytes
        rows = min(wanted, share) // max(1, row_bytes)
        return max(unit.grain, rows // unit.grain * unit.grain)


def block_kinds(plan: OutputPlan, reader: CheckpointReader) -> list[tuple[Unit, int]]:
    """Return the first unit of each kind that may take another block, with the bytes of its widest row."""
    kinds: dict[Hashable, tuple[Unit, int]] = {}
    for shard in plan.shards:
        for unit in shard.units:
            widest = max([row_bytes(reader, source) for source in unit.sources], default=0)
            key = unit.transform, unit.working_bytes, unit.grain, unit.num_rows, widest
            kinds.setdefault(key, (unit, widest))
    return list(kinds.values())


def peak_block_bytes(kinds: Iterable[tuple[Unit, int]], options: RunOptions) -> int:
    """Return the most bytes that blocks take at once: the workers' largest block, working copies included.

    The interpreter, its libraries and the tables of names come on top of this.

    Args:
        kinds: see `block_kinds`.
        options: of the run.
    Raises:
        ResourceError: max_memory does not hold one row for each worker.
    """
    largest, where = 0.0, ""
    for unit, widest in kinds:
        rows = min(options.block_rows(unit, widest), unit.num_rows)
        block = rows * widest * unit.working_bytes
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
    """What the workers of one run share: where to read, how much at once, whom to tell, and whether to stop.

    `digest`: the plan's algorithm.
    """

    reader: CheckpointReader
    options: RunOptions
    on_bytes: Progress
    digest: Algorithm = Algorithm.SHA256
    stop: threading.Event = field(default_factory=threading.Event)
    scratch: Scratch = field(default_factory=Scratch)
    cuts: Scratch = field(default_factory=Scratch)
    previous: "Previous | None" = None
    on_unit: Callable[[str], None] | None = None
    feed: "Feed | None" = None
    magnitudes: Magnitudes = field(default_factory=Magnitudes)

    def step(self, nbytes: int) -> None:
        """Report progress; end the worker if the run is over."""
        if self.stop.is_set():
            raise Stop
        self.on_bytes(nbytes)


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

    Two shards are in flight, or two batches of them, so that one is synced while the next is being filled; more only
    while their units are fewer than the workers, as those of stacks of experts are.

    Raises:
        InputError: a source tensor is unreadable or holds NaN or Inf.
        ResourceError: the disk is full.
    """
    started: list[ShardRun] = []
    in_flight: deque[set[Future[None]]] = deque()
    units = (unit for shard in shards for unit in shard.units)
    with single_threaded_ops(units), start_pool(run.options.num_workers, "glm4moe") as pool:
        try:
            for batch in batches(shards):
                if run.feed is not None:
                    for shard in batch:
                        if not run.feed.is_ready(shard):
                            # what the shard before it needs goes when it is done, and may have to make room
                            _wait_for_batches(in_flight)
                        run.feed.before(shard)
                opened = [ShardRun(dst, shard, on_shard) for shard in batch]
                started += opened
                for shard_run in opened:
                    shard_run.writer.open()
                in_flight.append({pool.submit(_write_reads, group, run) for group in shared_reads(batch, opened)})
                while len(in_flight) > 1 and (run.feed or _num_pending(in_flight) > run.options.num_workers):
                    wait_for_all(in_flight.popleft())
            _wait_for_batches(in_flight)
        finally:
            # a file must not be closed under a worker that still writes to it
            run.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            for shard_run in started:
                shard_run.writer.abort()


def _wait_for_batches(in_flight: deque[set[Future[None]]]) -> None:
    while in_flight:
        wait_for_all(in_flight.popleft())


def _num_pending(in_flight: Iterable[set[Future[None]]]) -> int:
    return sum(not job.done() for jobs in in_flight for job in jobs)


def _write_reads(group: list[tuple[Unit, ShardRun]], run: Run) -> None:
    """Write units that need the same rows, reading them once."""
    first, shard_run = group[0]
    if len(group) == 1:
        _write_unit(first, shard_run, run)
        return
    if run.on_unit:
        run.on_unit(f"{shard_run.shard.file} {first.outputs[0].name} and {len(group) - 1} more")
    by_columns: dict[Columns | None, list[tuple[Unit, ShardRun]]] = {}
    for unit, shard_run in group:
        by_columns.setdefault(unit.sources[0].columns, []).append((unit, shard_run))
    digests = {columns: OutputDigest(units[0][0], run.digest) for columns, units in by_columns.items()}
    source_digest = None if all(is_plain_copy(unit) for unit, _ in group) else SourceDigest()
    for row, (block,) in begin(all_columns(first), run, source_digest).blocks():
        for columns, units in by_columns.items():
            data = as_bytes(block if columns is None else block[:, columns.start : columns.stop], run.cuts)
            digests[columns].update(data)
            for unit, shard_run in units:
                (output,) = unit.outputs
                shard_run.writer.write(output.name, output.offset(row, unit.num_rows), data)
                run.step(len(data))
    for columns, units in by_columns.items():
        record = digests[columns].record(source_digest)
        for unit, shard_run in units:
            shard_run.unit_done({unit.outputs[0].name: record})


def _write_unit(unit: Unit, shard_run: ShardRun, run: Run) -> None:
    if run.on_unit:
        run.on_unit(f"{shard_run.shard.file} {unit.outputs[0].name}")
    kept = run.previous.copy(unit, shard_run.writer.write, run.step) if run.previous else None
    shard_run.unit_done(kept if kept is not None else _make_unit(unit, shard_run, run))


def _make_unit(unit: Unit, shard_run: ShardRun, run: Run) -> dict[str, TensorRecord]:
    digests = {output.name: OutputDigest(unit, run.digest) for output in unit.outputs}
    source_digest = None if is_plain_copy(unit) else SourceDigest()
    making = begin(unit, run, source_digest)
    for row, blocks in making.blocks():
        for output, block in zip(unit.outputs, blocks, strict=True):
            if row and not output.grain:
                continue
            data = as_bytes(block, run.cuts)
            digests[output.name].update(data)
            shard_run.writer.write(output.name, output.offset(row, unit.num_rows), data)
            run.step(len(data))
    records = {name: digest.record(source_digest) for name, digest in digests.items()}
    codes = unit.outputs[0].name
    return records | {codes: replace(records[codes], quality=making.quality)}


@contextmanager
def single_threaded_ops(units: Iterable[Unit] | None = None) -> Iterator[None]:
    """Let each worker compute on its own core: torch's inner threads would only fight over them.

    Args:
        units: what is to be made; of units that only copy, torch is not imported. None: anything.
    """
    if units is not None and all(map(is_bytewise, units)):
        yield
        return
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
