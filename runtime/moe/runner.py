"""The MoE block: route, dispatch, run the experts, combine, add the shared expert.

Shapes: B batch, T tokens (here all tokens of the batch), D hidden.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from converters.config import Glm4MoeConfig
from runtime.model.mlp import GatedMlp
from runtime.moe.batched import BatchedExperts, warm_up_tokens
from runtime.moe.dispatcher import combine, dispatch, slots_of
from runtime.moe.experts import GroupedExperts, LocalExperts, vanilla_experts
from runtime.moe.fused import FusedExperts, FusedOps
from runtime.moe.grouped import CutlassExperts
from runtime.moe.plan import BATCHED, CUTLASS, VANILLA, VANILLA_PLAN, MoePlan
from runtime.moe.router import Router, Routing, RoutingObserver
from runtime.moe.workspace import Workspace


def grouped_experts(plan: MoePlan) -> GroupedExperts | None:
    """Return what runs all experts of a layer at once; None: they run one after the other."""
    if plan.backend == VANILLA:
        return None
    if plan.backend == BATCHED:
        return BatchedExperts(is_batch_invariant=plan.is_batch_invariant)
    if plan.backend == CUTLASS:
        return CutlassExperts()
    return FusedExperts(FusedOps.of_kernels(), is_batch_invariant=plan.is_batch_invariant)


class MoE(nn.Module):
    """Routed experts plus a shared one that sees every token and is neither gated nor scaled.

    Args:
        config: the model.
        layer: index; the MTP layer's is num_hidden_layers.
        plan: what multiplies the experts. In grouped layout they come through `load`, and the modules that bear their
            names stay empty.
    """

    def __init__(self, config: Glm4MoeConfig, layer: int, plan: MoePlan = VANILLA_PLAN) -> None:
        super().__init__()
        self.gate = Router(config, layer, is_batch_invariant=plan.is_batch_invariant)
        self.experts = nn.ModuleList(
            GatedMlp(config.hidden_size, config.moe_intermediate_size) for _ in range(config.n_routed_experts)
        )
        self.shared_experts = GatedMlp(config.hidden_size, config.shared_intermediate_size)
        self.backend = grouped_experts(plan)
        self.local: LocalExperts | None = None
        self.workspace: Workspace | None = None

    def load(self, local: LocalExperts, workspace: Workspace) -> None:
        """Take experts in grouped layout, and a workspace that other layers may use as well."""
        assert self.backend is not None, "experts are modules"
        self.local, self.workspace = local, workspace

    def forward(
        self, hidden_BTD: torch.Tensor, observer: RoutingObserver | None, out_BTD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return (B, T, D); routed results are weighted and summed in fp32 and rounded once.

        A fused shared expert is part of that sum, one of its own is rounded and added behind it.

        Args:
            hidden_BTD: in the dtype of compute.
            observer: told the routing.
            out_BTD: takes the result of grouped experts; None: a new tensor.
        """
        hidden_TD = hidden_BTD.flatten(0, 1)
        if self.backend is None:
            routing = self.gate(hidden_TD)
            if observer is not None:
                observer(routing)
            routed_TD = self._run_modules(hidden_TD, routing)
            return (routed_TD + self.shared_experts(hidden_TD)).view(hidden_BTD.shape)
        out_BTD = torch.empty_like(hidden_BTD) if out_BTD is None else out_BTD
        self._run_grouped(hidden_TD, observer, out_BTD.view(hidden_TD.shape))
        return out_BTD

    def warm_up(self, num_tokens: int, dtype: torch.dtype) -> None:
        """Take all the workspace that up to `num_tokens` of a dtype at a time need; grouped experts only."""
        assert self.local is not None, "nothing is loaded"
        weights = self.local.weights
        num_choices = self.gate.config.num_experts_per_tok + weights.num_shared
        for size in warm_up_tokens(num_tokens, weights.num_experts, num_choices):
            self(torch.zeros(1, size, weights.hidden_size, dtype=dtype, device=weights.device), None)

    def _run_modules(self, hidden_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        dispatched = dispatch(hidden_TD, routing.topk_ids_TK, len(self.experts))
        experts = cast(Sequence[GatedMlp], self.experts)
        rows_RD = vanilla_experts(dispatched.rows_RD, dispatched.rows_per_expert_E, experts)
        return combine(rows_RD, routing.topk_weights_TK, dispatched).to(hidden_TD.dtype)

    def _run_grouped(self, hidden_TD: torch.Tensor, observer: RoutingObserver | None, out_TD: torch.Tensor) -> None:
        assert self.backend is not None, "experts are modules"
        assert self.local is not None, "no experts are loaded"
        assert self.workspace is not None, "no experts are loaded"
        num_shared = self.local.weights.num_shared
        logits_TE = self.gate.logits(hidden_TD)
        if isinstance(self.backend, FusedExperts):
            slots = self.backend.route(logits_TE, self.gate.bias_E, self.gate.config, num_shared, self.workspace)
        else:
            ids_TK, weights_TK = self.gate.choose(logits_TE)
            slots = slots_of(ids_TK, weights_TK, len(self.experts), num_shared)
        if observer is not None:
            top_k = self.gate.config.num_experts_per_tok
            # the slots may lie in the workspace, and the observer may keep what it is told
            ids_TK, weights_TK = slots.ids_TK[:, :top_k].to(torch.int64), slots.weights_TK[:, :top_k].clone()
            observer(Routing(self.gate.layer, logits_TE, ids_TK, weights_TK))
        self.backend.run(hidden_TD, slots, self.local, self.workspace, out_TD)
        if not num_shared:
            out_TD += self.shared_experts(hidden_TD)
