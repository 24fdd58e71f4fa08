"""Buffers for intermediate values that each thread keeps, and the pieces in which weights go through them.

A fresh temporary of a few MB is mapped, filled page by page and unmapped again at every operation: dividing 1 MB of
bf16 weights took 35 times as long as with a buffer that is already there.
"""

import threading
from collections.abc import Iterator
from typing import Any, TypeAlias

import numpy as np
import torch

# values at once: a few fp32 buffers of this length stay near the core; half as many, and threads that take turns in the
# interpreter wait for each other twice as often
CHUNK = 1 << 18
# views that are kept; a model has a few shapes of rows
_MOST_VIEWS = 256
Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]


class Workspace(threading.local):
    """Buffers by name. What `take` returns is overwritten when the same thread takes that name again."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}
        # making a view takes as long as working through a thousand values
        self._views: dict[tuple[object, ...], torch.Tensor] = {}
        self._arrays: dict[tuple[object, ...], Array] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised tensor on the device of `like`."""
        if like.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=like.device)
        key = (name, shape, dtype)
        view = self._views.get(key)
        if view is None:
            # what is made in inference mode could not be written to outside of it
            with torch.inference_mode(False):
                view = self._bytes(name, torch.Size(shape).numel() * dtype.itemsize).view(dtype).view(shape)
            self._views[key] = view
        return view

    def array(self, name: str, shape: tuple[int, ...], dtype: type[np.generic]) -> Array:
        """Return an uninitialised array in the buffer of a name."""
        key = (name, shape, dtype)
        view = self._arrays.get(key)
        if view is None:
            count = torch.Size(shape).numel()
            with torch.inference_mode(False):
                view = self._bytes(name, count * np.dtype(dtype).itemsize).numpy().view(dtype).reshape(shape)
            self._arrays[key] = view
        return view

    def _bytes(self, name: str, nbytes: int) -> torch.Tensor:
        buffer = self._buffers.get(name)
        is_short = buffer is None or len(buffer) < nbytes
        if is_short or len(self._views) + len(self._arrays) >= _MOST_VIEWS:
            # views of buffers that have been replaced would keep these
            self._views.clear()
            self._arrays.clear()
        if is_short:
            buffer = self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
        assert buffer is not None
        return buffer[:nbytes]


WORKSPACE = Workspace()


def chunk_rows(columns: int, size: int = 0) -> int:
    """Return how many rows have at most `size` values, 0 meaning CHUNK, but at least one."""
    return max(1, (size or CHUNK) // max(1, columns))


def row_chunks(rows: int, columns: int, size: int = 0) -> Iterator[slice]:
    """Yield ranges of `chunk_rows` rows."""
    step = chunk_rows(columns, size)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
