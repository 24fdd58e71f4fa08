"""What a model once made of the same rows, in place of its weights: others are held against it and led by it.

Shapes: R rows, D hidden, E experts.
"""

from typing import Protocol

import torch

from runtime.model.norm import RMSNorm
from runtime.moe.router import Routing


class Replay(Protocol):
    """Values that were kept of a run over the same rows, on the device and in the dtype of compute.

    `first` and `stop` are rows of the run; there is no MTP layer among the layers.
    """

    def embedded(self, first: int, stop: int) -> torch.Tensor:
        """Return what the first layer was given (R, D)."""

    def attention(self, layer: int, first: int, stop: int) -> torch.Tensor:
        """Return attention's output (R, D) before the residual sum."""

    def mlp_norm(self, layer: int) -> RMSNorm:
        """Return the norm in front of the MLP."""

    def routing(self, layer: int, first: int, stop: int) -> Routing:
        """Return what the router of an MoE layer decided for R rows."""

    def bias(self, layer: int) -> torch.Tensor:
        """Return the correction bias (E,) fp32 of that router."""

    def mlp(self, layer: int, first: int, stop: int) -> torch.Tensor:
        """Return the MLP's output (R, D) before the residual sum."""

    def final(self, first: int, stop: int) -> torch.Tensor:
        """Return what stood behind the final norm (R, D)."""
