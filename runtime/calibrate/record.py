"""What a run has found so far."""

from dataclasses import dataclass, field
from typing import Any

from converters.quant.stats import PERCENTILES, CalibrationStats
from runtime.calibrate.meter import Measured


@dataclass(slots=True)
class Record:
    """Statistics by module and by layer, filled as the layers pass."""

    measured: dict[str, Measured] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)
    key_amax: dict[int, float] = field(default_factory=dict)
    value_amax: dict[int, float] = field(default_factory=dict)

    def stats(self, provenance: dict[str, Any]) -> CalibrationStats:
        """Return everything as the value that is saved."""
        return CalibrationStats(
            input_amax={name: measured.amax for name, measured in self.measured.items()},
            key_amax=dict(self.key_amax),
            value_amax=dict(self.value_amax),
            tokens=dict(self.tokens),
            filled=dict(self.filled),
            provenance=provenance,
            percentiles={name: measured.percentiles for name, measured in self.measured.items()},
        )


def largest(several: list[Measured]) -> Measured:
    """Return the largest of each figure."""
    return Measured(
        max(one.amax for one in several),
        {name: max(one.percentiles[name] for one in several) for name in PERCENTILES},
    )
