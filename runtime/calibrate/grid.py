"""The values that a scheme can store for one weight: the scales of plain rounding, and codes for columns.

Shapes: O rows (out features), I columns (in features), G groups of columns that share a scale.
"""

from dataclasses import dataclass

import torch

from converters.numerics.dequantize import E2M1_MAGNITUDES
from converters.numerics.int8 import pack_int32
from converters.numerics.nvfp4 import combined
from converters.quant.scheme import NVFP4_GROUP, Recipe
from converters.quant.storage import transform_of
from converters.transforms.quantize import QuantizeNvfp4

# schemes whose codes are chosen for given scales
GPTQ_SCHEMES = ("int8", "int8-weight-only", "nvfp4", "nvfp4-weight-only")
_LOWEST, _HIGHEST = -128, 127


@dataclass(frozen=True)
class Grid:
    """Codes of one weight; see `runtime.calibrate.gptq.Rounding`.

    Args:
        recipe: scheme, format, arithmetic and search.
        step_GO: what codes are multiplied with, fp32, a row per group of columns.
        group: columns that share a scale.
        scales: as they are stored, behind the codes.
        plain_OI: the codes of plain rounding: int8, or E2M1 as uint8.
        e2m1: value of each E2M1 code, fp32 (16,).
        bounds: the largest magnitudes that round to the codes 0 to 6, fp32 (7,).
    """

    recipe: Recipe
    step_GO: torch.Tensor
    group: int
    scales: tuple[torch.Tensor, ...]
    plain_OI: torch.Tensor
    e2m1: torch.Tensor
    bounds: torch.Tensor

    @classmethod
    def of(cls, weight_OI: torch.Tensor, largest_11: torch.Tensor, recipe: Recipe) -> "Grid":
        """Return the grid of plain rounding.

        Args:
            weight_OI: in the dtype it is stored in.
            largest_11: fp32, of all weights that share a per-tensor scale with it.
            recipe: of GPTQ_SCHEMES.
        """
        bounds = torch.tensor([0.25, _below(0.75), 1.25, _below(1.75), 2.5, _below(3.5), 5.0], device=weight_OI.device)
        e2m1 = torch.tensor([*E2M1_MAGNITUDES, *(-size for size in E2M1_MAGNITUDES)], device=weight_OI.device)
        stored, *scales = transform_of(recipe)(weight_OI, largest_11)
        if isinstance(transform_of(recipe), QuantizeNvfp4):
            plain_OI = torch.stack([stored & 0xF, stored >> 4], dim=2).flatten(1)
            step_OG = combined(scales[0], scales[1], recipe.arithmetic)
            return cls(recipe, step_OG.T.contiguous(), NVFP4_GROUP, tuple(scales), plain_OI, e2m1, bounds)
        if recipe.scheme == "int8-weight-only":
            stored = (stored.view(torch.uint8) ^ 0x80).view(torch.int8)[:, : weight_OI.shape[1]]
        group = weight_OI.shape[1] // scales[0].shape[1]
        return cls(recipe, scales[0].float().T.contiguous(), group, tuple(scales), stored, e2m1, bounds)

    @property
    def _is_int(self) -> bool:
        return self.plain_OI.dtype is torch.int8

    def encode(self, values_O: torch.Tensor, column: int) -> torch.Tensor:
        """Return the codes (O,) of fp32 values in a column: the nearest, ties to even."""
        scaled_O = values_O / self.step_GO[column // self.group]
        if self._is_int:
            return scaled_O.round().clamp(_LOWEST, _HIGHEST).to(torch.int8)
        # counts the bounds below: a tie goes to the even code, which is the lower one at every other bound
        size_O = torch.bucketize(scaled_O.abs(), self.bounds, out_int32=True)
        return ((scaled_O < 0).int() * 8 + size_O).to(torch.uint8)

    def decode(self, codes_O: torch.Tensor, column: int) -> torch.Tensor:
        """Return the fp32 values (O,) of codes in a column."""
        values_O = codes_O.float() if self._is_int else self.e2m1[codes_O.int()]
        return values_O * self.step_GO[column // self.group]

    def values(self, codes_OI: torch.Tensor) -> torch.Tensor:
        """Return the fp32 weight (O, I) of its codes."""
        values_OI = codes_OI.float() if self._is_int else self.e2m1[codes_OI.int()]
        return (values_OI.unflatten(1, (-1, self.group)) * self.step_GO.T.unsqueeze(2)).flatten(1)

    def stored(self, codes_OI: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return codes and scales in the form and order of the transform's results."""
        if not self._is_int:
            packed = codes_OI[:, 0::2] | (codes_OI[:, 1::2] << 4)
            return packed, *self.scales
        packed = pack_int32(codes_OI) if self.recipe.scheme == "int8-weight-only" else codes_OI
        return packed, *self.scales


def _below(value: float) -> float:
    """Return the next smaller fp32."""
    return float(torch.nextafter(torch.tensor(value), torch.zeros(())))
