"""A reader of a checkpoint whose weights come and go: headers lie in one folder, weights, as far as there, in another.

Before the weights come, a plan may ask for a few values, such as scales that would have to be shared: these are fetched
by range and kept, and the whole file, once it is proved by its digest, is held against them and against its header.
"""

import threading
from collections.abc import Callable
from pathlib import Path

from converters.checkpoint.index import CheckpointIndex
from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError

Peek = Callable[[str, int, int], bytes]


class StagedReader(CheckpointReader):
    """Reads weights where they are staged.

    Args:
        index: of the folder of headers.
        weights: where the files are while they are there.
        peek: fetches bytes [begin, end) of a file that is not.
    """

    def __init__(self, index: CheckpointIndex, weights: Path, peek: Peek) -> None:
        super().__init__(index)
        self._weights = weights
        self._peek: Peek | None = peek
        self._peeked: dict[str, list[tuple[int, bytes]]] = {}
        self._begins: dict[str, int] = {}
        for file, entry in index.entries.values():
            self._begins[file] = min(entry.begin, self._begins.get(file, entry.begin))
        self._peek_lock = threading.Lock()

    def read_into(self, name: str, offset: int, buffer: memoryview) -> None:
        """Fill a buffer as any reader does, or, while the plan is made, from the hub."""
        if self._peek is None:
            super().read_into(name, offset, buffer)
            return
        file, entry = self.index.entries[name]
        begin = entry.begin + offset
        data = self._peek(file, begin, begin + len(buffer))
        with self._peek_lock:
            self._peeked.setdefault(file, []).append((begin, data))
        buffer[:] = data

    def end_peeking(self) -> None:
        """Read staged files only from now on."""
        self._peek = None

    def path(self, file: str) -> Path:
        """Return where a file's weights are."""
        return self._weights / file

    def header_bytes(self, file: str) -> int:
        """Return the size of a file's header, its length prefix included."""
        return self._begins.get(file, 0)

    def admit(self, file: str) -> None:
        """Hold a staged file, proved by its digest, against what was read of it before.

        Raises:
            InputError: header or peeked values were others; the plan was made for another file.
        """
        with (self.index.folder / file).open("rb") as stand_in:
            header = stand_in.read(self.header_bytes(file))
        with self.path(file).open("rb") as staged:
            for begin, data in ((0, header), *self._peeked.get(file, ())):
                staged.seek(begin)
                if staged.read(len(data)) != data:
                    raise InputError(
                        f"{file} at byte {begin}",
                        expected="the bytes that the hub sent when the plan was made",
                        found="others in the file that has the listed digest",
                        next_step="Run the same command again; with --restart if that does not help.",
                    )
