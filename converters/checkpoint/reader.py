"""Lazy reading: headers are parsed once, data is fetched by ranges with pread into buffers of the caller's size.

pread rather than a memory map: a file that is cut off while it is read gives an error here, not a SIGBUS.
"""

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from converters.checkpoint.disk_read import open_file, read_exactly
from converters.checkpoint.dtypes import itemsize, torch_dtype
from converters.checkpoint.header import TensorEntry
from converters.checkpoint.index import CheckpointIndex, checked_path, scan_checkpoint
from converters.errors import InputError

if TYPE_CHECKING:
    import torch


class Span(NamedTuple):
    """Bytes [begin, end) of a tensor's data."""

    name: str
    begin: int
    end: int


class CheckpointReader:
    """Range access to the tensors of a checkpoint folder. Safe to use from several threads.

    Memory: what a call returns, nothing more; one file descriptor per shard touched.
    """

    def __init__(self, index: CheckpointIndex) -> None:
        self.index = index
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}

    @classmethod
    def open(cls, folder: Path) -> "CheckpointReader":
        """Scan a folder and return its reader; see `scan_checkpoint` for what is refused."""
        return cls(scan_checkpoint(folder))

    def __enter__(self) -> "CheckpointReader":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all files; a later read opens them again."""
        with self._lock:
            for descriptor in self._descriptors.values():
                os.close(descriptor)
            self._descriptors.clear()

    def widened(self, index: CheckpointIndex) -> "CheckpointReader":
        """Return a reader of an index that has more files; both have the same files open, and either closes them."""
        wider = CheckpointReader(index)
        wider._lock, wider._descriptors = self._lock, self._descriptors
        return wider

    def forget(self, file: str) -> None:
        """Close one file: the disk space of a removed one is free only then."""
        with self._lock:
            descriptor = self._descriptors.pop(file, None)
            if descriptor is not None:
                os.close(descriptor)

    def path(self, file: str) -> Path:
        """Return where a file of the index is read from; see `checked_path` for what is refused."""
        return checked_path(self.index.elsewhere.get(file, self.index.folder), file)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self.index.entries)

    def entry(self, name: str) -> TensorEntry:
        """Return dtype, shape and place of a tensor.

        Raises:
            InputError: the checkpoint has no such tensor.
        """
        if name not in self.index.entries:
            raise InputError(f"tensor {name}", expected=f"in {self.index.folder}", found="no such tensor")
        return self.index.entries[name][1]

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a writable byte buffer from `offset` bytes into the tensor's data.

        Raises:
            InputError: the file ends before the buffer is full, or cannot be read.
        """
        file, entry = self.index.entries[name]
        assert 0 <= offset <= entry.nbytes - len(buffer), (name, offset, len(buffer), entry.nbytes)
        read_exactly(self._descriptor(file), buffer, entry.begin + offset, self.index.folder / file)

    def read_spans(self, spans: Sequence[Span]) -> list[bytearray]:
        """Return the bytes of each span, in order; for many small ones, of which all are held at once.

        Raises:
            InputError: as those of `read_into`.
        """
        found = [bytearray(span.end - span.begin) for span in spans]
        for span, data in zip(spans, found, strict=True):
            self.read_into(span.name, span.begin, memoryview(data))
        return found

    def read(self, name: str) -> "torch.Tensor":
        """Return a whole tensor in its stored dtype and shape."""
        entry = self.entry(name)
        return self._tensor(entry, 0, entry.nbytes, entry.shape)

    def read_rows(self, name: str, start: int, stop: int) -> "torch.Tensor":
        """Return rows [start, stop) of dim 0, in the stored dtype."""
        entry = self.entry(name)
        row_bytes = entry.nbytes // entry.shape[0]
        return self._tensor(entry, start * row_bytes, stop * row_bytes, (stop - start, *entry.shape[1:]))

    def _tensor(self, entry: TensorEntry, begin: int, end: int, shape: tuple[int, ...]) -> "torch.Tensor":
        import torch

        assert (end - begin) % itemsize(entry.dtype) == 0, (entry, begin, end)
        data = torch.empty(end - begin, dtype=torch.uint8)
        self.read_into(entry.name, begin, data.numpy().data)
        return data.view(torch_dtype(entry.dtype)).view(shape)

    def _descriptor(self, file: str) -> int:
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = open_file(self.path(file))
            return self._descriptors[file]
