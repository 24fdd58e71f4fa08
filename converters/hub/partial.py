"""A file while it comes in: its bytes, a record of how many of them are safe, and the end of it, good or bad.

    .glm4moe/partial/<name>.<run>.partial   the bytes, the whole size reserved
    .glm4moe/partial/<name>.<run>.offset    digest and offset: so much of the file was written and synced
    .glm4moe/quarantine/<name>.<hash>       bytes that are not the listed ones, kept to be looked at

A resume reads the recorded bytes again and goes on hashing where they end, so what is proved at the end is the file
as it lies on the disk.

No two runs write into one file, even where locks do not work: a run that finds a partial file takes it over by giving
it a name of its own, and a run whose file was taken over, or published, ends at its next piece.
"""

import errno
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from threading import Event
from types import TracebackType

from converters.checkpoint.journal import STATE_FOLDER
from converters.checkpoint.writer import disk_errors, sync_folder
from converters.errors import LockedError, ResourceError, SecurityError
from converters.hub.listing import ListedFile, flat_name
from converters.hub.pool import Cancelled

# half of what a crash may lose: the other half is for what the network had under way
SYNC_BYTES = 32 << 20
HASH_BLOCK_BYTES = 1 << 20
HEAD_BYTES = 512
# with its suffix the longest listed name has the 255 bytes that file systems allow
RUN_DIGITS = 6
PARTIAL_SUFFIX, OFFSET_SUFFIX = ".partial", ".offset"
PARTIAL_FOLDER = "partial"
QUARANTINE_FOLDER = "quarantine"
_RECORD = re.compile(rb"([0-9a-f]{40,64}) (\d{20})\n")
_PARTIAL = re.compile(rf"(.+)\.[0-9a-f]{{{RUN_DIGITS}}}\.(?:partial|offset)")


def partial_paths(dst: Path, file: ListedFile) -> list[Path]:
    """Return the partial files that runs left of a file or are at work on."""
    name = re.compile(rf"{re.escape(flat_name(file.path))}\.[0-9a-f]{{{RUN_DIGITS}}}{PARTIAL_SUFFIX}")
    folder = dst / STATE_FOLDER / PARTIAL_FOLDER
    try:
        return sorted(folder / found for found in os.listdir(folder) if name.fullmatch(found))
    except FileNotFoundError:
        return []


def recorded_offset(dst: Path, file: ListedFile) -> int:
    """Return how many leading bytes of the file are there and synced, in the partial file that has most of it."""
    return max((_recorded(path, file) for path in partial_paths(dst, file)), default=0)


def _recorded(path: Path, file: ListedFile) -> int:
    """Return the recorded bytes of one partial file; 0 if its record is of other content."""
    try:
        match = _RECORD.fullmatch(path.with_suffix(OFFSET_SUFFIX).read_bytes())
        held_bytes = path.stat().st_size
    except FileNotFoundError:
        return 0
    if match is None or match[1].decode() != file.digest:
        return 0
    offset = int(match[2])
    return offset if offset <= min(held_bytes, file.size) else 0


def reserved_bytes(dst: Path, file: ListedFile) -> int:
    """Return the disk space that the partial file already takes."""
    return max((_taken_bytes(path, file) for path in partial_paths(dst, file)), default=0)


def _taken_bytes(path: Path, file: ListedFile) -> int:
    try:
        return min(file.size, path.stat().st_blocks * 512)
    except FileNotFoundError:  # finished meanwhile
        return 0


