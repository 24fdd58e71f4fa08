"""A folder's disk: room, kind, speed, and whether file locks keep two processes apart."""

import fcntl
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import IO

PROBE_BYTES = 64 << 20
_BLOCK_BYTES = 4 << 20
_TIMEOUT_SECONDS = 20
_MOUNTS = Path("/proc/self/mountinfo")
# file systems whose contents are memory, and end with the machine
VOLATILE = frozenset({"tmpfs", "ramfs"})
# what another process says about the lock
_TAKEN, _FREE = 10, 11
_TRY_LOCK = f"""
import fcntl, sys
with open(sys.argv[1]) as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit({_TAKEN})
sys.exit({_FREE})
"""


@dataclass(frozen=True, slots=True)
class Disk:
    """What a folder is on. Rates are bytes a second, None where the folder could not be written to.

    Attributes:
        locks_exclude: another process was refused a lock that this one held; None if it could not be tried.
    """

    folder: Path
    file_system: str
    free_bytes: int
    total_bytes: int
    write_rate: float | None
    read_rate: float | None
    locks_exclude: bool | None
    problem: str = ""


def disk(folder: Path, *, probe_bytes: int = PROBE_BYTES) -> Disk:
    """Return the facts about a folder's disk; writes, reads and removes one temporary file of probe_bytes.

    A folder that does not exist yet stands for the closest parent that does.
    """
    place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    status = os.statvfs(place)
    free, total = status.f_bavail * status.f_frsize, status.f_blocks * status.f_frsize
    kind = file_system(place)
    try:
        with NamedTemporaryFile(dir=place, prefix=".glm4moe-doctor-") as file:
            excludes = locks_exclude(file)
            write_rate, read_rate = _rates(file, min(probe_bytes, free // 4))
    except OSError as error:
        return Disk(place, kind, free, total, None, None, None, f"{place}: {error.strerror}")
    return Disk(place, kind, free, total, write_rate, read_rate, excludes)


def file_system(folder: Path, mounts: Path = _MOUNTS) -> str:
    """Return the type of the file system that a folder is on, `unknown` where the kernel does not say."""
    best, kind = "", "unknown"
    if not mounts.exists():
        return kind
    for line in mounts.read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        # a later mount on the same point hides the earlier one
        if folder.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, right.split()[0]
    return kind


def locks_exclude(file: IO[bytes]) -> bool | None:
    """Return whether another process is refused the lock on this file while it is held here.

    Some network file systems grant it to both, without a word.
    """
    fcntl.flock(file, fcntl.LOCK_EX)
    try:
        ended = subprocess.run(
            [sys.executable, "-c", _TRY_LOCK, file.name], timeout=_TIMEOUT_SECONDS, capture_output=True, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)
    return {_TAKEN: True, _FREE: False}.get(ended.returncode)


def _rates(file: IO[bytes], num_bytes: int) -> tuple[float | None, float | None]:
    """Write and sync, then drop what the page cache holds and read."""
    if num_bytes <= 0:
        return None, None
    # incompressible, so that file systems which compress are not flattered
    block, descriptor = os.urandom(min(_BLOCK_BYTES, num_bytes)), file.fileno()
    begin, written = time.perf_counter(), 0
    while written < num_bytes:
        written += os.pwrite(descriptor, block[: num_bytes - written], written)
    os.fsync(descriptor)
    write_seconds = time.perf_counter() - begin
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    begin, read = time.perf_counter(), 0
    while read < written:
        read += len(os.pread(descriptor, _BLOCK_BYTES, read)) or written
    return written / write_seconds, written / (time.perf_counter() - begin)
