"""Buffers for intermediate values that each thread keeps, and the pieces in which weights go through them.

A fresh temporary of a few MB is mapped, filled page by page and unmapped again at every operation: dividing 1 MB of
bf16 weights took 35 times as long as with a buffer that is already there.
"""

import threading
from collections.abc import Iterator

import torch

# values at once: a few fp32 buffers of this length stay in the cache of a core
CHUNK = 1 << 17


class Workspace(threading.local):
    """Buffers by name. What `take` returns is overwritten when the same thread takes that name again."""

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, like: torch.Tensor) -> torch.Tensor:
        """Return an uninitialised tensor on the device of `like`."""
        if like.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=like.device)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        buffer = self._buffers.get(name)
        if buffer is None or len(buffer) < nbytes:
            buffer = self._buffers[name] = torch.empty(nbytes, dtype=torch.uint8)
        return buffer[:nbytes].view(dtype).view(shape)


WORKSPACE = Workspace()


def row_chunks(rows: int, columns: int, size: int = 0) -> Iterator[slice]:
    """Yield ranges of rows with at most `size` values each, 0 meaning CHUNK, but at least a row."""
    step = max(1, (size or CHUNK) // max(1, columns))
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))
