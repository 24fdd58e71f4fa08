"""Reading bytes: a failing disk or a file that is cut off is an error with file and offset, a link out is refused."""

import errno
import os
import resource
from pathlib import Path

from converters.errors import InputError, ResourceError, SecurityError

_TOO_MANY_FILES = frozenset({errno.EMFILE, errno.ENFILE})


def read_exactly(descriptor: int, buffer: memoryview, position: int, path: Path) -> None:
    """Fill a buffer from a byte offset of an open file; a read that fails is tried once more.

    Raises:
        InputError: the file ends before the buffer is full, or cannot be read.
    """
    filled, failures = 0, 0
    while filled < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[filled:]], position + filled)
        except OSError as error:
            failures += 1
            if failures == 1:
                continue
            raise _unreadable(f"{path} at byte {position + filled}", error) from error
        if count == 0:
            raise InputError(
                str(path),
                expected=f"data at byte {position + filled}",
                found="the end of the file",
                next_step="It was cut off while being read.",
            )
        filled += count


def read_file(path: Path) -> bytes:
    """Return the bytes of a small file; see `read_exactly` for what is raised."""
    descriptor = open_file(path)
    try:
        data = bytearray(os.fstat(descriptor).st_size)
        read_exactly(descriptor, memoryview(data), 0, path)
    finally:
        os.close(descriptor)
    return bytes(data)


def check_link(path: Path) -> None:
    """Refuse a link out of the checkpoint folder.

    A symlink is followed only as the hub cache lays it out: from snapshots/<commit>/ to the same repository's blobs/.

    Raises:
        SecurityError: it points elsewhere.
    """
    if not path.is_symlink():
        return
    target, home = path.resolve(), path.parent.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if not (target.is_relative_to(home) or target.is_relative_to(blobs)):
        raise SecurityError(str(path), expected="a file inside the checkpoint folder", found=f"a link to {target}")


def open_file(path: Path) -> int:
    """Return a descriptor for reading.

    Raises:
        InputError: there is no such file, or it may not be read. ResourceError: too many files are open.
    """
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in _TOO_MANY_FILES:
            raise ResourceError(
                str(path),
                expected=f"a free one of the {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} files that may be open",
                found="none",
                next_step="Raise the limit with 'ulimit -n', then run the same command.",
            ) from error
        raise _unreadable(str(path), error) from error


def _unreadable(subject: str, error: OSError) -> InputError:
    return InputError(
        subject,
        expected="readable data",
        found=str(error.strerror),
        next_step="Check the disk, then run the same command.",
    )
