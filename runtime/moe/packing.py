"""Checkpoint tensors into grouped layout, one at a time: no layer is ever held twice.

Shapes: E experts, the shared one included, O rows and I columns of one weight.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import torch

from converters.errors import InputError
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme, ExpertWeights, Packed


class Matrix(IntEnum):
    """A weight of an expert; the number is its place in each pair of interleaved rows."""

    GATE = 0
    UP = 1
    DOWN = 2


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of a layer's experts; see `ExpertWeights`."""

    num_routed: int
    num_shared: int
    hidden_size: int
    intermediate_size: int

    @property
    def num_experts(self) -> int:
        """The shared one included."""
        return self.num_routed + self.num_shared


@dataclass(slots=True)
class ExpertPacker:
    """Takes a layer's weights in any order; memory is taken with the first.

    Args:
        scheme: of all of them.
        sizes: of the layer.
        device: where the result lies.
    """

    scheme: ExpertScheme
    sizes: Sizes
    device: torch.device
    _up: Packed | None = None
    _down: Packed | None = None
    _seen: set[tuple[int, Matrix]] = field(default_factory=set)

    def put(self, expert: int, matrix: Matrix, codes_OI: torch.Tensor, *scales: torch.Tensor) -> None:
        """Copy one weight to its place.

        Args:
            expert: the shared one is the last.
            matrix: which of its weights.
            codes_OI: (O, I), NVFP4 (O, I / 2); values are rounded to the scheme's dtype.
            scales: none for values; one per row or a single one; one per block; NVFP4: local scales (O, I / 16), and
                what multiplies them.
        Raises:
            InputError: gate and up of an expert have different global scales.
        """
        assert (expert, matrix) not in self._seen, (expert, matrix)
        packed = self._matrix(matrix)
        _place(packed.codes[expert], matrix).copy_(codes_OI)
        if packed.scales is not None:
            self._put_scales(packed.scales[expert], matrix, scales[0])
        if packed.global_scale is not None:
            self._put_global(packed.global_scale, expert, matrix, scales[1])
        self._seen.add((expert, matrix))

    @property
    def is_complete(self) -> bool:
        """Whether every weight is there."""
        return len(self._seen) == len(Matrix) * self.sizes.num_experts

    def weights(self) -> ExpertWeights:
        """Return the layer's experts, once all of them are there."""
        assert self.is_complete, len(self._seen)
        up, down, sizes = self._matrix(Matrix.UP), self._matrix(Matrix.DOWN), self.sizes
        return ExpertWeights(
            self.scheme, up, down, sizes.num_routed, sizes.num_shared, sizes.hidden_size, sizes.intermediate_size
        )

    def _matrix(self, matrix: Matrix) -> Packed:
        sizes = self.sizes
        if matrix is Matrix.DOWN:
            if self._down is None:
                self._down = self._empty(sizes.hidden_size, sizes.intermediate_size, is_up=False)
            return self._down
        if self._up is None:
            self._up = self._empty(2 * sizes.intermediate_size, sizes.hidden_size, is_up=True)
        return self._up

    def _empty(self, num_rows: int, num_columns: int, *, is_up: bool) -> Packed:
        num_experts, scheme = self.sizes.num_experts, self.scheme
        width = num_columns // 2 if scheme is ExpertScheme.NVFP4 else num_columns
        codes = torch.empty(num_experts, num_rows, width, dtype=scheme.code_dtype, device=self.device)
        if scheme.is_plain:
            return Packed(codes)
        if scheme is ExpertScheme.NVFP4:
            shape = (num_experts, num_rows, num_columns // GROUP)
            scales = torch.empty(shape, dtype=torch.float8_e4m3fn, device=self.device)
            return Packed(codes, scales, torch.empty(num_experts, device=self.device))
        grid: tuple[int, ...] = (num_rows,)
        if scheme is ExpertScheme.FP8_BLOCK:
            kinds = (2, -(-(num_rows // 2) // BLOCK)) if is_up else (-(-num_rows // BLOCK),)
            grid = (*kinds, -(-num_columns // BLOCK))
        return Packed(codes, torch.empty(num_experts, *grid, device=self.device))

    def _put_scales(self, found: torch.Tensor, matrix: Matrix, scales: torch.Tensor) -> None:
        match self.scheme:
            case ExpertScheme.NVFP4:
                _place(found, matrix).copy_(scales)
            case ExpertScheme.FP8_BLOCK:
                (found if matrix is Matrix.DOWN else found[matrix]).copy_(scales)
            case _:
                # one for the whole weight is one for each row
                _place(found, matrix).copy_(scales.flatten())

    def _put_global(self, found_E: torch.Tensor, expert: int, matrix: Matrix, value: torch.Tensor) -> None:
        partner = {Matrix.GATE: Matrix.UP, Matrix.UP: Matrix.GATE}.get(matrix)
        value = value.flatten()[0].to(found_E)
        if partner is not None and (expert, partner) in self._seen and not torch.equal(found_E[expert], value):
            raise InputError(
                f"expert {expert}",
                expected="one global scale for gate and up",
                found=f"{float(found_E[expert])} and {float(value)}",
                next_step="Use --moe-backend vanilla.",
            )
        found_E[expert] = value


def _place(rows: torch.Tensor, matrix: Matrix) -> torch.Tensor:
    """Return the rows of a weight among those of its expert."""
    return rows if matrix is Matrix.DOWN else rows[matrix::2]
