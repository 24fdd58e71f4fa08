"""Progress of one step, counted in bytes: what a bar or a plain line shows, and what the JSON document keeps."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

from glm4moe_cli._text import escape, format_bytes, format_seconds

LINE_PERCENT = 5
LINE_SECONDS = 30.0


class ProgressView(Protocol):
    """Something that shows progress: a bar, lines in a log, or nothing."""

    def update(self, progress: "Progress") -> None:
        """Show the present state; called with the progress locked."""


@dataclass(slots=True)
class Progress:
    """Bytes of a step that are done. Workers report from their own threads.

    Args:
        step: one word, the verb of the command: `quantize`.
        total_bytes: what the whole step will process.
        done_bytes: what an earlier run already did; it counts as done, but not towards the rate.
    """

    step: str
    total_bytes: int
    done_bytes: int
    view: ProgressView
    clock: Callable[[], float] = time.monotonic
    text: str = ""
    _resumed_bytes: int = field(init=False)
    _start: float = field(init=False)
    _lock: Lock = field(init=False, default_factory=Lock)

    def __post_init__(self) -> None:
        """Start the clock."""
        self._resumed_bytes = self.done_bytes
        self._start = self.clock()

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done; safe to call from any thread."""
        with self._lock:
            self.done_bytes += num_bytes
            self.view.update(self)

    def describe(self, text: str) -> None:
        """Say what is being worked on, e.g. the name of a shard."""
        with self._lock:
            self.text = escape(text)
            self.view.update(self)

    @property
    def seconds(self) -> float:
        """Time since the step began in this run."""
        return self.clock() - self._start

    @property
    def processed_bytes(self) -> int:
        """Bytes done by this run."""
        return self.done_bytes - self._resumed_bytes

    @property
    def bytes_per_second(self) -> float:
        """Mean rate of this run; 0 before anything is known."""
        return self.processed_bytes / self.seconds if self.seconds > 0 else 0.0

    def __str__(self) -> str:
        """Return the state as one line of key=value words for a log."""
        words = [f"step={self.step}", f"done={format_bytes(self.done_bytes)}/{format_bytes(self.total_bytes)}"]
        if rate := self.bytes_per_second:
            left = max(0, self.total_bytes - self.done_bytes)
            words += [f"rate={format_bytes(rate)}/s", f"eta={format_seconds(left / rate)}"]
        if self.text:
            words.append(f"at={self.text}")
        return " ".join(words)


@dataclass(slots=True)
class LineView:
    """A line in a log every LINE_PERCENT of the bytes or LINE_SECONDS, whichever comes first; never two in a second."""

    write: Callable[[str], None]
    _shown_bytes: int | None = None
    _shown_seconds: float = 0.0

    def update(self, progress: Progress) -> None:
        """Write a line if one is due; the last byte is always worth one."""
        if self._shown_bytes is None:
            self._shown_bytes = progress.done_bytes - progress.processed_bytes
        fresh_bytes = progress.done_bytes - self._shown_bytes
        finished = progress.done_bytes >= progress.total_bytes and fresh_bytes > 0
        waited = progress.seconds - self._shown_seconds
        enough = fresh_bytes * 100 >= progress.total_bytes * LINE_PERCENT and waited >= 1
        if finished or enough or waited >= LINE_SECONDS:
            self._shown_bytes, self._shown_seconds = progress.done_bytes, progress.seconds
            self.write(str(progress))


class SilentView:
    """Nothing, for --quiet."""

    def update(self, progress: Progress) -> None:
        """Show nothing."""
