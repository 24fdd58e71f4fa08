"""Experts by fused kernels: gather, dequantization and SwiGLU in one launch, down with routing weights in another.

The same steps run on torch twins of the kernels, without a GPU, to be tested.

Shapes: T tokens, D hidden, K choices, S slots, P rows with padding, I intermediate.
"""

from dataclasses import dataclass
from typing import Any

import torch

from converters.config import Glm4MoeConfig
from runtime.moe.dispatcher import Slots
from runtime.moe.experts import LocalExperts
from runtime.moe.fused_inputs import FusedInputs, capability_of
from runtime.moe.fused_ops import FusedOps
from runtime.moe.layouts import ContiguousRows, MaskedRows, Rows, capacity
from runtime.moe.router import Router
from runtime.moe.workspace import Workspace

# rows of the smallest tile
_LEAST_BLOCK_M = 16
# tokens whose router logits need no matrix units
_ROUTER_ROWS = 16


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

    def logits(self, hidden_TD: torch.Tensor, router: Router, workspace: Workspace) -> torch.Tensor:
        """Return router logits (T, E) fp32 in the workspace; of a few tokens by a launch that widens what it reads."""
        if len(hidden_TD) > _ROUTER_ROWS or self.is_batch_invariant:
            return router.logits(hidden_TD, workspace)
        logits_TE = workspace.take("router_logits", (len(hidden_TD), len(router.weight)), torch.float32)
        return self.ops.router_logits(hidden_TD, router.weight, out=logits_TE)

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
        given = self._given(hidden_TD, slots, experts, workspace)
        if self._is_gemv(given):
            active_SI = self._up_gemv(given)
            self.ops.down_gemv(active_SI, slots.ids_TK, slots.weights_TK, experts.weights, out=out_TD)
            return
        self.ops.combine(self._values(given), slots.ids_TK, out=out_TD)

    def run_and_norm(
        self,
        hidden_TD: torch.Tensor,
        slots: Slots,
        experts: LocalExperts,
        workspace: Workspace,
        *,
        residual_TD: torch.Tensor,
        norm: tuple[torch.Tensor, float],
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Write weighted sums and the residual, rounded once, to out[0], and their norm to out[1].

        Args:
            hidden_TD: as for `run`, and so are slots, experts and workspace.
            residual_TD: added in fp32.
            norm: weight (D,) and eps.
            out: (T, D) each, of the residual's dtype.
        """
        given, weights = self._given(hidden_TD, slots, experts, workspace), experts.weights
        if self._is_gemv(given):
            active_SI = self._up_gemv(given)
            self.ops.down_gemv(active_SI, slots.ids_TK, slots.weights_TK, weights, residual_TH=residual_TD, out=out[0])
            self.ops.rms_norm(out[0], *norm, out=out[1])
            return
        self.ops.combine_norm(self._values(given), slots.ids_TK, residual_TD, *norm, out=out)

    def slot_results(
        self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace
    ) -> torch.Tensor:
        """Return unweighted results (S, D); see `GroupedExperts`."""
        values_SD = workspace.take("slots", (slots.num_slots, hidden_TD.shape[1]), hidden_TD.dtype).zero_()
        ones_TK = workspace.take("ones", tuple(slots.weights_TK.shape), torch.float32).fill_(1)
        self._multiply(self._given(hidden_TD, slots, experts, workspace), ones_TK, values_SD)
        return values_SD

    def _given(self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts, workspace: Workspace) -> "_Given":
        return _Given(hidden_TD, slots, experts, workspace, self._tiles(hidden_TD, slots, experts))

    def _is_gemv(self, given: "_Given") -> bool:
        return given.tiles.is_gemv and not self.is_masked and given.experts.round_inputs is None

    def _up_gemv(self, given: "_Given") -> torch.Tensor:
        shape = (given.slots.num_slots, given.experts.weights.intermediate_size)
        active_SI = given.workspace.take("activation", shape, given.hidden_TD.dtype)
        return self.ops.up_gemv(given.hidden_TD, given.slots.ids_TK, given.experts.weights, out=active_SI)

    def _values(self, given: "_Given") -> torch.Tensor:
        """Return each slot's weighted result (S, D), undefined where it is filtered."""
        shape = (given.slots.num_slots, given.hidden_TD.shape[1])
        values_SD = given.workspace.take("slots", shape, given.hidden_TD.dtype)
        self._multiply(given, given.slots.weights_TK, values_SD)
        return values_SD

    def _multiply(self, given: "_Given", weights_TK: torch.Tensor, out_SD: torch.Tensor) -> None:
        """Write each slot's result, times its weight; filtered slots keep what they hold."""
        tiles, experts, hidden_TD, dtype = given.tiles, given.experts, given.hidden_TD, given.hidden_TD.dtype
        rows = self._rows(given.slots, tiles.block_m, given.workspace)
        made = FusedInputs(self.ops, experts, rows, given.workspace)
        is_native = made.is_native(hidden_TD.device)
        active = made.room(dtype, writes_codes=tiles.can_write_codes)
        inputs = made.of_tokens(hidden_TD)
        self.ops.up(inputs, experts.weights, rows, active, tiles.up, native_fp4=is_native, rounded_to=dtype)
        inputs = made.of_activations(active)
        self.ops.down(inputs, experts.weights, rows, weights_TK, out_SD, tiles.down, native_fp4=is_native)

    def _tiles(self, hidden_TD: torch.Tensor, slots: Slots, experts: LocalExperts) -> Any:
        # numbers alone, but its package imports triton
        from runtime.kernels.moe.configs import choose

        weights = experts.weights
        return choose(
            weights.scheme,
            capability_of(hidden_TD.device),
            slots.rows_per_expert,
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


@dataclass(frozen=True, slots=True)
class _Given:
    """What one call works on, and the tiles that were chosen for it."""

    hidden_TD: torch.Tensor
    slots: Slots
    experts: LocalExperts
    workspace: Workspace
    tiles: Any
