"""Locks on an unfinished folder, and on the parts of a split run, in `DST/.glm4moe/`."""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from converters.checkpoint.journal import state_folder
from converters.checkpoint.writer import disk_errors, sync_folder
from converters.errors import LockedError

LOCK_FILE = "lock"
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class FolderLock:
    """DST held against other runs. The kernel drops the lock when its holder dies.

    A part of a split run holds the folder together with the other parts, and its own number alone. Correctness does not
    depend on locks: files are published by rename, and finished parts are proved by content.
    """

    def __init__(self, dst: Path, part_suffix: str) -> None:
        self.dst = dst
        self.state = state_folder(dst)
        self._descriptors: list[int] = []
        with disk_errors(dst):
            _make_durably(self.state)
            self._folder = self._open(LOCK_FILE)
            if part_suffix:
                self._take(self._folder, fcntl.LOCK_SH)
                self._take(self._open(LOCK_FILE + part_suffix), fcntl.LOCK_EX)
            else:
                self._take(self._folder, fcntl.LOCK_EX)

    def become_exclusive(self) -> bool:
        """Try to hold the folder alone; False if another part is still at work."""
        try:
            _flock(self._folder, fcntl.LOCK_EX)
        except BlockingIOError:
            return False
        return True

    def release(self) -> None:
        """Let go of the folder, not of the part."""
        _flock(self._folder, fcntl.LOCK_UN)

    def close(self) -> None:
        """Let go."""
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _open(self, name: str) -> int:
        descriptor = os.open(self.state / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._descriptors.append(descriptor)
        return descriptor

    def _take(self, descriptor: int, kind: int) -> None:
        try:
            _flock(descriptor, kind)
        except BlockingIOError as error:
            refusal = _held(self.dst, descriptor)
            self.close()
            raise refusal from error
        if kind == fcntl.LOCK_EX:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)


def _flock(descriptor: int, kind: int) -> None:
    """Take a lock without waiting; where the file system has none, go on without."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise


def _held(dst: Path, descriptor: int) -> LockedError:
    holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
    return LockedError(
        f"DST {dst}",
        expected="no other run in it",
        found=holder or "one",
        next_step="Wait for it, or stop it and run the same command again.",
    )


def check_unlocked(dst: Path, part_suffix: str = "") -> None:
    """Refuse a folder, or a part of it, that another run holds; nothing is created.

    Raises:
        LockedError: with the holder.
    """
    wanted = {LOCK_FILE: fcntl.LOCK_SH if part_suffix else fcntl.LOCK_EX}
    if part_suffix:
        wanted[LOCK_FILE + part_suffix] = fcntl.LOCK_EX
    for name, kind in wanted.items():
        try:
            descriptor = os.open(state_folder(dst) / name, os.O_RDONLY | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            continue
        try:
            _flock(descriptor, kind)
        except BlockingIOError as error:
            raise _held(dst, descriptor) from error
        finally:
            os.close(descriptor)


def _make_durably(folder: Path) -> None:
    """Make a folder and its parents, so that none of them can be lost with what is later synced in it."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    # the two innermost ones are ours; an earlier run may have been killed before it synced them
    for path in {folder.parent, folder.parent.parent, *(path.parent for path in new)}:
        if os.access(path, os.R_OK):
            sync_folder(path)


@contextmanager
def locked(dst: Path, part_suffix: str = "") -> Iterator[FolderLock]:
    """Hold DST, or one part of it; its state folder is created if need be.

    Raises:
        LockedError: another process holds it.
    """
    lock = FolderLock(dst, part_suffix)
    try:
        yield lock
    finally:
        lock.close()
