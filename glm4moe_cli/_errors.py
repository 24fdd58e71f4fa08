"""What ends a command: one ordered table from exception type to exit code and words."""

import errno
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from converters.errors import Glm4MoeError, ResourceError, UsageError

EXIT_BUG = 1
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130
EXIT_READER_GONE = 141  # 128 + SIGPIPE, what a shell reports for any tool whose reader went away

_RUN_AGAIN = "Run the same command again to go on from here."
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_ALLOWED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class Stopped(BaseException):
    """SIGTERM or SIGUSR1 arrived. Like KeyboardInterrupt, no `except Exception` of a library may swallow it."""


@dataclass(frozen=True, slots=True)
class Failure:
    """How a command failed: its exit code and what the reader is told."""

    exit_code: int
    code: str
    message: str
    hint: str = ""
    retryable: bool = False

    def as_json(self) -> dict[str, str | bool]:
        """Return the entry of the JSON document."""
        return {"code": self.code, "message": self.message, "hint": self.hint, "retryable": self.retryable}

    def __str__(self) -> str:
        """Return message and hint as one line of prose."""
        stop = "" if self.message.endswith((".", "?", "!")) else "."
        return f"{self.message}{stop} {self.hint}" if self.hint else self.message


def _own(error: Glm4MoeError) -> Failure:
    bare = Glm4MoeError(error.subject, expected=error.expected, found=error.found)
    return Failure(error.exit_code, error.code, str(bare), error.next_step, error.retryable)


def _click(error: click.ClickException) -> Failure:
    context = getattr(error, "ctx", None)
    hint = f"Try '{context.command_path} --help'." if context else ""
    # click breaks lists of choices over lines
    return Failure(UsageError.exit_code, UsageError.code, " ".join(error.format_message().split()), hint)


def _stopped(error: BaseException) -> Failure:
    return Failure(EXIT_STOPPED, "stopped", f"stopped by {error}", _RUN_AGAIN, retryable=True)


def _interrupted(_: BaseException) -> Failure:
    return Failure(EXIT_INTERRUPTED, "interrupted", "interrupted", _RUN_AGAIN, retryable=True)


def _memory(error: BaseException) -> Failure:
    lines = str(error).splitlines()
    message = f"out of memory: {lines[0]}" if lines else "out of memory"
    hint = "Lower --max-memory or --workers, or free some memory."
    return Failure(ResourceError.exit_code, ResourceError.code, message, hint, retryable=True)


def _disk(error: OSError) -> Failure:
    place = error.filename or "the disk"
    hint = "Free some space and run the same command again."
    return Failure(ResourceError.exit_code, ResourceError.code, f"{place}: {error.strerror}", hint, retryable=True)


def _access(error: OSError) -> Failure:
    hint = "Check its owner and permissions."
    return Failure(UsageError.exit_code, UsageError.code, f"{error.filename}: {error.strerror}", hint)


def _is_torch_memory(error: RuntimeError) -> bool:
    """Tell whether torch ran out: a class of its own on a GPU, a plain RuntimeError of its allocator on the CPU."""
    torch = sys.modules.get("torch")
    on_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    return on_gpu or "DefaultCPUAllocator: " in str(error)


# (type, what else must hold, how it is reported); first match wins
_TABLE: tuple[tuple[type[BaseException], Callable[[Any], bool] | None, Callable[[Any], Failure]], ...] = (
    (Glm4MoeError, None, _own),
    (click.ClickException, None, _click),
    (Stopped, None, _stopped),
    (KeyboardInterrupt, None, _interrupted),
    (click.Abort, None, _interrupted),
    (MemoryError, None, _memory),
    (RuntimeError, _is_torch_memory, _memory),
    (OSError, lambda error: error.errno in _FULL, _disk),
    (OSError, lambda error: error.errno in _NOT_ALLOWED and error.filename is not None, _access),
)


def describe(error: BaseException) -> Failure | None:
    """Return how to report the exception; None for a bug of ours, which keeps its traceback."""
    for kind, test, report in _TABLE:
        if isinstance(error, kind) and (test is None or test(error)):
            return report(error)
    return None


def bug(error: BaseException) -> Failure:
    """Return how to report an exception that `describe` does not know."""
    message = f"{type(error).__name__}: {error}"
    return Failure(
        EXIT_BUG, Glm4MoeError.code, message, "This is a bug in glm4moe; please report it with its traceback."
    )
