"""A file while it comes in: its bytes, a record of how many of them are safe, and the end of it, good or bad.

    .glm4moe/partial/<name>.partial     the bytes, the whole size reserved
    .glm4moe/partial/<name>.offset      digest and offset: so much of the file was written and synced
    .glm4moe/quarantine/<name>.<hash>   bytes that are not the listed ones, kept to be looked at

A resume reads the recorded bytes again and goes on hashing where they end, so what is proved at the end is the file
as it lies on the disk.
"""

import os
import re
from collections.abc import Iterable
from pathlib import Path
from threading import Event
from types import TracebackType

from converters.checkpoint.journal import STATE_FOLDER
from converters.checkpoint.writer import disk_errors, sync_folder
from converters.errors import ResourceError, SecurityError
from converters.hub.listing import ListedFile, flat_name
from converters.hub.pool import Cancelled

# half of what a crash may lose: the other half is for what the network had under way
SYNC_BYTES = 32 << 20
HASH_BLOCK_BYTES = 1 << 20
HEAD_BYTES = 512
PARTIAL_FOLDER = "partial"
QUARANTINE_FOLDER = "quarantine"
_RECORD = re.compile(rb"([0-9a-f]{40,64}) (\d{20})\n")


def partial_path(dst: Path, file: ListedFile) -> Path:
    """Return where the bytes of a file are gathered."""
    return dst / STATE_FOLDER / PARTIAL_FOLDER / f"{flat_name(file.path)}.partial"


def recorded_offset(dst: Path, file: ListedFile) -> int:
    """Return how many leading bytes of the file are there and synced; 0 if its record is of other content."""
    path = partial_path(dst, file)
    try:
        match = _RECORD.fullmatch(path.with_suffix(".offset").read_bytes())
        held_bytes = path.stat().st_size
    except FileNotFoundError:
        return 0
    if match is None or match[1].decode() != file.digest:
        return 0
    offset = int(match[2])
    return offset if offset <= min(held_bytes, file.size) else 0


def reserved_bytes(dst: Path, file: ListedFile) -> int:
    """Return the disk space that the partial file already takes."""
    try:
        return min(file.size, partial_path(dst, file).stat().st_blocks * 512)
    except FileNotFoundError:
        return 0


class PartialFile:
    """The partial file of one listed file, held open. Leaving the `with` block records what is there.

    `offset` bytes are written and hashed; a crash keeps all but the last SYNC_BYTES of them.
    """

    def __init__(self, dst: Path, file: ListedFile, stop: Event) -> None:
        self.dst = dst
        self.file = file
        self.path = partial_path(dst, file)
        self.offset = 0
        self._stop = stop
        self._synced = 0
        self._reserved = False
        self._hash = file.new_hash()
        self._descriptor = -1

    def __enter__(self) -> "PartialFile":
        """Open the file and hash the recorded bytes.

        Raises:
            Cancelled: the run stops meanwhile.
        """
        with disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        recorded = recorded_offset(self.dst, self.file)
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
            if self.offset > self._synced and not isinstance(error, ResourceError):
                self.checkpoint()
        finally:
            os.close(self._descriptor)

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
        """Write and hash the next bytes; every SYNC_BYTES make them safe."""
        assert self.offset + len(data) <= self.file.size, (self.file, self.offset, len(data))
        self._hash.update(data)
        with disk_errors(self.path):
            view = memoryview(data)
            while len(view):
                count = os.pwrite(self._descriptor, view, self.offset)
                view, self.offset = view[count:], self.offset + count
        if self.offset - self._synced >= SYNC_BYTES:
            self.checkpoint()

    def checkpoint(self) -> None:
        """Sync what is written, then record that it is: never the other way round."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)
            self._write_record(self.offset)
        self._synced = self.offset

    def restart(self) -> int:
        """Forget all bytes and return how many they were."""
        lost = self.offset
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
        os.ftruncate(self._descriptor, self.offset)
        os.replace(self.path, target)
        self._synced = self.offset
        self.path.with_suffix(".offset").unlink(missing_ok=True)
        return target

    def _write_record(self, offset: int) -> None:
        """Overwrite the record; it always has the same length, far below a sector."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        descriptor = os.open(self.path.with_suffix(".offset"), flags, 0o666)
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


def publish(dst: Path, file: ListedFile) -> None:
    """Give a sealed partial file its final name, durably."""
    path, partial = final_path(dst, file), partial_path(dst, file)
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, path)
        for folder in (path.parent, *path.parent.parents):
            sync_folder(folder)
            if folder == dst:
                break
    partial.with_suffix(".offset").unlink(missing_ok=True)


def remove_leftovers(dst: Path, files: Iterable[ListedFile]) -> None:
    """Remove what killed runs left beside these files, all of which have their final names."""
    for file in files:
        for path in (partial_path(dst, file), partial_path(dst, file).with_suffix(".offset")):
            path.unlink(missing_ok=True)
    folder = dst / STATE_FOLDER / PARTIAL_FOLDER
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()
