"""The steps of fused experts, as kernels or as the twins that these are held against."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from runtime.moe.inputs import Inputs, QuantizedRows
from runtime.moe.layouts import ContiguousRows, MaskedRows


@dataclass(frozen=True, slots=True)
class FusedOps:
    """The steps; signatures are those of `runtime.kernels.moe`, and of `runtime.kernels.ops` for the norm."""

    router_logits: Callable[..., torch.Tensor]
    route: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    build_rows: Callable[..., ContiguousRows]
    build_masked_rows: Callable[..., MaskedRows]
    quantize_rows: Callable[..., QuantizedRows]
    quantize_fp4_rows: Callable[..., QuantizedRows]
    up: Callable[..., Inputs]
    down: Callable[..., torch.Tensor]
    up_gemv: Callable[..., torch.Tensor]
    down_gemv: Callable[..., torch.Tensor]
    combine: Callable[..., torch.Tensor]
    combine_norm: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    rms_norm: Callable[..., torch.Tensor]

    @classmethod
    def of_kernels(cls) -> "FusedOps":
        """Return the Triton kernels."""
        from runtime.kernels.moe import (
            build_rows,
            combine,
            down,
            gemv,
            quantize_fp4,
            quantize_rows,
            route,
            router_logits,
            up,
        )
        from runtime.kernels.ops import rms_norm

        return cls._of(build_rows, combine, down, gemv, quantize_fp4, quantize_rows, route, up, rms_norm, router_logits)

    @classmethod
    def of_twins(cls) -> "FusedOps":
        """Return what the kernels are held against."""
        from runtime.kernels.twins import (
            build_rows,
            combine,
            down,
            gemv,
            quantize_fp4,
            quantize_rows,
            rms_norm,
            route,
            router_logits,
            up,
        )

        return cls._of(build_rows, combine, down, gemv, quantize_fp4, quantize_rows, route, up, rms_norm, router_logits)

    @classmethod
    def _of(cls, *modules: Any) -> "FusedOps":
        build_rows, combine, down, gemv, quantize_fp4, quantize_rows, route, up, rms_norm, router_logits = modules
        return cls(
            router_logits.router_logits,
            route.route,
            build_rows.build_rows,
            build_rows.build_masked_rows,
            quantize_rows.quantize_rows,
            quantize_fp4.quantize_fp4_rows,
            up.up,
            down.down,
            gemv.up_gemv,
            gemv.down_gemv,
            combine.combine,
            combine.combine_norm,
            rms_norm.rms_norm,
        )
