"""Writing: a file bears its final name only when it is complete and synced.

Each file is written as `.<name>.<random>.partial` in its folder, synced, renamed, and the folder synced. The random
part keeps two runs apart where the file system has no locks. File modes follow the umask. Index and config are written
last, so that a folder whose run was killed has no index and no config.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from converters.checkpoint.plan import OutputPlan, Shard
from converters.checkpoint.write_behind import WriteBehind
from converters.errors import LockedError, ResourceError

_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV})
PARTIAL_SUFFIX = ".partial"
_PARTIAL = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(PARTIAL_SUFFIX)}")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def partial_path(path: Path) -> Path:
    """Return a name under which a file is written before it is complete, another one at each call."""
    return path.with_name(f".{path.name}.{os.urandom(4).hex()}{PARTIAL_SUFFIX}")


def remove_partials(folder: Path, names: Collection[str]) -> None:
    """Remove what killed runs left of these files before they were complete."""
    for entry in os.listdir(folder):
        match = _PARTIAL.fullmatch(entry)
        if match is not None and match[1] in names:
            (folder / entry).unlink(missing_ok=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn 'no space left' and its kin into a ResourceError that names the file.

    A file or folder of ours that is suddenly gone means another run, where locks do not work: a LockedError.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise LockedError(
            str(path),
            expected="a folder that nobody else changes",
            found=f"{error.filename} gone",
            next_step="Make sure that no other run writes there, then run the same command.",
        ) from error
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise ResourceError(
                str(path),
                expected="room to write",
                found=str(error.strerror),
                next_step="Free space or choose another folder, then run the same command.",
            ) from error
        if error.errno == errno.EIO:
            raise ResourceError(
                str(path),
                expected="a disk that takes what is written",
                found=str(error.strerror),
                next_step="Check the disk or choose another folder, then run the same command.",
            ) from error
        raise


def check_space(folder: Path, wanted: int) -> None:
    """Refuse before the first byte what the disk cannot hold; it may still fill up while we write."""
    disk = shutil.disk_usage(folder)
    if disk.total and wanted > disk.free:
        raise ResourceError(
            f"DST {folder}",
            expected=f"{wanted} bytes of free space",
            found=f"{disk.free}",
            next_step="Free space or choose another folder, then run the same command.",
        )


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_durably(source: Path, path: Path) -> bool:
    """Give a file a second name; False where the file system has no hard links."""
    own = partial_path(path)
    own.unlink(missing_ok=True)
    try:
        os.link(source, own)
    except OSError as error:
        if error.errno in _NO_LINKS:
            return False
        raise
    publish(own, path)
    return True


def publish(partial: Path, path: Path) -> None:
    """Give a synced partial file its final name."""
    os.replace(partial, path)
    sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a small file atomically and durably."""
    partial = partial_path(path)
    with disk_errors(path):
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            publish(partial, path)
        except OSError:
            with suppress(OSError):
                partial.unlink()
            raise


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object with two spaces of indentation, keys in the order given."""
    write_file(path, json.dumps(value, indent=2, ensure_ascii=False).encode() + b"\n")


class ShardWriter:
    """One safetensors file being filled at known offsets, by several threads if need be.

    `open`, any number of `write`, then `finish`, which gives it its final name; `abort` at any time leaves nothing.
    """

    def __init__(self, folder: Path, shard: Shard) -> None:
        self.path = folder / shard.file
        self._partial = partial_path(self.path)
        self.shard = shard
        self._places = {entry.name: entry for entry in shard.entries}
        self._descriptor = -1
        self._behind = WriteBehind(-1)

    def open(self) -> None:
        """Create the partial file and write its header.

        Raises:
            ResourceError: the disk has no room for it. Space is reserved, not looked at: a full disk shows here.
        """
        with disk_errors(self.path):
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
            self._descriptor = os.open(self._partial, flags, 0o666)
            self._behind = WriteBehind(self._descriptor)
            os.posix_fallocate(self._descriptor, 0, self.shard.file_bytes)
            self._write_at(0, memoryview(self.shard.header))

    def finish(self) -> None:
        """Sync the file and give it its final name."""
        with disk_errors(self.path):
            os.fsync(self._descriptor)
            self._close()
            publish(self._partial, self.path)

    def abort(self) -> None:
        """Remove the partial file, if there still is one; what made the run fail is told, not what this meets."""
        with suppress(OSError):
            if self._descriptor >= 0:
                self._close()
            self._partial.unlink(missing_ok=True)

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def write(self, name: str, offset: int, data: memoryview) -> None:
        """Write bytes at `offset` into the data of a tensor."""
        place = self._places[name]
        assert offset + len(data) <= place.nbytes, (name, offset, len(data), place.nbytes)
        with disk_errors(self.path):
            self._write_at(place.begin + offset, data)
            self._behind.wrote(place.begin + offset, place.begin + offset + len(data))

    def _write_at(self, position: int, data: memoryview) -> None:
        while len(data):
            count = os.pwrite(self._descriptor, data, position)
            data, position = data[count:], position + count


def write_index(folder: Path, plan: OutputPlan, file: str) -> None:
    """Write the index: total_size in bytes of tensor data, and the file of every tensor."""
    write_json(folder / file, {"metadata": {"total_size": plan.total_bytes}, "weight_map": plan.weight_map})
