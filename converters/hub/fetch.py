"""One file from the hub into its partial file, whatever the network does meanwhile.

Every answer is held against the listing before a byte of it is kept, and the digest of the listing decides at the end.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from threading import Event
from typing import NoReturn, Protocol

from converters.checkpoint.writer import disk_errors
from converters.errors import InputError, NetworkError
from converters.hub.listing import ListedFile, Listing
from converters.hub.partial import PartialFile, quarantine_path
from converters.hub.pool import Cancelled

# of a body that cannot be the file, so much is kept to be looked at
KEPT_BYTES = 64 << 10
_POINTER = b"version https://git-lfs"
_HTML = (b"<!doctype html", b"<html")


class Transient(Exception):
    """Something that may be over at the next try.

    Args:
        reason: what happened, without a verb.
        retry_after: seconds that the server asks to wait.
        start_over: the bytes so far and those to come do not belong together.
    """

    def __init__(self, reason: str, *, retry_after: float = 0.0, start_over: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.retry_after = retry_after
        self.start_over = start_over


@dataclass(frozen=True, slots=True)
class Answer:
    """What the server says about the body it is about to send.

    Args:
        begin: the place of its first byte in the file, 0 if the server sends the whole file.
        total: size of the whole file, None if the server does not say.
        encoding: Content-Encoding, "identity" if none.
        etag: what stands for this version of the file, None if the server does not say.
        commit: the commit it is from, None if the server does not say.
        chunks: the body, as it comes.
    """

    begin: int
    total: int | None
    encoding: str
    etag: str | None
    commit: str | None
    chunks: Iterator[bytes]


class HubClient(Protocol):
    """The hub, as far as a download needs it."""

    @property
    def endpoint(self) -> str:
        """Its address, without a slash at the end."""

    @property
    def is_offline(self) -> bool:
        """Whether the user asked not to reach it."""

    @property
    def max_file_bytes(self) -> int:
        """The largest file that it serves over plain HTTP."""

    def list_files(self, repo: str, revision: str) -> Listing:
        """Return the listing of the commit that a revision is at."""

    def open(self, listing: Listing, file: ListedFile, offset: int) -> AbstractContextManager[Answer]:
        """Ask for a file from `offset` on; Transient or NetworkError, also while the body is read."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """When to try again, and when to give up.

    Args:
        tries: failures in a row, with less than progress_bytes between them.
        restarts: how often a file may begin anew because the server changed its mind.
        first_delay: seconds; doubled from failure to failure up to max_delay.
        max_retry_after: seconds; a server that asks for more is asked again sooner.
        stall_seconds: a connection that brings fewer than stall_bytes in this time is dropped.
    """

    tries: int = 6
    restarts: int = 3
    progress_bytes: int = 1 << 20
    first_delay: float = 1.0
    max_delay: float = 60.0
    max_retry_after: float = 300.0
    stall_seconds: float = 30.0
    stall_bytes: int = 32 << 10

    def delay(self, failures: int, retry_after: float) -> float:
        """Return the seconds to wait after so many failures in a row."""
        backoff = min(self.max_delay, self.first_delay * 2.0 ** (failures - 1))
        return max(backoff, min(retry_after, self.max_retry_after))


@dataclass(slots=True)
class _Course:
    """How the fetching of one file went so far."""

    failures: int = 0
    restarts: int = 0
    mismatches: int = 0
    from_one_answer: bool = False
    etag: str | None = None


@dataclass(frozen=True, slots=True)
class Fetcher:
    """Fetches files of one listing into one folder.

    Args:
        on_bytes: called with the bytes that came in, negative where bytes turned out to be useless.
    """

    client: HubClient
    listing: Listing
    dst: Path
    policy: RetryPolicy
    on_bytes: Callable[[int], None]

    def fetch(self, file: ListedFile, stop: Event) -> Path:
        """Bring a file into a partial file, complete, proved and synced, and return where that is.

        Raises:
            InputError: the server has other bytes than it listed; they are in quarantine.
            NetworkError: it refuses, or fails too often. ResourceError: the disk is full.
            LockedError: another run took the partial file over.
            Cancelled: stop was set. What is there stays for the next run in either case.
        """
        course = _Course()
        with PartialFile(self.dst, file, stop) as partial:
            while True:
                self._complete(partial, course, stop)
                if partial.digest == file.digest:
                    partial.seal()
                    return partial.path
                course.mismatches += 1
                if course.from_one_answer or course.mismatches > 1:
                    self._refuse_digest(partial)
                # put together from pieces, maybe of two runs: only a file from one answer proves the server wrong
                self._start_over(partial, course, "pieces that do not make the listed file")

    def _complete(self, partial: PartialFile, course: _Course, stop: Event) -> None:
        """Ask until all bytes are there."""
        while not partial.is_complete:
            before = partial.offset
            try:
                with self.client.open(self.listing, partial.file, partial.offset) as answer:
                    self._receive(partial, answer, course, stop)
            except Transient as error:
                if partial.offset - before >= self.policy.progress_bytes:
                    course.failures = 0
                course.failures += 1
                if error.start_over:
                    self._start_over(partial, course, error.reason)
                if course.failures >= self.policy.tries:
                    self._give_up(partial, f"{error.reason}, {course.failures} times in a row", error)
                if stop.wait(self.policy.delay(course.failures, error.retry_after)):
                    raise Cancelled from error

    def _receive(self, partial: PartialFile, answer: Answer, course: _Course, stop: Event) -> None:
        """Append the body of one answer."""
        size = partial.file.size
        self._check(partial, answer, course)
        if partial.offset and not answer.begin:
            self._start_over(partial, course, "a server that does not serve ranges")
        course.from_one_answer = not partial.offset
        partial.reserve()
        pace = _Pace(self.policy)
        for chunk in answer.chunks:
            if stop.is_set():
                raise Cancelled
            if partial.offset + len(chunk) > size:
                self.on_bytes(-partial.offset)
                partial.append(chunk[: size - partial.offset])
                self._refuse(partial.file, f"more than {size} bytes", partial.quarantine())
            partial.append(chunk)
            self.on_bytes(len(chunk))
            pace.count(len(chunk))
        if not partial.is_complete:
            raise Transient("the end of the body too early")

    def _check(self, partial: PartialFile, answer: Answer, course: _Course) -> None:
        """Refuse an answer that cannot be the listed file, before it costs the bytes that are there."""
        size, is_whole = partial.file.size, answer.begin == 0
        if answer.encoding != "identity":
            self._refuse_body(partial.file, answer, f"{answer.encoding} data, although none was asked for")
        if is_whole and answer.total not in (None, size):
            self._refuse_body(partial.file, answer, f"{answer.total} bytes")
        if answer.commit not in (None, self.listing.commit):
            raise Transient(f"an answer from commit {answer.commit}", start_over=True)
        if not is_whole and (answer.begin, answer.total or size) != (partial.offset, size):
            found = f"bytes from {answer.begin} of {answer.total}"
            raise Transient(f"{found} instead of {partial.offset} of {size}", start_over=True)
        if partial.offset and None not in (answer.etag, course.etag) and answer.etag != course.etag:
            etag, course.etag = course.etag, answer.etag
            raise Transient(f"etag {answer.etag} instead of {etag}", start_over=True)
        course.etag = answer.etag

    def _start_over(self, partial: PartialFile, course: _Course, reason: str) -> None:
        """Begin the file anew, unless the server has made that necessary too often."""
        course.restarts += 1
        if course.restarts > self.policy.restarts:
            self._give_up(partial, f"{reason}, {course.restarts} times", None)
        self.on_bytes(-partial.restart())

    def _give_up(self, partial: PartialFile, reason: str, cause: Transient | None) -> NoReturn:
        raise NetworkError(
            f"{self.listing.repo}: {partial.file.path}",
            expected=f"{partial.file.size} bytes",
            found=f"{reason}, at byte {partial.offset}",
            next_step="Run the same command again; it goes on from there.",
        ) from cause

    def _refuse_digest(self, partial: PartialFile) -> NoReturn:
        file, head = partial.file, partial.read_head()
        self.on_bytes(-partial.offset)
        found = f"{partial.digest}{_kind(head)}"
        self._refuse(file, found, partial.quarantine(), expected=f"{file.algorithm} {file.digest}")

    def _refuse_body(self, file: ListedFile, answer: Answer, found: str) -> NoReturn:
        """Keep the start of a body that cannot be the file."""
        head = b""
        for chunk in answer.chunks:
            head += chunk
            if len(head) >= KEPT_BYTES:
                break
        path = quarantine_path(self.dst, file, sha256(head[:KEPT_BYTES]).hexdigest())
        with disk_errors(path):
            path.write_bytes(head[:KEPT_BYTES])
        self._refuse(file, f"{found}{_kind(head)}", path)

    def _refuse(self, file: ListedFile, found: str, kept: Path, expected: str = "") -> NoReturn:
        raise InputError(
            f"{self.listing.repo}: {file.path}",
            expected=expected or f"{file.size} bytes",
            found=found,
            next_step=f"Nothing of it was used; the wrong bytes are in {kept}. Run the same command to fetch it again.",
        )


class _Pace:
    """Drops a connection that is open but brings next to nothing."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.policy = policy
        self.begin = time.monotonic()
        self.num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Count bytes that came in; Transient if they were too few for too long."""
        self.num_bytes += num_bytes
        if time.monotonic() - self.begin < self.policy.stall_seconds:
            return
        if self.num_bytes < self.policy.stall_bytes:
            raise Transient(f"{self.num_bytes} bytes in {self.policy.stall_seconds:g} s")
        self.begin, self.num_bytes = time.monotonic(), 0


def _kind(head: bytes) -> str:
    """Say what the wrong bytes look like."""
    if head.startswith(_POINTER):
        return ", a git LFS pointer"
    return ", an HTML page" if head.lstrip().lower().startswith(_HTML) else ""
