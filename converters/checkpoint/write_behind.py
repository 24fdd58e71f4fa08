"""Written pages on their way to the disk while more is written, and out of memory once they are there.

Otherwise they pile up in the page cache: the sync at the end of a file waits for all of them, and a large checkpoint
pushes out of memory whatever else the machine had there. Both calls are hints; what is on the disk, fsync says.
"""

import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache

# bytes that are handed to the disk together, and bytes that it gets time for before they are let go of
BATCH_BYTES = 16 << 20
BEHIND_BYTES = 64 << 20
_SYNC_FILE_RANGE_WRITE = 2
Span = tuple[int, int]


class WriteBehind:
    """Follows the writes to one file, from any thread."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._fresh: list[Span] = []
        self._fresh_bytes = 0
        self._sent: deque[list[Span]] = deque()

    def wrote(self, begin: int, end: int) -> None:
        """Take note of bytes [begin, end) that were written."""
        with self._lock:
            self._fresh.append((begin, end))
            self._fresh_bytes += end - begin
            if self._fresh_bytes < BATCH_BYTES:
                return
            batch, self._fresh, self._fresh_bytes = merged(self._fresh), [], 0
            self._sent.append(batch)
            past = self._sent.popleft() if len(self._sent) > BEHIND_BYTES // BATCH_BYTES else []
        for begin, end in batch:
            _start_writing()(self._descriptor, begin, end - begin, _SYNC_FILE_RANGE_WRITE)
        with suppress(OSError):
            for begin, end in past:
                os.posix_fadvise(self._descriptor, begin, end - begin, os.POSIX_FADV_DONTNEED)


def merged(spans: Iterable[Span]) -> list[Span]:
    """Return spans in their order in the file, those that touch as one."""
    found: list[Span] = []
    for begin, end in sorted(spans):
        if found and found[-1][1] >= begin:
            found[-1] = found[-1][0], max(end, found[-1][1])
        else:
            found.append((begin, end))
    return found


@cache
def _start_writing() -> Callable[[int, int, int, int], int]:
    """Return sync_file_range(2), which Python does not have; what does nothing where the C library has none."""
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is None:
        return lambda *_: 0
    # without waiting it takes no error away from the fsync that has to report it
    function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return function
