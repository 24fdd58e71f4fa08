"""A disk that forgets what was not synced: data without fsync of the file, names without fsync of their folder."""

import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Disk:
    """Follows the calls that change files below a folder, so that the unsynced ones can be undone.

    Data is kept up to the size at its last fsync; this holds for files that only grow after it, as all of ours do.
    Names are undone in each folder from the latest on, the way a journalling file system loses them.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.stash = Path(tempfile.mkdtemp(prefix="stash", dir=self.folder.parent))
        self.synced_bytes: dict[int, int] = {}
        self.renamed_from = ""
        self._changes: dict[str, list[tuple[int, Callable[[], None]]]] = {}
        self._number = 0

    def note(self, kind: str, path: str, act: Callable[[], Any]) -> Any:
        """Carry out a call and remember how to undo it, or what it made durable."""
        if kind == "fsync":
            result = act()
            if os.path.isdir(path):
                self._changes.pop(path, None)
            else:
                status = os.stat(path)
                self.synced_bytes[status.st_ino] = status.st_size
            return result
        undo = self._undo(kind, path)
        held = os.path.getsize(path) if kind == "open" and os.path.exists(path) else 0
        result = act()
        if kind == "open":
            status = os.stat(path)
            self.synced_bytes.setdefault(status.st_ino, min(held, status.st_size))
        if undo is not None:
            self._number += 1
            self._changes.setdefault(os.path.dirname(path), []).append((self._number, undo))
        return result

    def _undo(self, kind: str, path: str) -> Callable[[], None] | None:
        if kind == "open":
            return None if os.path.exists(path) else lambda: _try(os.unlink, path)
        if kind == "mkdir":
            return lambda: shutil.rmtree(path, ignore_errors=True)
        if kind == "rmdir":
            return lambda: _try(os.mkdir, path)
        if kind in ("unlink", "replace") and (kind == "replace" or os.path.exists(path)):
            source, kept = self.renamed_from, self._keep(path)

            def undo() -> None:
                if kind == "replace":
                    _try(os.rename, path, source)
                if kept:
                    _try(os.link, kept, path)

            return undo
        return None

    def _keep(self, path: str) -> str | None:
        """Give the file another name, so that it can come back."""
        if not os.path.exists(path):
            return None
        kept = str(self.stash / str(len(os.listdir(self.stash))))
        os.link(path, kept)
        return kept

    def lose(self, chosen: random.Random | None) -> None:
        """Drop what is not synced: all of it, or in each folder the names from a random moment on."""
        lost = []
        for changes in self._changes.values():
            kept = chosen.randint(0, len(changes)) if chosen else 0
            lost += changes[kept:]
        for _, undo in sorted(lost, key=lambda change: -change[0]):
            undo()
        for path in self.folder.rglob("*"):
            if path.is_file():
                self._lose_data(path, chosen)
        shutil.rmtree(self.stash, ignore_errors=True)

    def _lose_data(self, path: Path, chosen: random.Random | None) -> None:
        status = path.stat()
        synced = self.synced_bytes.get(status.st_ino, status.st_size)
        if synced < status.st_size:
            os.truncate(path, synced)
            # the size may have reached the disk before the data
            if chosen and chosen.random() < 0.5:
                os.truncate(path, status.st_size)


def _try(function: Callable[..., None], *args: str) -> None:
    """Undo a change if what it was made in is still there."""
    try:
        function(*args)
    except OSError:
        return
