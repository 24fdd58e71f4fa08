"""What a comparison found, one line each."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """FAIL: the candidate is not what it claims to be. WARN: a reader must judge. Sorts with FAIL first."""

    FAIL = "fail"
    WARN = "warn"


@dataclass(frozen=True, slots=True)
class Finding:
    """One difference: what should have been there and what was, both without a verb."""

    severity: Severity
    subject: str
    expected: str
    found: str

    def __str__(self) -> str:
        """Return the one-line message."""
        return f"{self.subject}: expected {self.expected}, found {self.found}"


def fail(subject: str, expected: str, found: str) -> Finding:
    """Return a finding that fails the verification."""
    return Finding(Severity.FAIL, subject, expected, found)


def warn(subject: str, expected: str, found: str) -> Finding:
    """Return a finding that is shown but does not fail."""
    return Finding(Severity.WARN, subject, expected, found)
