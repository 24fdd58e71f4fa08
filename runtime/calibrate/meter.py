"""What one linear module saw: largest magnitude, and bounds of percentiles from a histogram.

Counts are integers and maxima exact, so that neither order nor grouping of the rows changes a result.
"""

from dataclasses import dataclass

import torch

from converters.errors import InputError
from converters.quant.stats import PERCENTILES

# exponent and four bits of mantissa: a bound is at most 1/16 above the percentile
_SHIFT = 19
_NUM_BINS = 1 << (31 - _SHIFT)


@dataclass(frozen=True, slots=True)
class Measured:
    """A module's result: the largest magnitude, and for each name of PERCENTILES a bound, all fp32."""

    amax: float
    percentiles: dict[str, float]


class InputMeter:
    """Takes up inputs of one module, any number of rows at a time."""

    def __init__(self, module: str, device: str) -> None:
        self.module = module
        self._amax = torch.zeros((), device=device)
        self._counts = torch.zeros(_NUM_BINS, dtype=torch.int64, device=device)

    def add(self, inputs: torch.Tensor) -> None:
        """Take up inputs of any shape, fp32."""
        if inputs.numel():
            magnitudes = inputs.detach().abs().flatten()
            self._amax = torch.maximum(self._amax, magnitudes.max())
            self._counts += torch.bincount(magnitudes.view(torch.int32) >> _SHIFT, minlength=_NUM_BINS)

    def result(self) -> Measured:
        """Return what was seen.

        Raises:
            InputError: an input was NaN or infinite.
        """
        amax = finite(float(self._amax), f"input of {self.module}")
        cumulative = self._counts.cumsum(0).cpu()
        total = int(cumulative[-1])
        bounds = {}
        for name, share in PERCENTILES.items():
            wanted = -(-total * share.numerator // share.denominator)
            index = int(torch.searchsorted(cumulative, wanted))
            edge = torch.tensor([((index + 1) << _SHIFT) - 1], dtype=torch.int32).view(torch.float32)
            bounds[name] = min(float(edge), amax) if total else 0.0
        return Measured(amax, bounds)


def finite(value: float, subject: str) -> float:
    """Return a magnitude.

    Raises:
        InputError: it is NaN or infinite.
    """
    if value != value or value == float("inf"):
        raise InputError(
            subject,
            expected="finite values",
            found=str(value),
            next_step="A weight is broken; 'glm4moe inspect CKPT --check' finds it.",
        )
    return value
