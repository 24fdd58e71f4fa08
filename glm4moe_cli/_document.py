"""The one JSON document that --json prints: the envelope around a command's result."""

import json
from collections.abc import Mapping
from typing import Any

from glm4moe_cli import __version__
from glm4moe_cli._errors import Failure
from glm4moe_cli._progress import Progress
from glm4moe_cli._text import to_json

SCHEMA = "glm4moe.result/1"


class Document:
    """Collects, while a command runs, what its JSON document will say.

    Keys: schema, version, command, ok, exit_code, result, warnings, errors; `timings` in seconds and `bytes`, both by
    step, with `timings.total` from start to end.
    """

    def __init__(self, command: str | None) -> None:
        self.command = command
        self.result: Any = None
        self.warnings: list[str] = []
        self._seconds: dict[str, float] = {}
        self._bytes: dict[str, int] = {}

    def set_result(self, value: Mapping[str, Any]) -> None:
        """Take the result; what JSON lacks is spelled out now, so that a later change of it does not show."""
        self.result = to_json(value)

    def add_step(self, progress: Progress) -> None:
        """Add the time and bytes of a step; a step done in parts adds up."""
        self._seconds[progress.step] = self._seconds.get(progress.step, 0.0) + progress.seconds
        self._bytes[progress.step] = self._bytes.get(progress.step, 0) + progress.processed_bytes

    def dumps(self, failure: Failure | None, total_seconds: float) -> str:
        """Return the document on one line, in ASCII."""
        seconds = {"total": total_seconds, **self._seconds}
        envelope = {
            "schema": SCHEMA,
            "version": __version__,
            "command": self.command,
            "ok": failure is None,
            "exit_code": failure.exit_code if failure else 0,
            "result": self.result,
            "warnings": self.warnings,
            "errors": [failure.as_json()] if failure else [],
            "timings": {step: round(value, 3) for step, value in seconds.items()},
            "bytes": self._bytes,
        }
        return json.dumps(envelope, allow_nan=False)
