"""Make reads below a folder fail or come back short."""

import errno
import io
import os
import time
from pathlib import Path
from typing import Any

from tests.faults.points import Points


def install(
    points: Points, folder: str, *, at: int = 0, times: int = 1, fault: str = "EIO", delay: float = 0.0
) -> None:
    """Let read number `at` below the folder, and the `times - 1` after it, fail with an errno or be `short`.

    Args:
        points: those of the process; reads are counted beside them.
        folder: where.
        at: from 1; 0 for none.
        times: how many.
        fault: name of an errno, `short` for half of the bytes, or name of a signal to be sent to the process.
        delay: seconds each read takes longer.
    """
    preadv, io_open, state = os.preadv, io.open, {"reads": 0}

    def struck(path: str) -> bool:
        if not path.startswith(folder):
            return False
        if delay:
            time.sleep(delay)
        state["reads"] += 1
        points.counter[8:16] = state["reads"].to_bytes(8, "little")
        if not at <= state["reads"] < at + times:
            return False
        if fault.startswith("SIG"):
            points.send(fault)
            return False
        if fault != "short":
            raise OSError(getattr(errno, fault), os.strerror(getattr(errno, fault)), path)
        return True

    def short_preadv(descriptor: int, buffers: list[Any], offset: int) -> int:
        if struck(str(Path(f"/proc/self/fd/{descriptor}").readlink())):
            buffers = [memoryview(buffers[0])[: (len(buffers[0]) + 1) // 2]]
        return preadv(descriptor, buffers, offset)

    def open_for_reading(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
        opened = io_open(file, mode, *rest, **named)
        return ReadFile(opened, os.path.abspath(file), struck) if mode == "rb" else opened

    os.preadv, io.open = short_preadv, open_for_reading


class ReadFile:
    """A file opened by name whose `read` may fail; only an unbuffered one can come back short."""

    def __init__(self, file: Any, path: str, struck: Any) -> None:
        self.file, self.path, self.struck = file, path, struck

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "ReadFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def read(self, size: int = -1) -> bytes:
        if self.struck(self.path) and size > 1 and isinstance(self.file, io.FileIO):
            return self.file.read((size + 1) // 2)
        return self.file.read(size)
