"""One measured value against its limit."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from runtime.verify.limits import INDISTINGUISHABLE, Bound


class Verdict(StrEnum):
    """What a level or a metric comes to, mildest first."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the most severe verdict; PASS of none."""
    return max(verdicts, key=list(Verdict).index, default=Verdict.PASS)


@dataclass(frozen=True, slots=True)
class Check:
    """One metric held against its limit.

    Attributes:
        metric: what was measured, with its reduction.
        value: in `unit`; None where nothing could be measured.
        verdict: what it comes to.
        se: standard error in the same unit (block bootstrap over windows), None where there is none.
        bound: limits in the same unit, the floor counted in; None where any value but 0 fails.
        at_least: the value must not be below the bound, rather than not above it.
        ci95: bootstrap interval in the same unit, None where there is none.
        floor: what noise of 2^-9 gives, in the same unit: an error, or a share of agreement where `at_least`. None
            where it was not measured, or is no such thing.
        place: where the value was found, e.g. "layer 3, MoE"; empty for one of the whole model.
    """

    metric: str
    value: float | None
    unit: str
    verdict: Verdict
    se: float | None = None
    bound: Bound | None = None
    at_least: bool = False
    ci95: tuple[float, float] | None = None
    floor: float | None = None
    place: str = ""

    @property
    def expected(self) -> str:
        """Return the limit in words."""
        if self.bound is None:
            return "0"
        sign = ">=" if self.at_least else "<="
        limits = dict.fromkeys((f"{self.bound.warn:.6g}", f"{self.bound.fail:.6g}"))
        return f"{sign} {' / '.join(limits)}"

    @property
    def found(self) -> str:
        """Return the value in words."""
        if self.value is None:
            return "nothing to measure"
        error = "" if self.se is None else f" +- {self.se:.2g}"
        unit = one_of(self.unit) if self.value == 1 else self.unit
        found = f"{self.value:.6g}{error} {unit}".rstrip()
        return f"{found} ({self.place})" if self.place else found

    @property
    def indistinguishable(self) -> bool:
        """Whether an error is below INDISTINGUISHABLE times its floor, so that it says nothing about the candidate."""
        if self.value is None or not self.floor or self.at_least:
            return False
        return self.value < INDISTINGUISHABLE * self.floor


# units of checks that count things, and not quantities such as nats
_COUNTS = {
    name: name.removesuffix("s")
    for name in (
        *("answers", "findings", "layers", "models", "more causes", "more findings", "more warnings"),
        *("problems", "source tensors", "tensors", "tokens"),
    )
}


def one_of(unit: str) -> str:
    """Return what a single one of a unit is called; quantities are called the same."""
    return _COUNTS.get(unit, unit)


def counted(count: int, unit: str) -> str:
    """Return a number of things in words: 1 token, 2 tokens."""
    return f"{count} {one_of(unit) if count == 1 else unit}"


Reason = tuple[Verdict, str]


@dataclass(frozen=True, slots=True)
class Judged:
    """A check, and what of it is worth a sentence: nothing, unless it is beyond its limit."""

    check: Check
    reasons: tuple[Reason, ...] = ()


def plain(check: Check) -> Judged:
    """Return a check with a reason of its own words, unless it passes."""
    if check.verdict is Verdict.PASS:
        return Judged(check)
    return Judged(check, ((check.verdict, f"{check.metric} {check.found}, expected {check.expected}"),))


# how many standard errors a mean of few tokens may be off by chance
_ERRORS = 2.0


def judge(value: float, bound: Bound, *, at_least: bool = False, se: float | None = None) -> Verdict:
    """Return what a value comes to; NaN and infinity fail.

    Args:
        value: in the unit of the bound.
        bound: limits. One that no floor moves, such as a user's own, is held against the value itself.
        at_least: the value must not be below the bound.
        se: standard error of the value. It is beyond a limit if it is so by more than two of them; one that is beyond
            `fail` by less warns.
    """
    errors = _ERRORS * se if se is not None and bound.floors is not None else 0.0
    slack = errors if math.isfinite(value) and math.isfinite(errors) else 0.0

    def within(limit: float, slack: float = 0.0) -> bool:
        # written so that NaN is never within
        return value >= limit - slack if at_least else value <= limit + slack

    if not within(bound.fail, slack):
        return Verdict.FAIL
    return Verdict.PASS if within(bound.fail) and within(bound.warn, slack) else Verdict.WARN


def severity(value: float) -> float:
    """Return a key that sorts errors by size with NaN as the largest."""
    return math.inf if math.isnan(value) else value
