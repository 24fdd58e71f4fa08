"""The MoE block: route, dispatch, run the experts, combine, add the shared expert.

Shapes: B batch, T tokens (here all tokens of the batch), D hidden.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import nn

from converters.config import Glm4MoeConfig
from runtime.model.mlp import GatedMlp
from runtime.model.norm import RMSNorm
from runtime.moe.batched import BatchedExperts, warm_up_tokens
from runtime.moe.dispatcher import Slots, combine, dispatch, slots_of
from runtime.moe.expert_map import ExpertShare
from runtime.moe.experts import GroupedExperts, LocalExperts, vanilla_experts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
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
        share: the experts of this rank, if there are others: the block returns a part, and parts of all ranks add up.
    """

    def __init__(
        self, config: Glm4MoeConfig, layer: int, plan: MoePlan = VANILLA_PLAN, share: ExpertShare | None = None
    ) -> None:
        super().__init__()
        self.share = share
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
            if not self._shares_shared:
                self._add_shared(hidden_TD, routed_TD)
            return routed_TD.view(hidden_BTD.shape)
        out_BTD = torch.empty_like(hidden_BTD) if out_BTD is None else out_BTD
        self._run_grouped(hidden_TD, observer, out_BTD.view(hidden_TD.shape))
        return out_BTD

    def forward_and_norm(
        self, hidden_BTD: torch.Tensor, observer: RoutingObserver | None, residual_BTD: torch.Tensor, norm: RMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residual + block (B, T, D), and the norm of it that the next layer starts with.

        The fused kernels do both in their last launch, and add the residual before they round; elsewhere the norm's own
        launch follows.
        """
        if (
            not isinstance(self.backend, FusedExperts)
            or self.share is not None
            or not self._local[0].weights.num_shared
        ):
            return norm.add(residual_BTD, self(hidden_BTD, observer))
        local, workspace = self._local
        hidden_TD, residual_TD = hidden_BTD.flatten(0, 1), residual_BTD.flatten(0, 1)
        out = torch.empty_like(residual_TD), torch.empty_like(residual_TD)
        slots = self._route(hidden_TD, observer)
        self.backend.run_and_norm(
            hidden_TD, slots, local, workspace, residual_TD=residual_TD, norm=(norm.weight, norm.eps), out=out
        )
        return out[0].view(residual_BTD.shape), out[1].view(residual_BTD.shape)

    def warm_up(self, num_tokens: int, dtype: torch.dtype) -> None:
        """Take all the workspace that up to `num_tokens` of a dtype at a time need; grouped experts only."""
        assert self.local is not None, "nothing is loaded"
        weights = self.local.weights
        num_choices = self.gate.config.num_experts_per_tok + int(self._shares_shared or weights.num_shared)
        for size in warm_up_tokens(num_tokens, weights.num_experts, num_choices):
            self(torch.zeros(1, size, weights.hidden_size, dtype=dtype, device=weights.device), None)

    @property
    def _local(self) -> tuple[LocalExperts, Workspace]:
        assert self.local is not None, "no experts are loaded"
        assert self.workspace is not None, "no experts are loaded"
        return self.local, self.workspace

    def _run_modules(self, hidden_TD: torch.Tensor, routing: Routing) -> torch.Tensor:
        ids_TK, weights_TK = routing.topk_ids_TK, routing.topk_weights_TK
        experts = list(cast(Sequence[GatedMlp], self.experts))
        if self.share is not None:
            slots = slots_of(ids_TK, weights_TK, len(experts), int(self._shares_shared))
            ids_TK, weights_TK = self.share.local_slots(slots).ids_TK, slots.weights_TK
            all_experts = [*experts, self.shared_experts]
            experts = [all_experts[expert] for expert in self.share.held]
        dispatched = dispatch(hidden_TD, ids_TK, len(experts))
        rows_RD = vanilla_experts(dispatched.rows_RD, dispatched.rows_per_expert_E, experts)
        return combine(rows_RD, weights_TK, dispatched).to(hidden_TD.dtype)

    def _run_grouped(self, hidden_TD: torch.Tensor, observer: RoutingObserver | None, out_TD: torch.Tensor) -> None:
        assert self.backend is not None, "experts are modules"
        local, workspace = self._local
        self.backend.run(hidden_TD, self._route(hidden_TD, observer), local, workspace, out_TD)
        if not local.weights.num_shared and not self._shares_shared:
            self._add_shared(hidden_TD, out_TD)

    def _route(self, hidden_TD: torch.Tensor, observer: RoutingObserver | None) -> Slots:
        """Return the slots of this rank, and tell of the routing of all."""
        local, workspace = self._local
        num_shared = int(self._shares_shared or local.weights.num_shared)
        if isinstance(self.backend, FusedExperts):
            logits_TE = self.backend.logits(hidden_TD, self.gate, workspace)
            slots = self.backend.route(logits_TE, self.gate.bias_E, self.gate.config, num_shared, workspace)
        else:
            logits_TE = self.gate.logits(hidden_TD, workspace)
            ids_TK, weights_TK = self.gate.choose(logits_TE)
            slots = slots_of(ids_TK, weights_TK, len(self.experts), num_shared)
        if observer is not None:
            top_k = self.gate.config.num_experts_per_tok
            # all of it may lie in the workspace, and the observer may keep what it is told
            ids_TK, weights_TK = slots.ids_TK[:, :top_k].to(torch.int64), slots.weights_TK[:, :top_k].clone()
            observer(Routing(self.gate.layer, logits_TE.clone(), ids_TK, weights_TK))
        return slots if self.share is None else self.share.local_slots(slots)

    @property
    def _shares_shared(self) -> bool:
        """Whether the shared expert is one of those that ranks share."""
        return self.share is not None and len(self.share.experts.num_copies_E) > len(self.experts)

    def _add_shared(self, hidden_TD: torch.Tensor, out_TD: torch.Tensor) -> None:
        """Add the shared expert, for each token in one rank alone."""
        mine = slice(None) if self.share is None else self.share.tokens
        out_TD[mine].add_(self.shared_experts(hidden_TD[mine]))
