"""Count the calls through which a run changes its output folder, and let one of them fail: kill, power loss, errors.

Every call of `os` and `io.open` that makes, writes, syncs, renames or removes something under the folder is a point.
Points are numbered from 1 in the order in which they are reached.
"""

import errno
import io
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.disk import Disk

# longer than anything takes that goes on at all
PATIENCE_SECONDS = 300
# what takes room on a full disk; removing does not
SPACE = frozenset({"open", "write", "fallocate", "fsync", "replace", "mkdir"})


class Points:
    """The points of one process.

    Args:
        folder: only calls below it count.
        counter: shared memory where the number of points reached is kept for the parent.
        at: number of the point where `action` happens, 0 for none.
        action: `kill` ends the process in the middle of the call, `power` too and drops what is not synced;
            `full` makes this and every later call fail that needs space; `EIO` and its like fail this call once;
            `short` does half of a write and goes on; `SIGTERM` and its like send the process this signal, and the call
            goes on when it was noticed.
        again: send the same signal once more, so many points later.
        seed: which of the unsynced names survive a power loss; None for none.
        delay: seconds each write takes longer.
        hold: a call on a name with this in it waits until a signal was noticed, or until the file `until` is there:
            the run cannot be over before what is to happen to it has happened, however slow the machine is.
    """

    def __init__(
        self,
        folder: str,
        counter: Any,
        *,
        at: int = 0,
        action: str = "",
        again: int = 0,
        seed: int | None = None,
        delay: float = 0.0,
        hold: str = "",
        until: str = "",
    ) -> None:
        self.folder, self.counter, self.at, self.action, self.delay = folder, counter, at, action, delay
        self.again, self.hold, self.until = again, hold, until
        self.noticed = threading.Event()
        self.parent = os.path.dirname(folder)
        self.random = None if seed is None else random.Random(seed)
        self.disk = Disk(folder) if action == "power" else None
        self.is_full = False
        self._lock = threading.RLock()

    def call(self, kind: str, path: str, act: Callable[[], Any], half: Callable[[], Any] | None = None) -> Any:
        """Pass through a point, or do what is to happen there; `half` does a part of the call."""
        if not path.startswith(self.folder) and (kind, path) != ("fsync", self.parent):
            return act()
        if self.delay and kind == "write":
            time.sleep(self.delay)
        if self.hold and self.hold in os.path.basename(path):
            self._wait()
        with self._lock:
            number = int.from_bytes(self.counter[:8], "little") + 1
            self.counter[:8] = number.to_bytes(8, "little")
        if self.action.startswith("SIG") and number in (self.at, self.at + self.again):
            self.send(self.action)
        with self._lock:
            if number == self.at and not self.action.startswith("SIG"):
                result = self._strike(kind, path, half)
                if result is not None:
                    return result
            if self.is_full and kind in SPACE:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
            if self.disk is None:
                return act()
            return self.disk.note(kind, path, act)

    def _strike(self, kind: str, path: str, half: Callable[[], Any] | None) -> Any:
        if self.action == "short":
            return half() if half else None
        if self.action == "full":
            self.is_full = True
            return half() if half else None
        if self.action in ("kill", "power"):
            if half:
                half()
            self.die()
        raise OSError(getattr(errno, self.action), os.strerror(getattr(errno, self.action)), path)

    def send(self, name: str) -> None:
        """Send this process a signal and go on when it was noticed, which in the main thread is at once."""
        os.kill(os.getpid(), signal.Signals[name])
        self.noticed.wait(PATIENCE_SECONDS)

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.noticed.is_set() and not (self.until and os.path.exists(self.until)):
            assert time.monotonic() < deadline, "what this run was held for did not happen"
            time.sleep(0.002)

    def _watch_signals(self) -> None:
        """Note when a handler runs: signals arrive at once, but are noticed between two steps of the main thread."""
        real = signal.signal

        def watched(number: int, handler: Any) -> Any:
            if not callable(handler) or isinstance(handler, signal.Handlers):
                return real(number, handler)

            def noted(number: int, frame: Any) -> None:
                self.noticed.set()
                handler(number, frame)

            return real(number, noted)

        signal.signal = watched
        watched(signal.SIGINT, signal.default_int_handler)

    def die(self) -> None:
        """End the process as kill -9 or a power cut does."""
        with self._lock:
            if self.disk is not None:
                self.disk.lose(self.random)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

    def install(self) -> None:
        """Put the points in place of the calls."""
        self._watch_signals()
        self._wrap_descriptors()
        for name, kind in (("mkdir", "mkdir"), ("unlink", "unlink"), ("rmdir", "rmdir"), ("replace", "replace")):
            setattr(os, name, self._by_path(kind, getattr(os, name)))
        real_open, real_io_open = os.open, io.open

        def os_open(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if not flags & os.O_CREAT:
                return real_open(path, flags, *rest, **named)
            return self.call("open", os.path.abspath(path), lambda: real_open(path, flags, *rest, **named))

        def io_open(file: Any, mode: str = "r", *rest: Any, **named: Any) -> Any:
            if "w" not in mode or isinstance(file, int):
                return real_io_open(file, mode, *rest, **named)
            path = os.path.abspath(file)
            return WritingFile(self.call("open", path, lambda: real_io_open(file, mode, *rest, **named)), path, self)

        os.open, io.open = os_open, io_open

    def _by_path(self, kind: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(path: Any, *rest: Any, **named: Any) -> Any:
            # of a rename, the new name counts
            target = rest[0] if kind == "replace" else path
            if self.disk is not None and kind == "replace":
                self.disk.renamed_from = os.path.abspath(path)
            return self.call(kind, os.path.abspath(target), lambda: real(path, *rest, **named))

        return wrapped

    def _wrap_descriptors(self) -> None:
        pwrite, write, fsync = os.pwrite, os.write, os.fsync
        fallocate, ftruncate = os.posix_fallocate, os.ftruncate

        def half_of(function: Callable[..., int], descriptor: int, data: Any, *rest: int) -> Callable[[], int]:
            return lambda: function(descriptor, memoryview(data)[: (len(data) + 1) // 2], *rest)

        os.pwrite = lambda d, data, at: self.call(
            "write", _path(d), lambda: pwrite(d, data, at), half_of(pwrite, d, data, at)
        )
        os.write = lambda d, data: self.call("write", _path(d), lambda: write(d, data), half_of(write, d, data))
        os.fsync = lambda d: self.call("fsync", _path(d), lambda: fsync(d))
        os.posix_fallocate = lambda d, *place: self.call("fallocate", _path(d), lambda: fallocate(d, *place))
        os.ftruncate = lambda d, size: self.call("write", _path(d), lambda: ftruncate(d, size))


class WritingFile:
    """A file opened for writing by name whose `write` is a point."""

    def __init__(self, file: Any, path: str, points: Points) -> None:
        self.file, self.path, self.points = file, path, points

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)

    def __enter__(self) -> "WritingFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        def half() -> int:
            self.file.write(data[: len(data) // 2])
            self.file.flush()
            # a buffered file does not write less: it tries again, and meets what comes next
            return self.write(data[len(data) // 2 :]) if self.points.action in ("full", "short") else 0

        return self.points.call("write", self.path, lambda: self.file.write(data), half)


def _path(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())
