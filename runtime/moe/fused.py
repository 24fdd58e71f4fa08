"""Experts by fused kernels: gather, dequantization and SwiGLU in one launch, down with routing weights in another.

The same steps run on torch twins of the kernels, without a GPU, to be tested.

Shapes: T tokens, D hidden, K choices, S slots, P rows with padding, I intermediate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from converters.config import Glm4MoeConfig
from runtime.moe.dispatcher import Slots
from runtime.moe.experts import LocalExperts
from runtime.moe.inputs import INPUT_GROUP, Inputs, QuantizedRows
from runtime.moe.layouts import ContiguousRows, MaskedRows, Rows, capacity
from runtime.moe.weights import ExpertScheme
from runtime.moe.workspace import Workspace

_UNKNOWN_CAPABILITY = 90
# rows of the smallest tile
_LEAST_BLOCK_M = 16


@dataclass(frozen=True, slots=True)
class FusedOps:
    """The steps, as kernels or as their twins; signatures are those of `runtime.kernels.moe`."""

    route: Callable[..., tuple[torch.Tensor, torch.Tensor]]
    build_rows: Callable[..., ContiguousRows]
    build_masked_rows: Callable[..., MaskedRows]
    quantize_rows: Callable[..., QuantizedRows]
    up: Callable[..., Inputs]
    down: Callable[..., torch.Tensor]
    up_gemv: Callable[..., torch.Tensor]
    down_gemv: Callable[..., torch.Tensor]
    combine: Callable[..., torch.Tensor]

    @classmethod
    def of_kernels(cls) -> "FusedOps":
        """Return the Triton kernels."""
        from runtime.kernels.moe import build_rows, combine, down, gemv, quantize_rows, route, up

        return cls._of(build_rows, combine, down, gemv, quantize_rows, route, up)

    @classmethod
    def of_twins(cls) -> "FusedOps":
        """Return what the kernels are held against."""
        from runtime.kernels.twins import build_rows, combine, down, gemv, quantize_rows, route, up

        return cls._of(build_rows, combine, down, gemv, quantize_rows, route, up)

    @classmethod
    def _of(
        cls, build_rows: Any, combine: Any, down: Any, gemv: Any, quantize_rows: Any, route: Any, up: Any
    ) -> "FusedOps":
        return cls(
            route.route,
            build_rows.build_rows,
            build_rows.build_masked_rows,
            quantize_rows.quantize_rows,
            up.up,
            down.down,
            gemv.up_gemv,
            gemv.down_gemv,
            combine.combine,
        )


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """A few launches for a layer: two for a handful of tokens, else five or six.

    Args:
        ops: kernels or twins.
        is_batch_invariant: the same tiles for every number of tokens.
        is_masked: give each expert room for all tokens, as a dispatcher that receives rows from other ranks does.
    """

    ops: FusedOps
    is_batch_invariant: bool = False
    is_masked: bool = False

    def route(
        self,
        router_logits_TE: torch.Tensor,
        expert_bias_E: torch.Tensor,
        config: Glm4MoeConfig,
        num_shared: int,
        workspace: Workspace,
    ) -> Slots:
        """Return the slots of logits (T, E) fp32, a fused shared expert as the last of each token.

        They lie in the workspace, until the next layer's are routed.
        """
        shape = (len(router_logits_TE), config.num_experts_per_tok + num_shared)
        out = workspace.take("ids", shape, torch.int32), workspace.take("routing_weights", shape, torch.float32)
        ids_TK, weights_TK = self.ops.route(router_logits_TE, expert_bias_E, config, num_shared=num_shared, out=out)
        return Slots(ids_TK, weights_TK, config.n_routed_experts + num_shared, num_shared)

    def run(
        self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace, out_TD: torch.Tensor
    ) -> None:
        """Write weighted sums to out (T, D), rounded once; see `GroupedExperts`."""
        tiles = self._tiles(hidden_TD, slots, experts)
        if tiles.is_gemv and not self.is_masked and experts.round_inputs is None:
            shape = (slots.num_slots, experts.weights.intermediate_size)
            active_SI = workspace.take("activation", shape, hidden_TD.dtype)
            self.ops.up_gemv(hidden_TD, slots.ids_TK, experts.weights, out=active_SI)
            self.ops.down_gemv(active_SI, slots.ids_TK, slots.weights_TK, experts.weights, out=out_TD)
            return
        values_SD = workspace.take("slots", (slots.num_slots, hidden_TD.shape[1]), hidden_TD.dtype)
        self._multiply(hidden_TD, slots, slots.weights_TK, experts, workspace, values_SD)
        self.ops.combine(values_SD, slots.ids_TK, out=out_TD)

    def slot_results(
        self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace
    ) -> torch.Tensor:
        """Return unweighted results (S, D); see `GroupedExperts`."""
        values_SD = workspace.take("slots", (slots.num_slots, hidden_TD.shape[1]), hidden_TD.dtype).zero_()
        ones_TK = workspace.take("ones", tuple(slots.weights_TK.shape), torch.float32).fill_(1)
        self._multiply(hidden_TD, slots, ones_TK, experts, workspace, values_SD)
        return values_SD

    def _multiply(
        self,
        hidden_TD: torch.Tensor,
        slots: Slots,
        weights_TK: torch.Tensor,
        experts: LocalExperts,
        workspace: Workspace,
        out_SD: torch.Tensor,
    ) -> None:
        """Write each slot's result, times its weight; filtered slots keep what they hold."""
        weights, tiles = experts.weights, self._tiles(hidden_TD, slots, experts)
        rows = self._rows(slots, tiles.block_m, workspace)
        slots_P = rows.slots_P if isinstance(rows, ContiguousRows) else rows.slots
        active_PI = workspace.take("activation", (slots_P.numel(), weights.intermediate_size), hidden_TD.dtype)
        inputs = self._rounded(hidden_TD, experts, experts.round_inputs, None, workspace)
        self.ops.up(inputs, weights, rows, active_PI, tiles.up)
        inputs = self._rounded(active_PI, experts, experts.round_activations, slots_P, workspace)
        self.ops.down(inputs, weights, rows, weights_TK, out_SD, tiles.down)

    def _tiles(self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts) -> Any:
        # numbers alone, but its package imports triton
        from runtime.kernels.moe.configs import choose

        weights, num_routed = experts.weights, slots.num_experts - slots.num_shared
        return choose(
            weights.scheme,
            capability_of(hidden_TD.device),
            len(hidden_TD) * (slots.num_choices - slots.num_shared) / num_routed,
            hidden_size=weights.hidden_size,
            intermediate_size=weights.intermediate_size,
            is_quantized=experts.multiplies_codes,
            batch_invariant=self.is_batch_invariant,
        )

    def _rows(self, slots: Slots, block_m: int, workspace: Workspace) -> Rows:
        # numbers alone, as in `_tiles`
        from runtime.kernels.moe.configs import num_counts

        num_slots, num_experts = slots.num_slots, slots.num_experts
        positions_S = workspace.take("positions", (num_slots,), torch.int32)
        scratch = workspace.take("run_counts", (num_counts(num_slots, num_experts),), torch.int32)
        if self.is_masked:
            num_tokens = len(slots.ids_TK)
            masked = MaskedRows(
                workspace.take("row_slots", (num_experts, num_tokens), torch.int32),
                workspace.take("counts", (num_experts,), torch.int32),
                positions_S,
            )
            return self.ops.build_masked_rows(slots.ids_TK, num_experts, num_tokens, out=masked, scratch=scratch)
        num_rows = capacity(num_slots, num_experts, block_m)
        # more tokens come in larger blocks, of which there are fewer: one warm-up is to take enough for all
        max_blocks = capacity(num_slots, num_experts, _LEAST_BLOCK_M) // _LEAST_BLOCK_M
        rows = ContiguousRows(
            workspace.take("row_slots", (num_rows,), torch.int32),
            workspace.take("blocks", (max_blocks,), torch.int32)[: num_rows // block_m],
            workspace.take("num_blocks", (1,), torch.int32),
            block_m,
            positions_S,
        )
        return self.ops.build_rows(
            slots.ids_TK, num_experts, block_m, num_shared=slots.num_shared, out=rows, scratch=scratch
        )

    def _rounded(
        self,
        values_RK: torch.Tensor,
        experts: LocalExperts,
        rounding: Callable[[torch.Tensor], torch.Tensor] | None,
        slots_P: torch.Tensor | None,
        workspace: Workspace,
    ) -> Inputs:
        """Return inputs as they are, as codes if these are multiplied, or as the values of codes."""
        if rounding is None:
            return values_RK
        if not experts.multiplies_codes:
            return rounding(values_RK)
        scheme, (num_rows, num_columns) = experts.weights.scheme, values_RK.shape
        num_groups = -(-num_columns // INPUT_GROUP) if scheme is ExpertScheme.FP8_BLOCK else 1
        codes_RK = workspace.take("codes", (num_rows, num_columns), scheme.code_dtype)
        scales_RG = workspace.take("scales", (num_rows, num_groups), torch.float32)
        return self.ops.quantize_rows(values_RK, QuantizedRows(codes_RK, scales_RG), slots_P)


def capability_of(device: torch.device) -> int:
    """Return ten times the compute capability of a GPU; of the CPU, what the kernels are mainly for."""
    if device.type != "cuda":
        return _UNKNOWN_CAPABILITY
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
