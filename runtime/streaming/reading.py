"""Weights read ahead of their use, in a fixed order, by threads; memory is bounded by how far ahead they may be."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType

import torch

from converters.schema import parse
from converters.waiting import wait_for_all
from converters.workers import start_pool
from runtime.model.loader import Fetched, ModelLoader

# what glibc may take from its heaps, DEFAULT_MMAP_THRESHOLD_MAX; larger blocks are always mapped
_MALLOC_HEAP_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Batch:
    """Parameters that are read, used and released together.

    Args:
        what: for people.
        names: of each side's model.
        experts: those of them, if they are routed experts.
        layer: that they belong to; None: to none.
    """

    what: str
    names: tuple[tuple[str, ...], ...]
    experts: range = range(0)
    layer: int | None = None

    def stays_for(self, later: "Batch") -> bool:
        """Whether this one is still in use when a later one is: all parts of a layer but its experts are."""
        return self.layer is not None and self.layer == later.layer and not self.experts

    def has_experts_of(self, layer: int) -> bool:
        """Whether it is routed experts of a layer."""
        return self.layer == layer and bool(self.experts)

    def narrowed(self, needed: Sequence[frozenset[int]]) -> "Batch":
        """Return it without the experts that a side, by its place, does not need; one that reads nothing has none."""
        names = tuple(
            tuple(name for name in side if parse(name).expert in experts)
            for side, experts in zip(self.names, needed, strict=True)
        )
        return replace(self, names=names, experts=self.experts if any(names) else range(0))


def batches_ahead(workers: int) -> int:
    """Return how many batches are read or held beyond the one in use."""
    # one more than there are threads: layers are made of large and small batches
    return workers + 1


class ReadAhead:
    """Hands out batches in order. A context manager: no thread outlives it.

    Args:
        loaders: one for each side.
        batches: in the order of `resident`.
        workers: threads that read.
        advance: told the bytes read, by those threads, and those that are skipped.
    Attributes:
        seconds_waiting: how long `resident` has waited for reads.
        bytes_read: by all threads.
        bytes_skipped: of experts that no token goes to.
    """

    def __init__(
        self, loaders: Sequence[ModelLoader], batches: Sequence[Batch], workers: int, advance: Callable[[int], None]
    ) -> None:
        self._loaders, self._advance = loaders, advance
        self._left = deque(batches)
        self._reading: deque[tuple[Batch, Future[list[Fetched]]]] = deque()
        self._ahead = batches_ahead(workers)
        self._threads = start_pool(workers, "read")
        self._lock = threading.Lock()
        device = loaders[0].engine.device
        self._upload, self._pool = Upload(device), Pool() if device == "cpu" else None
        self.seconds_waiting = 0.0
        self.bytes_read = self.bytes_skipped = 0

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._left.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._reading.clear()

    def peek(self) -> Batch | None:
        """Return the batch that comes next, None behind the last."""
        self._start(1)
        return self._reading[0][0] if self._reading else None

    def narrow(self, layer: int, needed: Sequence[frozenset[int]]) -> None:
        """Leave out a layer's experts that a side, by its place, does not need; what is being read already stays."""
        while self._reading and self._reading[-1][0].has_experts_of(layer) and self._reading[-1][1].cancel():
            self._left.appendleft(self._reading.pop()[0])
        kept: list[Batch] = []
        while self._left and self._left[0].has_experts_of(layer):
            batch = self._left.popleft()
            narrowed = batch.narrowed(needed)
            if narrowed.experts:
                kept.append(narrowed)
            self._skip(self._stored_bytes(batch) - self._stored_bytes(narrowed))
        self._left.extendleft(reversed(kept))

    def _stored_bytes(self, batch: Batch) -> int:
        return sum(loader.stored_bytes(names) for loader, names in zip(self._loaders, batch.names, strict=True))

    def _skip(self, num_bytes: int) -> None:
        if num_bytes:
            with self._lock:
                self.bytes_skipped += num_bytes
                self._advance(num_bytes)

    @contextmanager
    def resident(self) -> Iterator[Batch]:
        """Have the next batch in the models for the length of the context.

        Raises:
            InputError: a weight that cannot be read or decoded; raised where it would have been used.
        """
        self._start(1)
        batch, future = self._reading.popleft()
        self._start(self._ahead)
        begin = time.monotonic()
        wait_for_all([future])
        self.seconds_waiting += time.monotonic() - begin
        found = future.result()
        for loader, values in zip(self._loaders, found, strict=True):
            self._upload.hand_over(values)
            loader.place(values)
        try:
            yield batch
        finally:
            for loader, names in zip(self._loaders, batch.names, strict=True):
                loader.release(names)
            if self._pool is not None:
                self._pool.give(value for values in found for value in values.values())

    def _start(self, count: int) -> None:
        """Have as many batches under way."""
        while self._left and len(self._reading) < count:
            batch = self._left.popleft()
            self._reading.append((batch, self._threads.submit(self._read, batch)))

    def _read(self, batch: Batch) -> list[Fetched]:
        found = []
        for loader, names in zip(self._loaders, batch.names, strict=True):
            empty = self._pool.take if self._pool is not None else None
            fetched = loader.fetch(names, as_stored=True, empty=empty)
            found.append(self._upload(fetched))
            num_bytes = loader.stored_bytes(names)
            with self._lock:
                self.bytes_read += num_bytes
                self._advance(num_bytes)
        return found


class Pool:
    """Memory of weights that are done with, for others of the same shape: experts are all alike.

    Given back to malloc and asked for anew by several threads, such blocks leave its heaps in pieces, and these grow
    without end. Blocks that malloc maps from the kernel one by one, and so gives back to it, are not kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[tuple[torch.Size, torch.dtype], list[torch.Tensor]] = {}

    def take(self, shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor with any values in it."""
        with self._lock:
            free = self._free.get((shape, dtype))
            if free:
                return free.pop()
        return torch.empty(shape, dtype=dtype)

    def give(self, values: Iterable[torch.Tensor]) -> None:
        """Take tensors back that nobody uses any more."""
        with self._lock:
            for value in values:
                if value.nbytes <= _MALLOC_HEAP_BYTES:
                    self._free.setdefault((value.shape, value.dtype), []).append(value)


class Upload:
    """Copies weights from pinned memory to a GPU on a stream of its own, while another one computes."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._stream = torch.cuda.Stream() if device == "cuda" else None

    def __call__(self, values: Fetched) -> Fetched:
        """Return the weights on the device, complete; on the CPU they stay as they are."""
        if self._stream is None:
            return values
        with torch.cuda.stream(self._stream):
            moved = {name: value.pin_memory().to(self._device, non_blocking=True) for name, value in values.items()}
        self._stream.synchronize()
        return moved

    def hand_over(self, values: Fetched) -> None:
        """Tell the allocator that the stream which computes uses them from now on."""
        if self._stream is not None:
            for value in values.values():
                value.record_stream(torch.cuda.current_stream())
