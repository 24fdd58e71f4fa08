"""What a comparison of weights found: of every official tensor, how the two sides relate and how far they are apart."""

import math
from dataclasses import dataclass
from enum import StrEnum

from converters.findings import Finding, fail

# figures are kept to so many digits: the last bits of a sum say nothing
_DIGITS = 6
_MOST_SHOWN = 10


class Relation(StrEnum):
    """What the candidate's tensor must be to the source's.

    ROUNDED: codes made of weights, each within half a step. GRID: codes chosen otherwise (GPTQ), of which only their
    error is known. The others must agree bit for bit: with the source, with its cast, with its codes times scales.
    """

    EQUAL = "equal"
    CAST = "cast"
    DEQUANTIZED = "dequantized"
    ROUNDED = "rounded"
    GRID = "grid"


@dataclass(frozen=True, slots=True)
class TensorFigures:
    """One official tensor of the candidate against the source.

    Attributes:
        scheme: how the candidate stores it; `plain` for values.
        division: how quotients were rounded, see `halfstep.Division`; empty where nothing was divided.
        elements: how many it has.
        outside: elements that are not what they must be; `first` describes the first of them.
        scales: how many scales it has.
        wrong_scales: scales that the source's magnitudes do not lead to; `first_scale` describes the first.
        relative_error: sqrt(sum of squared errors / sum of squared weights).
        slope: <w, w'> / <w, w>; 1 without bias.
        clipped: share of elements beyond the range of the format.
        amax: largest magnitude of the source.
        tensor_scale: what its scale for the whole tensor multiplies with, if it has one.
    """

    tensor: str
    relation: Relation
    scheme: str
    division: str
    elements: int
    outside: int
    first: str
    scales: int
    wrong_scales: int
    first_scale: str
    relative_error: float
    slope: float
    clipped: float
    amax: float
    tensor_scale: float | None = None

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise, -20 log10(relative error), in dB; inf without error."""
        return sqnr_db(self.relative_error)

    def findings(self) -> list[Finding]:
        """Return what is wrong with it."""
        found, subject = [], f"candidate: tensor {self.tensor}"
        if self.outside:
            many = f"{self.outside} of {self.elements} elements are not, the first {self.first}"
            found.append(fail(subject, _EXPECTED[self.relation], many))
        if self.wrong_scales:
            many = f"{self.wrong_scales} of {self.scales} scales are not, the first {self.first_scale}"
            found.append(fail(subject, "scales that follow from the source's largest magnitudes", many))
        # written so that NaN is too far
        if self.relation is Relation.GRID and not abs(self.slope - 1) < _GRID_SLOPE:
            found.append(fail(subject, f"<w, w'> / <w, w> within {_GRID_SLOPE} of 1", f"{self.slope:.4g}"))
        return found


_GRID_SLOPE = 0.02
_EXPECTED = {
    Relation.EQUAL: "the bits of the source",
    Relation.CAST: "the source's values, rounded once",
    Relation.DEQUANTIZED: "the source's codes times their scales, rounded once",
    Relation.ROUNDED: "every element within half a step of its source",
    Relation.GRID: "codes and scales that stand for values",
}


def sqnr_db(relative_error: float) -> float:
    """Return -20 log10(relative error) in dB; inf without error, NaN for NaN."""
    if math.isnan(relative_error):
        return relative_error
    return rounded(-20 * math.log10(relative_error)) if relative_error else math.inf


def rounded(value: float) -> float:
    """Return a figure to the digits that are kept."""
    return float(f"{value:.{_DIGITS}g}")


@dataclass(frozen=True, slots=True)
class SchemeSummary:
    """All tensors that are stored alike; the error is that of all of them together, unweighted mean beside it."""

    scheme: str
    relation: Relation
    tensors: int
    elements: int
    mean_relative_error: float
    largest_relative_error: float
    clipped: float


@dataclass(frozen=True, slots=True)
class Certificate:
    """The weights level of a verification.

    Attributes:
        tensors: every official tensor of both sides, in the order of the table.
        findings: all that is wrong, in that order.
        read_bytes: of both sides, second passes included.
    """

    tensors: tuple[TensorFigures, ...]
    findings: tuple[Finding, ...]
    read_bytes: int

    @property
    def worst(self) -> tuple[TensorFigures, ...]:
        """The tensors with the largest relative error, the worst first."""
        with_error = [figures for figures in self.tensors if figures.relative_error != 0]
        return tuple(sorted(with_error, key=_badness)[:_MOST_SHOWN])

    @property
    def summaries(self) -> tuple[SchemeSummary, ...]:
        """Figures by scheme and relation, in order of first occurrence."""
        groups: dict[tuple[str, Relation], list[TensorFigures]] = {}
        for figures in self.tensors:
            groups.setdefault((figures.scheme, figures.relation), []).append(figures)
        return tuple(_summary(scheme, relation, members) for (scheme, relation), members in groups.items())


def _badness(figures: TensorFigures) -> tuple[float, str]:
    error = figures.relative_error
    return (-math.inf if math.isnan(error) else -error), figures.tensor


def _summary(scheme: str, relation: Relation, members: list[TensorFigures]) -> SchemeSummary:
    errors = [figures.relative_error for figures in members]
    elements = sum(figures.elements for figures in members)
    clipped = math.fsum(figures.clipped * figures.elements for figures in members)
    return SchemeSummary(
        scheme=scheme,
        relation=relation,
        tensors=len(members),
        elements=elements,
        mean_relative_error=rounded(math.fsum(errors) / len(errors)),
        largest_relative_error=max(errors, key=lambda error: math.inf if math.isnan(error) else error),
        clipped=rounded(clipped / max(1, elements)),
    )
