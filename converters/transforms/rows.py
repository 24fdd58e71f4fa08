"""What can happen to a block of rows between reading and writing. Each is a pure function of the rows."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from converters.checkpoint.dtypes import torch_dtype
from converters.errors import InputError
from converters.numerics.finite import first_non_finite
from converters.transforms.quantize import QuantizeFp8Channel

if TYPE_CHECKING:
    import torch


__all__ = ["Cast", "Copy", "QuantizeFp8Channel", "RowTransform", "cast_rows"]


class RowTransform(Protocol):
    """A function from (R, C) source rows to one (R, ...) block for each output of its unit.

    Some also need what stands beside the rows in other tensors, (R, .) each, and those that share a scale with other
    weights get the largest magnitude of all of them last, (1, 1).
    """

    @property
    def name(self) -> str:
        """Word or two for plans and reports."""

    @property
    def working_bytes(self) -> float:
        """Memory in use per source byte, the source block included."""

    def __call__(self, rows_RC: "torch.Tensor", *beside: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return a block for each output; the rows are left as they are."""


@dataclass(frozen=True, slots=True)
class Copy:
    """Rows as they are, bit for bit."""

    name: str = "copy"
    working_bytes: float = 1.0

    def __call__(self, rows_RC: "torch.Tensor", *_: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return the rows themselves."""
        return (rows_RC,)


@dataclass(frozen=True, slots=True)
class Cast:
    """Rows rounded to another floating dtype, nearest even."""

    dtype: str
    working_bytes: float = 4.0

    @property
    def name(self) -> str:
        """The target, as in `cast BF16`."""
        return f"cast {self.dtype}"

    def __call__(self, rows_RC: "torch.Tensor", *_: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return the rows in the new dtype.

        Raises:
            InputError: a value is too large for the new dtype.
        """
        return (cast_rows(rows_RC, self.dtype),)


def cast_rows(rows_RC: "torch.Tensor", dtype: str) -> "torch.Tensor":
    """Return (R, C) rows rounded to another floating dtype, nearest even.

    Raises:
        InputError: a value is too large for the new dtype.
    """
    import torch

    cast_RC = rows_RC.to(torch_dtype(dtype)).contiguous()
    if first_non_finite(cast_RC.view(torch.uint8).view(-1).numpy().data, dtype) is not None:
        worst = float(rows_RC.abs().max())
        raise InputError(
            f"cast to {dtype}",
            expected="values that fit",
            found=f"{worst:.6g}",
            next_step="Keep the dtype, or choose bfloat16 or float32.",
        )
    return cast_RC
