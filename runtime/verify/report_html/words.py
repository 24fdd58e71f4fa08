"""Values as people read them, and text from elsewhere made visible."""

import math
import re
import unicodedata
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from runtime.verify.report import VerifyReport

# categories of characters that change how a text is laid out, or are not there, instead of being seen
_UNSEEN = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})
_PLAIN = re.compile(r"[ -~]*")
_MINUS = "\u2212"
Decode = Callable[[Sequence[int]], str]


def visible(text: str) -> str:
    """Return the text with control, bidi, private and undecodable characters spelled as [U+202E]."""
    if _PLAIN.fullmatch(text):
        return text
    return "".join(f"[U+{ord(c):04X}]" if unicodedata.category(c) in _UNSEEN else c for c in text)


def visible_token(text: str) -> str:
    """Return the text of tokens: newlines and tabs as their symbols, the rest as `visible` does."""
    return visible(text.replace("\n", "\u21b5").replace("\t", "\u21e5"))


def figure(value: float | None, digits: int = 3) -> str:
    """Return a number to so many significant digits; a dash where there is none."""
    if value is None:
        return "\u2013"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return f"{_MINUS if value < 0 else ''}\u221e"
    text = f"{value:.{digits}g}"
    if "e" in text and 1e-4 <= abs(value) < 1e9:
        text = f"{value:.0f}"
    return text.replace("e-0", "e-").replace("e+0", "e").replace("e+", "e").replace("-", _MINUS)


def percent(share: float | None, digits: int = 2) -> str:
    """Return a share of 1 in percent."""
    if share is None or not math.isfinite(share):
        return figure(share)
    return f"{share:.{digits}%}".replace("-", _MINUS)


def grouped(count: int) -> str:
    """Return a count with its thousands apart."""
    return f"{count:,}".replace(",", "\u202f")


def with_error(value: float, se: float | None, digits: int = 4) -> str:
    """Return a value and its standard error."""
    return figure(value, digits) if se is None else f"{figure(value, digits)} \u00b1\u00a0{figure(se, 2)}"


def size(num_bytes: float) -> str:
    """Return a size in decimal units."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(num_bytes) < 999.5:
            return f"{figure(num_bytes)} {unit}"
        num_bytes /= 1000
    return f"{figure(num_bytes)} TB"


def duration(seconds: float) -> str:
    """Return a duration: 0.8 s, 42 s, 3 min 52 s, 2 h 05 min."""
    if seconds < 59.5:
        return f"{figure(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def main_reasons(report: "VerifyReport", most: int) -> list[str]:
    """Return the reasons that a reader needs: of findings, which have a table, only the first three."""
    findings = {str(finding) for finding in report.findings}
    listed = [reason for reason in report.reasons if reason in findings]
    return [reason for reason in report.reasons if reason not in findings or reason in listed[:3]][:most]
