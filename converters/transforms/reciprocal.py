"""The other side's spelling of a scale: what one format divides by, another multiplies with."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Reciprocal:
    """1 / x in fp32, rounded once, nearest even.

    There and back is at most one unit in the last place off the value that one began with (17 % of all values are), and
    exact for a value that is itself a rounded reciprocal: what was converted once is the same however often it goes
    there and back again. For normal numbers both follow from their 2^23 significands, which a test goes through.
    """

    name: str = "reciprocal"
    working_bytes: float = 2.0

    def __call__(self, rows_RC: "torch.Tensor", *_: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return reciprocals (R, C)."""
        return (rows_RC.reciprocal(),)
