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

    Grouped experts and their shared one allocate nothing once `warm_up` has been called: everything, the result too,
    lies in the workspace or where the caller has it go. Left are the two results of torch's `_grouped_mm`, what its
    operators need inside (`sort`; on the CPU also products, and those of two dtypes), and what an observer is told.
    Experts that run one after the other are the oracle, and no part of this.

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
            hidden_BTD: in the dtype of compute; may lie where the result goes.
            observer: told the routing.
            out_BTD: contiguous, takes the result, and is returned. None: of grouped experts the result lies in the
                workspace, and the next block that shares it writes there. So whoever calls adds it to the residual
                stream at once, or keeps a copy.
        """
        hidden_TD = hidden_BTD.flatten(0, 1)
        if self.backend is None:
            result_BTD = self._run_modules(hidden_TD, observer).view(hidden_BTD.shape)
            return result_BTD if out_BTD is None else out_BTD.copy_(result_BTD)
        if out_BTD is None:
            out_BTD = self._local[1].take("block", tuple(hidden_BTD.shape), hidden_BTD.dtype)
        self._run_grouped(hidden_TD, observer, out_BTD.view(hidden_TD.shape))
        return out_BTD

    def forward_and_norm(
        self,
        hidden_BTD: torch.Tensor,
        observer: RoutingObserver | None,
        residual_BTD: torch.Tensor,
        norm: RMSNorm,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return residual + block (B, T, D), and the norm of it that the next layer starts with.

        The fused kernels do both in their last launch, and add the residual before they round; elsewhere the norm's own
        launch follows.

        Args:
            hidden_BTD: as for `forward`, and so is the observer.
            residual_BTD: the stream, of the same shape and dtype.
            norm: of the next layer.
            out: contiguous, where both go, and what is returned. The stream goes through all layers, and what a block
                leaves in the workspace does not last as long: who owns the stream says where it lies.
        """
        if (
            not isinstance(self.backend, FusedExperts)
            or self.share is not None
            or not self._local[0].weights.num_shared
        ):
            return norm.add(residual_BTD, self(hidden_BTD, observer), out)
        local, workspace = self._local
        hidden_TD, residual_TD, *sums = (part.flatten(0, 1) for part in (hidden_BTD, residual_BTD, *out))
        slots = self._route(hidden_TD, observer)
        self.backend.run_and_norm(
            hidden_TD,
            slots,
            local,
            workspace,
            residual_TD=residual_TD,
            norm=(norm.weight, norm.eps),
            out=(sums[0], sums[1]),
        )
        return out

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

    def _run_modules(self, hidden_TD: torch.Tensor, observer: RoutingObserver | None) -> torch.Tensor:
        routing = self.gate(hidden_TD)
        if observer is not None:
            observer(routing)
        ids_TK, weights_TK = routing.topk_ids_TK, routing.topk_weights_TK
        experts = list(cast(Sequence[GatedMlp], self.experts))
        if self.share is not None:
            slots = slots_of(ids_TK, weights_TK, len(experts), int(self._shares_shared))
            ids_TK, weights_TK = self.share.local_slots(slots).ids_TK, slots.weights_TK
            all_experts = [*experts, self.shared_experts]
            experts = [all_experts[expert] for expert in self.share.held]
        dispatched = dispatch(hidden_TD, ids_TK, len(experts))
        rows_RD = vanilla_experts(dispatched.rows_RD, dispatched.rows_per_expert_E, experts)
        out_TD = combine(rows_RD, weights_TK, dispatched).to(hidden_TD.dtype)
        if not self._shares_shared:
            out_TD[self._tokens].add_(self.shared_experts(hidden_TD[self._tokens]))
        return out_TD

    def _run_grouped(self, hidden_TD: torch.Tensor, observer: RoutingObserver | None, out_TD: torch.Tensor) -> None:
        assert self.backend is not None, "experts are modules"
        local, workspace = self._local
        shared_TD = None
        if not local.weights.num_shared and not self._shares_shared:
            # before anything is written to where the tokens may lie
            mine_TD = hidden_TD[self._tokens]
            shared_TD = workspace.take("shared", tuple(mine_TD.shape), mine_TD.dtype)
            self.shared_experts.forward_into(mine_TD, workspace, shared_TD)
        self.backend.run(hidden_TD, self._route(hidden_TD, observer), local, workspace, out_TD)
        if shared_TD is not None:
            out_TD[self._tokens].add_(shared_TD)

    def _route(self, hidden_TD: torch.Tensor, observer: RoutingObserver | None) -> Slots:
        """Return the slots of this rank, and tell of the routing of all."""
        local, workspace = self._local
        num_shared = int(self._shares_shared or local.weights.num_shared)
        if isinstance(self.backend, FusedExperts):
            logits_TE = self.backend.logits(hidden_TD, self.gate, workspace)
            slots = self.backend.route(logits_TE, self.gate.bias_E, self.gate.config, num_shared, workspace)
        else:
            logits_TE = self.gate.logits(hidden_TD, workspace)
            ids_TK, weights_TK = self.gate.choose(logits_TE, workspace)
            slots = slots_of(ids_TK, weights_TK, len(self.experts), num_shared, workspace)
        if observer is not None:
            top_k = self.gate.config.num_experts_per_tok
            # all of it may lie in the workspace, and the observer may keep what it is told
            ids_TK, weights_TK = slots.ids_TK[:, :top_k].to(torch.int64), slots.weights_TK[:, :top_k].clone()
            observer(Routing(self.gate.layer, logits_TE.clone(), ids_TK, weights_TK))
        return slots if self.share is None else self.share.local_slots(slots, workspace)

    @property
    def _shares_shared(self) -> bool:
        """Whether the shared expert is one of those that ranks share."""
        return self.share is not None and len(self.share.experts.num_copies_E) > len(self.experts)

    @property
    def _tokens(self) -> slice:
        """Tokens to which this rank adds a shared expert that is none of the grouped ones: each has one such rank."""
        return slice(None) if self.share is None else self.share.tokens
