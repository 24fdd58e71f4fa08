"""Rows of codes back to rows of weights, and values that are known without reading."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.formats.weights import Coding
from converters.transforms.rows import cast_rows

if TYPE_CHECKING:
    import torch

# bytes in use for each byte of codes: fp32 values, index or copy of them, the rounded result
_WORKING_BYTES = {
    Coding.SCALED: 12.0,
    Coding.PACKED_INT: 24.0,
    Coding.NVFP4_DIVISOR: 26.0,
    Coding.NVFP4_FACTOR: 26.0,
}


@dataclass(frozen=True, slots=True)
class Dequantize:
    """Codes times scales, computed in fp32 and rounded once; see `converters.numerics.dequantize`.

    Attributes:
        coding: how codes and scales make weights.
        num_bits: of a code.
        columns: of the weight.
        group: columns that share a scale.
        dtype: what to round to.
    """

    coding: Coding
    num_bits: int
    columns: int
    group: int
    dtype: str

    @property
    def name(self) -> str:
        """The target, as in `dequantize to BF16`."""
        return f"dequantize to {self.dtype}"

    @property
    def working_bytes(self) -> float:
        """Memory in use per source byte."""
        return _WORKING_BYTES[self.coding]

    def __call__(self, rows_RC: "torch.Tensor", *beside: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return the weights (R, columns).

        Args:
            rows_RC: codes as stored.
            beside: scales (R, G), for NVFP4 also the tensor's scale (R, 1).
        Raises:
            InputError: a weight does not fit the dtype.
        """
        return (cast_rows(self._weights(rows_RC, *beside), self.dtype),)

    def _weights(self, rows_RC: "torch.Tensor", *beside: "torch.Tensor") -> "torch.Tensor":
        from converters.numerics.dequantize import decode, dequantize_nvfp4, scale_groups, unpack_int32

        match self.coding:
            case Coding.SCALED:
                return scale_groups(decode(rows_RC), beside[0], self.group)
            case Coding.PACKED_INT:
                values_RC = unpack_int32(rows_RC, self.num_bits, self.columns)
                return scale_groups(values_RC, beside[0], self.group)
            case Coding.NVFP4_DIVISOR:
                return dequantize_nvfp4(rows_RC, beside[0], beside[1], divides=True)
            case Coding.NVFP4_FACTOR:
                return dequantize_nvfp4(rows_RC, beside[0], beside[1], divides=False)


@dataclass(frozen=True, slots=True)
class Constant:
    """Values that are known before anything is read, such as the shape of a packed weight, or a calibrated scale."""

    values: tuple[float, ...]
    dtype: str
    name: str = "written anew"
    working_bytes: float = 1.0

    def __call__(self, rows_RC: "torch.Tensor", *_: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return the values as a column, (number of values, 1)."""
        import torch

        from converters.checkpoint.dtypes import torch_dtype

        return (torch.tensor(self.values, dtype=torch_dtype(self.dtype)).view(-1, 1),)
