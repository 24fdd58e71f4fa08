"""A reader of a checkpoint whose weights come and go: headers lie in one folder, weights, as far as there, in another.

Before the weights come, a plan may ask for a few values, such as scales that would have to be shared: these are fetched
by range and kept, and the whole file, once it is proved by its digest, is held against them and against its header.
"""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from converters.checkpoint.index import CheckpointIndex
from converters.checkpoint.reader import CheckpointReader, Span
from converters.errors import InputError
from converters.remote import REQUESTS_AT_ONCE
from converters.workers import start_pool

Peek = Callable[[str, int, int], bytes]

# bytes between two spans that cost less than one more request; kept, as all that is peeked, to hold the file against
_GAP_BYTES = 32 << 10


class Request(NamedTuple):
    """Bytes [begin, end) of a file."""

    file: str
    begin: int
    end: int


def together(wanted: Sequence[Request]) -> tuple[list[Request], list[list[int]]]:
    """Return fewer requests that cover all that is wanted, and of each the numbers of those it covers."""
    requests: list[Request] = []
    members: list[list[int]] = []
    for number in sorted(range(len(wanted)), key=wanted.__getitem__):
        file, begin, end = wanted[number]
        last = requests[-1] if requests else None
        if last is not None and last.file == file and begin - last.end <= _GAP_BYTES:
            requests[-1] = Request(file, last.begin, max(last.end, end))
            members[-1].append(number)
        else:
            requests.append(wanted[number])
            members.append([number])
    return requests, members


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
        buffer[:] = self._fetch(self._request(Span(name, offset, offset + len(buffer))))

    def read_spans(self, spans: Sequence[Span]) -> list[bytearray]:
        """Return the bytes of each span; from the hub near ones come together, and several requests are under way."""
        if self._peek is None or not spans:
            return super().read_spans(spans)
        requests, members = together([self._request(span) for span in spans])
        found = [bytearray() for _ in spans]
        with start_pool(min(REQUESTS_AT_ONCE, len(requests)), "peek") as pool:
            for request, within, data in zip(requests, members, pool.map(self._fetch, requests), strict=True):
                for number in within:
                    begin = self._request(spans[number]).begin - request.begin
                    found[number] += data[begin : begin + spans[number].end - spans[number].begin]
        return found

    def _request(self, span: Span) -> Request:
        """Return where in a file a span is."""
        file, entry = self.index.entries[span.name]
        return Request(file, entry.begin + span.begin, entry.begin + span.end)

    def _fetch(self, request: Request) -> bytes:
        """Ask the hub, and keep what it sent to hold the whole file against."""
        assert self._peek is not None, request
        data = self._peek(*request)
        with self._peek_lock:
            self._peeked.setdefault(request.file, []).append((request.begin, data))
        return data

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
