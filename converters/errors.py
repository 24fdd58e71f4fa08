"""Errors a user can cause, each with its exit code and the facts a reader needs to act."""


class Glm4MoeError(Exception):
    """Base of everything a command reports without a traceback.

    Args:
        subject: what is wrong: a file, a tensor, a field, an option.
        expected: what should have been there, without a verb ("shape [4, 8]").
        found: what was there instead.
        next_step: what the reader can do about it, a full sentence.
    """

    exit_code = 1
    code = "internal"
    retryable = False

    def __init__(self, subject: str, *, expected: str = "", found: str = "", next_step: str = "") -> None:
        self.subject = subject
        self.expected = expected
        self.found = found
        self.next_step = next_step
        super().__init__(str(self))

    def __str__(self) -> str:
        """Return the one-line message: subject: expected X, found Y. Next step."""
        facts = ", ".join(
            f"{label} {value}" for label, value in (("expected", self.expected), ("found", self.found)) if value
        )
        message = f"{self.subject}: {facts}" if facts else self.subject
        return f"{message}. {self.next_step}" if self.next_step else message


class UsageError(Glm4MoeError):
    """The request itself cannot be carried out: a wrong option, a combination that makes no sense."""

    exit_code = 2
    code = "usage"


class VerificationFailed(Glm4MoeError):
    """A verification ran and its thresholds were not met."""

    exit_code = 3
    code = "verification-failed"


class InputError(Glm4MoeError):
    """The checkpoint is corrupt, incomplete or of a kind this tool does not implement."""

    exit_code = 4
    code = "input"


class ConfigError(InputError):
    """A field of config.json is missing, contradictory or not supported."""

    code = "config"


class ResourceError(Glm4MoeError):
    """Not enough disk or memory, found by the plan or met during the run."""

    exit_code = 5
    code = "resource"
    retryable = True


class LockedError(Glm4MoeError):
    """Another run holds the output folder."""

    exit_code = 6
    code = "locked"
    retryable = True


class NetworkError(Glm4MoeError):
    """The hub could not be reached or refused access."""

    exit_code = 7
    code = "network"
    retryable = True


class SecurityError(Glm4MoeError):
    """The input asks for something that is never done: leave its folder, unpickle, run code."""

    exit_code = 8
    code = "security"
