"""Rows of weights to rows of codes and scales; the numbers are made in `converters.numerics`."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.errors import UsageError
from converters.quant.scheme import Arithmetic, ScaleSearch

if TYPE_CHECKING:
    import torch

INT_GROUPS = (0, 32, 64, 128)


def scale_dtype(weight_dtype: str, arithmetic: Arithmetic) -> str:
    """Return the safetensors dtype of an FP8 or INT8 scale for weights of a safetensors dtype."""
    # a narrow weight has no room for the scale of a small row
    is_narrow = weight_dtype == "F16" and arithmetic is Arithmetic.FLOAT32
    return "F32" if is_narrow or arithmetic is Arithmetic.MODELOPT else weight_dtype


@dataclass(frozen=True, slots=True)
class QuantizeFp8Channel:
    """Rows to E4M3 codes and one scale per row; see `converters.numerics.fp8`."""

    arithmetic: Arithmetic
    name: str = "fp8 per channel"
    working_bytes: float = 5.0

    def scale_dtype(self, weight_dtype: str) -> str:
        """Return the dtype of the scales."""
        return scale_dtype(weight_dtype, self.arithmetic)

    def __call__(self, rows_RC: "torch.Tensor", *_: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return codes (R, C) and scales (R, 1)."""
        from converters.numerics.fp8 import quantize_channel

        return quantize_channel(rows_RC, self.arithmetic)


@dataclass(frozen=True, slots=True)
class QuantizeFp8Block:
    """Rows to E4M3 codes and one scale per block of rows and columns; blocks at the edges may be cut off.

    Attributes:
        inverse: the arithmetic of DeepSeek-V3, with fp32 scales; `arithmetic` then says nothing.
    """

    arithmetic: Arithmetic
    rows: int = 128
    columns: int = 128
    inverse: bool = False
    name: str = "fp8 per block"
    working_bytes: float = 9.0

    def scale_dtype(self, weight_dtype: str) -> str:
        """Return the dtype of the scales."""
        return "F32" if self.inverse else scale_dtype(weight_dtype, self.arithmetic)

    def __call__(self, rows_RC: "torch.Tensor", *_: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return codes (R, C) and scales (ceil(R / rows), ceil(C / columns)); the first row begins a block."""
        from converters.numerics.fp8 import quantize_block, quantize_block_inverse

        if self.inverse:
            return quantize_block_inverse(rows_RC, rows=self.rows, columns=self.columns)
        return quantize_block(rows_RC, self.arithmetic, rows=self.rows, columns=self.columns)


@dataclass(frozen=True, slots=True)
class QuantizeFp8Tensor:
    """Rows to E4M3 codes and one scale for all weights that share it."""

    arithmetic: Arithmetic
    name: str = "fp8 per tensor"
    working_bytes: float = 5.0

    def scale_dtype(self, weight_dtype: str) -> str:
        """Return the dtype of the scale."""
        return scale_dtype(weight_dtype, self.arithmetic)

    def __call__(self, rows_RC: "torch.Tensor", *beside: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return codes (R, C) and the scale (1, 1); beside: max|w| of all weights that share it, fp32 (1, 1)."""
        from converters.numerics.fp8 import quantize_tensor

        return quantize_tensor(rows_RC, beside[-1], self.arithmetic)


@dataclass(frozen=True, slots=True)
class QuantizeInt8:
    """Rows to int8 codes and one scale per row; see `converters.numerics.int8`."""

    arithmetic: Arithmetic
    name: str = "int8 per channel"
    working_bytes: float = 5.0

    def scale_dtype(self, weight_dtype: str) -> str:
        """Return the dtype of the scales."""
        return scale_dtype(weight_dtype, self.arithmetic)

    def __call__(self, rows_RC: "torch.Tensor", *_: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return codes (R, C) and scales (R, 1)."""
        from converters.numerics.int8 import quantize_int8

        return quantize_int8(rows_RC, self.arithmetic)


@dataclass(frozen=True, slots=True)
class QuantizeInt8Packed:
    """Rows to int8 codes, four to an int32, and one scale per row or per group of columns.

    Attributes:
        group: columns that share a scale; 0: the row.
    """

    arithmetic: Arithmetic
    group: int
    name: str = "int8 packed"
    working_bytes: float = 6.0

    def __post_init__(self) -> None:
        if self.group not in INT_GROUPS:
            raise UsageError("group size", expected=f"one of {', '.join(map(str, INT_GROUPS))}", found=str(self.group))
        if self.arithmetic is Arithmetic.MODELOPT:
            raise UsageError("arithmetic modelopt", expected="a format that modelopt writes", found="packed int8")

    def scale_dtype(self, weight_dtype: str) -> str:
        """Return the dtype of the scales."""
        return scale_dtype(weight_dtype, self.arithmetic)

    def __call__(self, rows_RC: "torch.Tensor", *_: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return words (R, ceil(C / 4)) and scales (R, C / group) or (R, 1)."""
        from converters.numerics.int8 import pack_int32, quantize_int8

        codes_RC, scale_RG = quantize_int8(rows_RC, self.arithmetic, self.group)
        return pack_int32(codes_RC), scale_RG


@dataclass(frozen=True, slots=True)
class QuantizeNvfp4:
    """Rows to E2M1 codes, two in a byte, with local and global scales; see `converters.numerics.nvfp4`."""

    arithmetic: Arithmetic
    search: ScaleSearch = ScaleSearch.NONE
    name: str = "nvfp4"

    @property
    def working_bytes(self) -> float:
        """Memory in use per source byte."""
        # buffers of three fp32 values for each weight; four, and half as much again along the groups, to search
        return 9.0 if self.search is ScaleSearch.NONE else 16.0

    def scale_dtype(self, weight_dtype: str) -> str:
        """Return the dtype of the local scales; the global one is F32."""
        return "F8_E4M3"

    def __call__(self, rows_RC: "torch.Tensor", *beside: "torch.Tensor") -> "tuple[torch.Tensor, ...]":
        """Return packed codes (R, C / 2), local scales (R, C / 16) and the global scale (1, 1).

        Args:
            rows_RC: weights.
            beside: max|w| of all weights that share the global scale, fp32 (1, 1).
        """
        from converters.numerics.nvfp4 import quantize_nvfp4

        return quantize_nvfp4(rows_RC, beside[-1], self.arithmetic, self.search)
