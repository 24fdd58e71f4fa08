"""Text for people and for JSON: escaped names, sizes, durations, values that JSON can hold."""

import dataclasses
import math
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

# what changes a terminal or the reading order instead of being seen: C0, DEL, C1, line separators, bidi controls,
# and the surrogates that stand for undecodable bytes of a file name
_CONTROLS = "\\x00-\\x1f\\x7f-\\x9f\\u061c\\u200e\\u200f\\u2028-\\u202e\\u2066-\\u2069\\ud800-\\udfff"
_UNSAFE = re.compile(f"[{_CONTROLS}]")
_UNSAFE_IN_PROSE = re.compile(f"(?![\\n\\t])[{_CONTROLS}]")
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")
_NON_FINITE = {math.inf: "Infinity", -math.inf: "-Infinity"}


def escape(text: str) -> str:
    """Return the text on one line, with control, bidi and undecodable characters as backslash escapes."""
    return _UNSAFE.sub(_backslash, text)


def escape_prose(text: str) -> str:
    """Return the text as `escape` does, but with its newlines and tabs left in place."""
    return _UNSAFE_IN_PROSE.sub(_backslash, text)


def _backslash(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape", "surrogatepass").decode("ascii")


def format_bytes(num_bytes: float) -> str:
    """Return a size in decimal units, as disks and `--max-shard-size` count: 999B, 1.2GB."""
    value, unit = float(num_bytes), _UNITS[0]
    for unit in _UNITS:
        if abs(value) < 999.95 or unit == _UNITS[-1]:
            break
        value /= 1000
    return f"{value:.0f}B" if unit == "B" else f"{value:.1f}{unit}"


def format_seconds(seconds: float) -> str:
    """Return a duration to the second: 9s, 3m52s, 2h05m."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{rest:02}s" if minutes else f"{rest}s"


def to_json(value: Any) -> Any:
    """Return the value with what JSON lacks spelled out: dataclasses, enums, paths, tuples, sets.

    JSON has no infinities: they become the strings "Infinity", "-Infinity" and "NaN", so that a report is never lost
    to one division by zero and never says null where something was measured.
    """
    if isinstance(value, Enum):
        return to_json(value.value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(to_json(key)): to_json(item) for key, item in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(to_json, value), key=repr)
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return _NON_FINITE.get(value, "NaN")
    return value
