"""What comparing a tensor adds up, block by block: wrong values, wrong scales, errors."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from converters.quant.certificate import TensorFigures, rounded

if TYPE_CHECKING:
    from converters.quant.judge import Pair


@dataclass(slots=True)
class Tally:
    """Sums over the blocks of a tensor. Sums of rows are added exactly, so that no cut into blocks matters."""

    outside: int = 0
    first: str = ""
    scales: int = 0
    wrong_scales: int = 0
    first_scale: str = ""
    clipped: int = 0
    amax: float = 0.0
    sums_R3: list[torch.Tensor] = field(default_factory=list)

    def add_outside(self, outside_RC: torch.Tensor, describe: Callable[[int, int], str]) -> None:
        """Count values that are wrong; `describe` tells of the first, by its row and column."""
        count = int(outside_RC.sum())
        if count and not self.outside:
            row, column = divmod(int(outside_RC.flatten().int().argmax()), outside_RC.shape[1])
            self.first = describe(row, column)
        self.outside += count

    def add_scales(self, wrong_SG: torch.Tensor, describe: Callable[[int, int], str]) -> None:
        """Count scales, and those that are wrong; `describe` tells of the first, by its row and column."""
        count = int(wrong_SG.sum())
        if count and not self.wrong_scales:
            row, column = divmod(int(wrong_SG.flatten().int().argmax()), wrong_SG.shape[1])
            self.first_scale = describe(row, column)
        self.wrong_scales += count
        self.scales += wrong_SG.numel()

    def figures(self, pair: "Pair", division: str, tensor_scale: float | None) -> TensorFigures:
        """Return the figures of a pair whose blocks are all added.

        Args:
            pair: what was compared.
            division: the rounding of quotients that was assumed; empty where none was.
            tensor_scale: of the whole tensor, if there is one.
        """
        squares, errors, products = (
            (math.fsum(column) for column in torch.cat(self.sums_R3).T.tolist()) if self.sums_R3 else (1.0, 0.0, 1.0)
        )
        relative = math.sqrt(errors / squares) if squares > 0 else (math.inf if errors else squares)
        return TensorFigures(
            tensor=pair.tensor.name,
            relation=pair.relation,
            scheme=pair.scheme,
            division=division,
            elements=pair.tensor.numel,
            outside=self.outside,
            first=self.first,
            scales=self.scales,
            wrong_scales=self.wrong_scales,
            first_scale=self.first_scale,
            relative_error=rounded(relative),
            slope=rounded(products / squares) if squares > 0 else 1.0,
            clipped=rounded(self.clipped / max(1, pair.tensor.numel)),
            amax=self.amax,
            tensor_scale=tensor_scale,
        )
