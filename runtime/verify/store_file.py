"""One safetensors file that is written and read by rows, whatever its size; it appears only when it is complete."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

import torch

from converters.checkpoint.disk_read import open_file, read_exactly
from converters.checkpoint.dtypes import itemsize, torch_dtype
from converters.checkpoint.header import TensorEntry, build_header, read_header
from converters.checkpoint.writer import disk_errors, partial_path, publish
from converters.errors import InputError

# name, dtype as safetensors spells it, shape
TensorSpec = tuple[str, str, tuple[int, ...]]


class RowWriter:
    """A file being filled; a context manager that leaves nothing behind unless `finish` was reached.

    Args:
        path: its name once it is complete.
        tensors: what it holds; the order of their data goes by dtype, so that each is aligned to its elements.
    Raises:
        ResourceError: the disk has no room. Space is reserved here, not looked at.
    """

    def __init__(self, path: Path, tensors: Sequence[TensorSpec]) -> None:
        self.path = path
        self._partial = partial_path(path)
        self._header, entries = build_header(sorted(tensors, key=lambda spec: -itemsize(spec[1])))
        self._places = {entry.name: entry for entry in entries}
        self._descriptor = -1

    def __enter__(self) -> "RowWriter":
        size = len(self._header) + sum(entry.nbytes for entry in self._places.values())
        with ExitStack() as stack, disk_errors(self.path):
            stack.callback(self._abort)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptor = os.open(self._partial, flags, 0o666)
            os.posix_fallocate(self._descriptor, 0, size)
            self._write_at(0, memoryview(self._header))
            stack.pop_all()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._abort()

    @property
    def names(self) -> frozenset[str]:
        """Names of the tensors."""
        return frozenset(self._places)

    def write(self, name: str, rows: torch.Tensor, first_row: int = 0) -> None:
        """Write rows of a tensor, converted to its dtype, from `first_row` of dim 0 on."""
        place = self._places[name]
        data = rows.detach().to(device="cpu", dtype=torch_dtype(place.dtype)).contiguous()
        row_bytes = place.nbytes // max(1, place.shape[0])
        assert data.shape[1:] == place.shape[1:], (name, data.shape, place.shape)
        assert first_row + len(data) <= place.shape[0], (name, first_row, data.shape, place.shape)
        # 16-bit floats have no numpy counterpart
        with disk_errors(self.path):
            self._write_at(place.begin + first_row * row_bytes, data.view(-1).view(torch.uint8).numpy().data)

    def finish(self) -> None:
        """Sync the file and give it its final name."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)
            self._close()
            publish(self._partial, self.path)

    def _write_at(self, position: int, data: memoryview) -> None:
        while len(data):
            count = os.pwrite(self._descriptor, data, position)
            data, position = data[count:], position + count

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _abort(self) -> None:
        if self._descriptor >= 0:
            with suppress(OSError):
                self._close()
            self._partial.unlink(missing_ok=True)


class RowReader:
    """Reads tensors of one file by rows; a context manager. Memory: what a call returns.

    Raises:
        InputError: there is no such file, or it is not a whole safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries: dict[str, TensorEntry] = {entry.name: entry for entry in read_header(path)}
        self._descriptor = open_file(path)

    def __enter__(self) -> "RowReader":
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows [start, stop) of dim 0, all by default, in the stored dtype.

        Raises:
            InputError: the file has no such tensor, or ends too early.
        """
        entry = self.entries.get(name)
        if entry is None:
            raise InputError(f"{self.path}: {name}", expected="a tensor of this name", found="none")
        stop = entry.shape[0] if stop is None else stop
        assert 0 <= start <= stop <= entry.shape[0], (name, start, stop, entry.shape)
        row_bytes = entry.nbytes // max(1, entry.shape[0])
        data = torch.empty((stop - start) * row_bytes, dtype=torch.uint8)
        if len(data):
            read_exactly(self._descriptor, data.numpy().data, entry.begin + start * row_bytes, self.path)
        return data.view(torch_dtype(entry.dtype)).view(stop - start, *entry.shape[1:])
