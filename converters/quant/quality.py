"""How far quantized weights are from their source: measured on a fixed sample of rows while they are written.

Every SAMPLE_EVERY-th row of a tensor is restored from its codes and held against the source. Sums of rows are added
exactly, so that the figures do not depend on how a tensor is cut into blocks.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.schema import parse

SAMPLE_EVERY = 16
# figures are kept to so many digits; what the last bits of a sum are is nobody's business
DIGITS = 6


@dataclass(frozen=True, slots=True)
class TensorQuality:
    """Errors of a tensor.

    Attributes:
        relative_error: sqrt(sum of squared differences / sum of squares); 0 for a tensor of zeros.
        clipped: share of the values beyond the largest code, 0 to 1.
    """

    relative_error: float
    clipped: float

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio, 20 log10(1 / relative error), in dB; inf without error."""
        return -20 * math.log10(self.relative_error) if self.relative_error else math.inf

    @classmethod
    def of_sums(cls, squared_errors: list[float], squares: list[float], clipped: int, count: int) -> "TensorQuality":
        """Return it from the sums of rows, in any order."""
        error, total = math.fsum(squared_errors), math.fsum(squares)
        relative = math.sqrt(error / total) if total else 0.0
        return cls(float(f"{relative:.{DIGITS}g}"), float(f"{clipped / max(1, count):.{DIGITS}g}"))


def by_role(quality: Mapping[str, TensorQuality]) -> dict[str, list[TensorQuality]]:
    """Return the tensors' figures by role, in the order of their names: tensors are finished in any order."""
    found: dict[str, list[TensorQuality]] = {}
    for name, figures in sorted(quality.items()):
        found.setdefault(parse(name).spec.role.value, []).append(figures)
    return found


def mean(found: Sequence[TensorQuality]) -> TensorQuality:
    """Return the means of relative errors and clipped shares; each tensor counts once."""
    count = max(1, len(found))
    errors = math.fsum(quality.relative_error for quality in found) / count
    return TensorQuality(errors, math.fsum(quality.clipped for quality in found) / count)


def worst(quality: Mapping[str, TensorQuality], count: int) -> list[tuple[str, TensorQuality]]:
    """Return the tensors with the largest relative errors, the worst first."""
    return sorted(quality.items(), key=lambda item: (-item[1].relative_error, item[0]))[:count]