class PartialFile:
    """The partial file of one listed file, held open. Leaving the `with` block records what is there.

    `offset` bytes are written and hashed; a crash keeps all but the last SYNC_BYTES of them.
    """

    def __init__(self, dst: Path, file: ListedFile, stop: Event) -> None:
        self.dst = dst
        self.file = file
        self.path = dst / STATE_FOLDER / PARTIAL_FOLDER / f"{flat_name(file.path)}.{_run_name()}{PARTIAL_SUFFIX}"
        self.offset = 0
        self._stop = stop
        self._synced = 0
        self._reserved = False
        self._hash = file.new_hash()
        self._descriptor = -1

    def __enter__(self) -> "PartialFile":
        """Take over what an earlier run left, or begin; hash the recorded bytes.

        Raises:
            Cancelled: the run stops meanwhile.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._take_over()
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        recorded = _recorded(self.path, self.file)
        while self.offset < recorded:
            if self._stop.is_set():
                os.close(self._descriptor)
                raise Cancelled
            block = os.pread(self._descriptor, min(HASH_BLOCK_BYTES, recorded - self.offset), self.offset)
            if not block:  # cut off meanwhile; what is hashed is what counts
                break
            self._hash.update(block)
            self.offset += len(block)
        self._synced = self.offset
        return self

    def __exit__(self, _: type[BaseException] | None, error: BaseException | None, __: TracebackType | None) -> None:
        try:
            if self.offset > self._synced and not isinstance(error, ResourceError | LockedError):
                self.checkpoint()
        finally:
            os.close(self._descriptor)

    def _take_over(self) -> None:
        """Give the partial file that has most of the bytes our name; of several runs that try, one succeeds."""
        for path in sorted(partial_paths(self.dst, self.file), key=lambda path: -_recorded(path, self.file)):
            try:
                os.rename(path, self.path)
            except FileNotFoundError:  # another run was faster
                continue
            with suppress(FileNotFoundError):
                os.rename(path.with_suffix(OFFSET_SUFFIX), self.path.with_suffix(OFFSET_SUFFIX))
            return

    def _check_own(self) -> None:
        """Refuse to go on with a file that another run took over, which only happens where locks do not work.

        Raises:
            FileNotFoundError: it did; `disk_errors` says what that means.
        """
        if not self.path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self.path))

    def reserve(self) -> None:
        """Take the disk space of the whole file.

        Raises:
            ResourceError: there is not enough of it.
        """
        if not self._reserved and self.file.size:
            with disk_errors(self.path):
                os.posix_fallocate(self._descriptor, 0, self.file.size)
        self._reserved = True

    def append(self, data: bytes) -> None:
        """Write and hash the next bytes; every SYNC_BYTES make them safe.

        Raises:
            LockedError: another run took the file over. ResourceError: the disk is full.
        """
        assert self.offset + len(data) <= self.file.size, (self.file, self.offset, len(data))
        self._hash.update(data)
        with disk_errors(self.path):
            self._check_own()
            view = memoryview(data)
            while len(view):
                count = os.pwrite(self._descriptor, view, self.offset)
                view, self.offset = view[count:], self.offset + count
        if self.offset - self._synced >= SYNC_BYTES:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Sync what is written, then record that it is: never the other way round."""
        with disk_errors(self.path):
            self._check_own()
            os.fsync(self._descriptor)
            self._write_record(self.offset)
        self._synced = self.offset

    def restart(self) -> int:
        """Forget all bytes and return how many they were."""
        lost = self.offset
        with disk_errors(self.path):
            self._check_own()
            self._write_record(0)
        self.offset = self._synced = 0
        self._hash = self.file.new_hash()
        return lost

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are there, right or wrong."""
        return self.offset == self.file.size

    @property
    def digest(self) -> str:
        """The digest of the bytes so far."""
        return self._hash.hexdigest()

    def read_head(self) -> bytes:
        """Return the first bytes, to tell what kind of file they are."""
        return os.pread(self._descriptor, min(HEAD_BYTES, self.offset), 0)

    def seal(self) -> None:
        """Make the complete file durable under its partial name."""
        with disk_errors(self.path):
            os.ftruncate(self._descriptor, self.file.size)
        self.checkpoint()

    def quarantine(self) -> Path:
        """Move the wrong bytes aside and return where they are."""
        target = quarantine_path(self.dst, self.file, self.digest)
        with disk_errors(self.path):
            os.replace(self.path, target)
            os.ftruncate(self._descriptor, self.offset)
            self.path.with_suffix(OFFSET_SUFFIX).unlink(missing_ok=True)
        self._synced = self.offset
        return target

    def _write_record(self, offset: int) -> None:
        """Overwrite the record; it always has the same length, far below a sector."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.path.with_suffix(OFFSET_SUFFIX), flags, 0o666)
        try:
            os.pwrite(descriptor, f"{self.file.digest} {offset:020}\n".encode(), 0)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def quarantine_path(dst: Path, file: ListedFile, digest: str) -> Path:
    """Return where bytes of this digest that are not the file's are kept; the folder is created."""
    folder = dst / STATE_FOLDER / QUARANTINE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{flat_name(file.path)}.{digest[:8]}"


def final_path(dst: Path, file: ListedFile) -> Path:
    """Return where a file belongs.

    Raises:
        SecurityError: a link on the way leads out of the folder.
    """
    path = dst / file.path
    if not path.parent.resolve().is_relative_to(dst.resolve()):
        raise SecurityError(str(path.parent), expected=f"a folder inside {dst}", found=f"{path.parent.resolve()}")
    return path


def publish(dst: Path, file: ListedFile, partial: Path) -> None:
    """Give a sealed partial file its final name, durably.

    Raises:
        LockedError: another run took it over.
    """
    path = final_path(dst, file)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, path)
        for folder in (path.parent, *path.parent.parents):
            sync_folder(folder)
            if folder == dst:
                break
    partial.with_suffix(OFFSET_SUFFIX).unlink(missing_ok=True)


def put_aside(dst: Path, file: ListedFile, tag: str) -> None:
    """Move a file with a final name whose bytes are wrong into quarantine.

    Raises:
        LockedError: another run did so meanwhile.
    """
    path = final_path(dst, file)
    with disk_errors(path):
        path.replace(quarantine_path(dst, file, tag))


def remove_leftovers(dst: Path, files: Iterable[ListedFile]) -> None:
    """Remove what killed runs left beside these files, all of which have their final names."""
    folder = dst / STATE_FOLDER / PARTIAL_FOLDER
    names = {flat_name(file.path) for file in files}
    for entry in os.listdir(folder) if folder.exists() else ():
        match = _PARTIAL.fullmatch(entry)
        if match is not None and match[1] in names:
            (folder / entry).unlink(missing_ok=True)
    # it stays where other files are on their way
    with suppress(OSError):
        folder.rmdir()


def _run_name() -> str:
    return os.urandom(RUN_DIGITS // 2).hex()
