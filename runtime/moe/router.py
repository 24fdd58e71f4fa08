"""Which experts a token goes to, and with what weights.

Shapes: T tokens, D hidden, E experts, K experts per token, N groups, M = E / N experts per group. Everything is fp32: a
bf16 router changes the choice for about 3 % of the tokens of a real model.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from converters.config import Glm4MoeConfig
from runtime.model.linear import unfilled
from runtime.moe.workspace import Workspace

RENORMALIZE_EPS = 1e-20


@dataclass(frozen=True, slots=True)
class Routing:
    """One MoE layer's decision for T tokens.

    Args:
        layer: index of the decoder layer; the MTP layer's is num_hidden_layers.
        router_logits_TE: fp32, before sigmoid and bias.
        topk_ids_TK: int64, highest biased score first.
        topk_weights_TK: fp32, unbiased scores, renormalized and scaled.
    """

    layer: int
    router_logits_TE: torch.Tensor
    topk_ids_TK: torch.Tensor
    topk_weights_TK: torch.Tensor


RoutingObserver = Callable[[Routing], None]


# rows of a product whose shape does not depend on the number of tokens
_FIXED_ROWS = 16


class Router(nn.Module):
    """Sigmoid router with a correction bias and a group limit.

    Args:
        config: the model.
        layer: index of the decoder layer.
        is_batch_invariant: a token's logits do not depend on what it is batched with.
    """

    def __init__(self, config: Glm4MoeConfig, layer: int, *, is_batch_invariant: bool = False) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        self.is_batch_invariant = is_batch_invariant
        self.weight = unfilled(config.n_routed_experts, config.hidden_size)
        self.e_score_correction_bias = unfilled(config.n_routed_experts)

    def forward(self, hidden_TD: torch.Tensor) -> Routing:
        """Route T tokens (T, D) of any float dtype."""
        logits_TE = self.logits(hidden_TD)
        ids_TK, weights_TK = self.choose(logits_TE)
        return Routing(self.layer, logits_TE, ids_TK, weights_TK)

    def choose(self, logits_TE: torch.Tensor, workspace: Workspace | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Return ids and weights (T, K) of logits (T, E), in the workspace if there is one; see `choose_experts`."""
        choose = choose_in_blocks if self.is_batch_invariant else choose_experts
        return choose(logits_TE, self.bias_E, self.config, workspace)

    def logits(self, hidden_TD: torch.Tensor, workspace: Workspace | None = None) -> torch.Tensor:
        """Return router logits (T, E) fp32 of T tokens (T, D) of any float dtype, in the workspace if there is one."""
        buffers, weight_ED = workspace or Workspace(hidden_TD.device), self.weight.to(torch.float32)
        shape = tuple(hidden_TD.shape)
        if self.is_batch_invariant:
            return fixed_linear(hidden_TD, weight_ED, buffers)
        if hidden_TD.dtype is not torch.float32:
            hidden_TD = buffers.take("router_inputs", shape, torch.float32).copy_(hidden_TD)
        logits_TE = buffers.take("router_logits", (shape[0], len(weight_ED)), torch.float32)
        return torch.mm(hidden_TD, weight_ED.T, out=logits_TE)

    @property
    def bias_E(self) -> torch.Tensor:  # noqa: N802
        """The correction bias, fp32."""
        return self.e_score_correction_bias.to(torch.float32)


