"""The only place that prints, and the only importer of rich.

stdout carries data: text and tables for a person, tab-separated values when piped, or with --json one document and
nothing else. stderr carries progress, hints, warnings and errors.
"""

import io
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any, TextIO

from glm4moe_cli._document import Document
from glm4moe_cli._errors import EXIT_READER_GONE, Failure
from glm4moe_cli._progress import LineView, Progress, ProgressView, SilentView
from glm4moe_cli._text import escape, escape_prose

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.table import Table


class Output:
    """What a command tells its user.

    Args:
        command: the command's name, for the JSON document.
        as_json: --json; may still change while the options are parsed.
        quiet: --quiet: no tables, facts, hints or progress; data, warnings and errors stay.
        stdout: where data goes; sys.stdout if None.
        stderr: where everything else goes; sys.stderr if None.
        clock: seconds that never go back, for rates and timings.
    """

    def __init__(
        self,
        command: str | None = None,
        *,
        as_json: bool = False,
        quiet: bool = False,
        stdout: TextIO | None = None,
        stderr: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._document = Document(command)
        self.as_json = as_json
        self.quiet = quiet
        self._stdout = stdout or sys.stdout
        self._stderr = stderr or sys.stderr
        self._clock = clock
        self._start = clock()
        self._bar: RichProgress | None = None
        self._lock = Lock()

    def line(self, text: str) -> None:
        """Print one line of data."""
        if not self.as_json:
            self._write(self._stdout, escape(text) + "\n")

    def stream(self, text: str) -> None:
        """Print a piece of running text as it comes, e.g. of a generated answer; a pipe gets it unchanged."""
        if not self.as_json:
            self._write(self._stdout, escape_prose(text) if self._stdout.isatty() else text)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print rows under a header; piped, tab-separated with the header first and no title, nothing cut."""
        cells = [[escape(str(cell)) for cell in row] for row in rows]
        numeric = [all(isinstance(row[index], (int, float)) for row in rows) for index in range(len(columns))]
        self._show(title, [list(columns), *cells], numeric, header=True)

    def facts(self, title: str, values: Mapping[str, object]) -> None:
        """Print names and values, one pair a line."""
        self._show(title, [[escape(name), escape(str(value))] for name, value in values.items()], [False, False])

    def hint(self, text: str) -> None:
        """Suggest a next step on stderr."""
        if not self.quiet:
            self._write(self._stderr, f"Hint: {escape(text)}\n")

    def note(self, text: str) -> None:
        """Say on stderr how it went, e.g. how fast."""
        if not self.quiet:
            self._write(self._stderr, f"{escape(text)}\n")

    def warning(self, text: str) -> None:
        """Warn on stderr, --quiet or not, and in the JSON document."""
        self._document.warnings.append(text)
        self._write(self._stderr, f"Warning: {escape(text)}\n")

    def result(self, value: Mapping[str, Any]) -> None:
        """Set the `result` of the JSON document; the people's view is printed by the other methods."""
        self._document.set_result(value)

    @contextmanager
    def progress(self, step: str, total_bytes: int, done_bytes: int = 0) -> Iterator[Progress]:
        """Show a step's progress on stderr and keep its time and bytes for the JSON document.

        Args:
            step: one word, e.g. `quantize`.
            total_bytes: what the whole step processes.
            done_bytes: how much of that an earlier run did.
        """
        progress = Progress(step, total_bytes, done_bytes, SilentView(), self._clock)
        with self._view(progress) as progress.view:
            try:
                yield progress
            finally:
                self._document.add_step(progress)

    def finish(self, failure: Failure | None = None) -> int:
        """Print the error, if there is one, and with --json the document; return the exit code."""
        try:
            if failure is not None:
                self._write(self._stderr, f"Error: {escape(str(failure))}\n")
            if self.as_json:
                self._write(self._stdout, self._document.dumps(failure, self._clock() - self._start) + "\n")
        except BrokenPipeError:
            return EXIT_READER_GONE
        return failure.exit_code if failure else 0

    def reader_gone(self) -> bool:
        """Tell whether stdout is a pipe that nobody reads any more."""
        try:
            descriptor = self._stdout.fileno()
        except io.UnsupportedOperation:
            return False
        poll = select.poll()
        poll.register(descriptor, 0)  # errors and hang-ups are always reported
        return bool(poll.poll(0))

    def _show(self, title: str, rows: list[list[str]], numeric: list[bool], *, header: bool = False) -> None:
        if self.as_json or self.quiet:
            return
        if self._stdout.isatty():
            self._write(self._stdout, _render(title, rows, numeric, header=header))
        else:
            self._write(self._stdout, "".join("\t".join(row) + "\n" for row in rows))

    def _write(self, stream: TextIO, text: str) -> None:
        # a name that the terminal's encoding lacks must not end the run
        encoding = stream.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        with self._lock, _hidden(self._bar):
            stream.write(text)
            stream.flush()

    @contextmanager
    def _view(self, progress: Progress) -> Iterator[ProgressView]:
        if self.quiet:
            yield SilentView()
        elif self._stderr.isatty() and os.environ.get("TERM") != "dumb":
            with _bar(self._stderr) as bar:
                self._bar = bar
                try:
                    yield _BarView(bar, progress)
                finally:
                    self._bar = None
        else:
            yield LineView(lambda text: self._write(self._stderr, text + "\n"))


class _BarView:
    """A bar with bytes, rate and time left."""

    def __init__(self, bar: "RichProgress", progress: Progress) -> None:
        self.bar = bar
        self.task = bar.add_task(progress.step, total=progress.total_bytes, completed=progress.done_bytes)

    def update(self, progress: Progress) -> None:
        text = f"{progress.step} {progress.text}".rstrip()
        self.bar.update(self.task, completed=progress.done_bytes, description=text)


@contextmanager
def _hidden(bar: "RichProgress | None") -> Iterator[None]:
    """Take the bar off the terminal while something else is written."""
    if bar is None:
        yield
        return
    bar.stop()
    yield
    bar.start()


def _bar(stderr: TextIO) -> "RichProgress":
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn())
    rates = (TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(file=stderr)
    return RichProgress(*columns, *rates, console=console, transient=True, redirect_stdout=False, redirect_stderr=False)


def _render(title: str, rows: list[list[str]], numeric: list[bool], *, header: bool) -> str:
    """Return the rows as text for a terminal: long cells fold over lines, nothing is cut."""
    from rich.console import Console
    from rich.text import Text

    text = io.StringIO()
    width = shutil.get_terminal_size().columns
    console = Console(file=text, force_terminal=True, width=width, highlight=False, legacy_windows=False)
    console.print(Text(escape(title), style="bold"))
    console.print(_grid(rows, numeric, header=header))
    return text.getvalue()


def _grid(rows: list[list[str]], numeric: list[bool], *, header: bool) -> "Table":
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=None, show_header=header, pad_edge=False, padding=(0, 2, 0, 0))
    for index, is_number in enumerate(numeric):
        name = Text(rows[0][index]) if header else ""
        grid.add_column(name, overflow="fold", justify="right" if is_number else "left", no_wrap=False)
    for row in rows[header:]:
        grid.add_row(*map(Text, row))
    return grid