def fixed_linear(hidden_TD: torch.Tensor, weight_ED: torch.Tensor, workspace: Workspace) -> torch.Tensor:
    """Return hidden times the transposed weight (T, E), fp32, computed in products of a fixed number of rows."""
    num_tokens, (num_experts, hidden_size) = len(hidden_TD), weight_ED.shape
    num_blocks = -(-num_tokens // _FIXED_ROWS)
    blocks_BMD = workspace.take("router_inputs", (num_blocks, _FIXED_ROWS, hidden_size), torch.float32)
    padded_TD = blocks_BMD.view(-1, hidden_size)
    padded_TD[:num_tokens].copy_(hidden_TD)
    padded_TD[num_tokens:].zero_()
    weight_BDE = weight_ED.T.expand(num_blocks, -1, -1)
    logits_BME = workspace.take("router_logits", (num_blocks, _FIXED_ROWS, num_experts), torch.float32)
    return torch.bmm(blocks_BMD, weight_BDE, out=logits_BME).flatten(0, 1)[:num_tokens]


def choose_in_blocks(
    router_logits_TE: torch.Tensor,
    expert_bias_E: torch.Tensor,
    config: Glm4MoeConfig,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what `choose_experts` does, from a fixed number of tokens at a time.

    Torch computes a sigmoid in vectors and what is left over one by one, which differs in the last bit; and it adds up
    few numbers in another order where there are many rows of them.
    """
    buffers = workspace or Workspace(router_logits_TE.device)
    num_tokens, num_experts = router_logits_TE.shape
    num_padded = num_tokens + -num_tokens % _FIXED_ROWS
    ids_TK = buffers.take("block_ids", (num_padded, config.num_experts_per_tok), torch.int64)
    weights_TK = buffers.take("block_weights", (num_padded, config.num_experts_per_tok), router_logits_TE.dtype)
    padded_TE = buffers.take("padded_logits", (num_padded, num_experts), router_logits_TE.dtype)
    padded_TE[:num_tokens].copy_(router_logits_TE)
    padded_TE[num_tokens:].zero_()
    for start in range(0, num_padded, _FIXED_ROWS):
        block = slice(start, start + _FIXED_ROWS)
        ids_MK, weights_MK = choose_experts(padded_TE[block], expert_bias_E, config, buffers)
        ids_TK[block].copy_(ids_MK)
        weights_TK[block].copy_(weights_MK)
    return ids_TK[:num_tokens], weights_TK[:num_tokens]


def choose_experts(
    router_logits_TE: torch.Tensor,
    expert_bias_E: torch.Tensor,
    config: Glm4MoeConfig,
    workspace: Workspace | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (T, K) int64 and weights (T, K) fp32 from logits (T, E) fp32 and bias (E,) fp32.

    The bias moves the choice only; weights are the plain sigmoid scores. Among equal scores the lower expert wins. Both
    lie in the workspace, if there is one, until experts are chosen again.
    """
    buffers, shape = workspace or Workspace(router_logits_TE.device), tuple(router_logits_TE.shape)
    dtype, top_k = router_logits_TE.dtype, config.num_experts_per_tok
    scores_TE = torch.sigmoid(router_logits_TE, out=buffers.take("router_scores", shape, dtype))
    choice_TE = torch.add(scores_TE, expert_bias_E, out=buffers.take("router_choice", shape, dtype))
    _limit_groups(choice_TE, config.n_group, config.topk_group, buffers)
    ids_TK = _top(choice_TE, top_k, "experts", buffers)
    weights_TK = buffers.take("chosen_weights", (shape[0], top_k), dtype)
    torch.gather(scores_TE, 1, ids_TK, out=weights_TK)
    if config.norm_topk_prob:
        sums_T1 = buffers.take("chosen_sums", (shape[0], 1), dtype)
        weights_TK.div_(torch.sum(weights_TK, -1, keepdim=True, out=sums_T1).add_(RENORMALIZE_EPS))
    return ids_TK, weights_TK.mul_(config.routed_scaling_factor)


def _limit_groups(choice_TE: torch.Tensor, n_group: int, topk_group: int, workspace: Workspace) -> None:
    """Put -inf on all experts outside the topk_group groups with the highest sum of their two best scores."""
    if topk_group == n_group:
        return
    choice_TNM, dtype, shape = choice_TE.unflatten(1, (n_group, -1)), choice_TE.dtype, (len(choice_TE), n_group)
    best_TN2 = workspace.take("group_best", (*shape, 2), dtype)
    torch.topk(choice_TNM, 2, dim=-1, out=(best_TN2, workspace.take("group_places", (*shape, 2), torch.int64)))
    group_scores_TN = torch.sum(best_TN2, -1, out=workspace.take("group_scores", shape, dtype))
    is_dropped_TN = workspace.take("groups_dropped", shape, torch.bool).fill_(True)
    is_dropped_TN.scatter_(1, _top(group_scores_TN, topk_group, "groups", workspace), False)
    # -inf, not 0: a biased score may be negative and must still beat a dropped one
    choice_TNM.masked_fill_(is_dropped_TN[..., None], float("-inf"))


def _top(scores: torch.Tensor, k: int, name: str, workspace: Workspace) -> torch.Tensor:
    """Return indices (T, k) of the highest scores in each row; a stable sort, since topk leaves ties open."""
    shape = tuple(scores.shape)
    values = workspace.take(f"sorted_{name}", shape, scores.dtype)
    indices = workspace.take(f"order_of_{name}", shape, torch.int64)
    torch.sort(scores, dim=-1, descending=True, stable=True, out=(values, indices))
    return indices[:, :k]
