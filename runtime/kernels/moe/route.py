"""Which experts a token goes to, and with what weights, a few tokens to a program.

Shapes: T tokens, E experts, K slots per token: those chosen, then the shared ones.
"""

import torch
import triton
import triton.language as tl

from converters.config import Glm4MoeConfig
from runtime.kernels.launch import Launch
from runtime.moe.router import RENORMALIZE_EPS

# one warp for each
TOKENS = 4


@triton.jit
def _first(value_TE: tl.tensor, best_T: tl.tensor, place_E: tl.tensor) -> tl.tensor:
    """Return the first place (T,) that holds the best value; the last one if all are NaN."""
    count: tl.constexpr = place_E.shape[0]
    return tl.min(tl.where(value_TE == best_T[:, None], place_E[None, :], count - 1), axis=1)


@triton.jit
def _limit_groups(
    choice_TE: tl.tensor,
    expert_E: tl.tensor,
    EXPERTS: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    KEPT: tl.constexpr,
) -> tl.tensor:
    """Return -inf for all experts outside the KEPT groups with the highest sum of their two best scores."""
    tokens: tl.constexpr = choice_TE.shape[0]
    group_E = expert_E // (EXPERTS // GROUPS)
    group_N = tl.arange(0, GROUPS_PAD)
    sum_TN = tl.full((tokens, GROUPS_PAD), float("-inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        inside_TE = tl.where((group_E == group)[None, :], choice_TE, float("-inf"))
        best_T = tl.max(inside_TE, axis=1)
        is_best_TE = expert_E[None, :] == _first(inside_TE, best_T, expert_E)[:, None]
        second_T = tl.max(tl.where(is_best_TE, float("-inf"), inside_TE), axis=1)
        sum_TN = tl.where((group_N == group)[None, :], (best_T + second_T)[:, None], sum_TN)
    kept_TE = tl.zeros(choice_TE.shape, tl.int1)
    for _ in tl.static_range(KEPT):
        group_T = _first(sum_TN, tl.max(sum_TN, axis=1), group_N)
        kept_TE = kept_TE | (group_E[None, :] == group_T[:, None])
        sum_TN = tl.where(group_N[None, :] == group_T[:, None], float("-inf"), sum_TN)
    return tl.where(kept_TE, choice_TE, float("-inf"))


@triton.jit(do_not_specialize=["num_tokens", "scaling", "eps"])
def choose_experts(
    logits_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    weights_ptr: tl.tensor,
    num_tokens: tl.tensor,
    scaling: tl.tensor,
    eps: tl.tensor,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    EXPERTS_PAD: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUPS_PAD: tl.constexpr,
    KEPT: tl.constexpr,
    CHOSEN: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_PAD: tl.constexpr,
    NORMALIZED: tl.constexpr,
) -> None:
    """Write ids and weights of SLOTS experts for each token; those behind the CHOSEN ones are shared."""
    token_T = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    expert_E = tl.arange(0, EXPERTS_PAD)
    slot_K = tl.arange(0, SLOTS_PAD)
    is_expert_E = expert_E < EXPERTS
    is_token_T1 = (token_T < num_tokens)[:, None]
    place_TE = token_T[:, None] * EXPERTS + expert_E[None, :]
    logit_TE = tl.load(logits_ptr + place_TE, mask=is_token_T1 & is_expert_E[None, :], other=0.0)
    bias_E = tl.load(bias_ptr + expert_E, mask=is_expert_E, other=0.0)
    score_TE = tl.div_rn(tl.full(logit_TE.shape, 1.0, tl.float32), 1.0 + tl.exp(-logit_TE))
    choice_TE = tl.where(is_expert_E[None, :], score_TE + bias_E[None, :], float("-inf"))
    if KEPT < GROUPS:
        choice_TE = _limit_groups(choice_TE, expert_E, EXPERTS, GROUPS, GROUPS_PAD, KEPT)
    id_TK = tl.zeros((TOKENS, SLOTS_PAD), tl.int32) + (EXPERTS - CHOSEN + slot_K)[None, :]
    weight_TK = tl.zeros((TOKENS, SLOTS_PAD), tl.float32)
    total_T = tl.zeros((TOKENS,), tl.float32)
    for number in tl.static_range(CHOSEN):
        # where logits are NaN, an expert that exists: what follows reads its weights
        id_T = tl.minimum(_first(choice_TE, tl.max(choice_TE, axis=1), expert_E), EXPERTS - 1)
        is_it_TE = expert_E[None, :] == id_T[:, None]
        score_T = tl.sum(tl.where(is_it_TE, score_TE, 0.0), axis=1)
        total_T += score_T
        is_slot_1K = (slot_K == number)[None, :]
        id_TK = tl.where(is_slot_1K, id_T[:, None], id_TK)
        weight_TK = tl.where(is_slot_1K, score_T[:, None], weight_TK)
        choice_TE = tl.where(is_it_TE, float("-inf"), choice_TE)
    if NORMALIZED:
        weight_TK = tl.div_rn(weight_TK, tl.broadcast_to((total_T + eps)[:, None], (TOKENS, SLOTS_PAD)))
    # the shared expert is never scaled
    weight_TK = tl.where((slot_K < CHOSEN)[None, :], weight_TK * scaling, 1.0)
    place_TK = token_T[:, None] * SLOTS + slot_K[None, :]
    is_slot_TK = is_token_T1 & (slot_K < SLOTS)[None, :]
    tl.store(ids_ptr + place_TK, id_TK, mask=is_slot_TK)
    tl.store(weights_ptr + place_TK, weight_TK, mask=is_slot_TK)


def route_launch(
    router_logits_TE: torch.Tensor,
    expert_bias_E: torch.Tensor,
    config: Glm4MoeConfig,
    *,
    num_shared: int = 0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> Launch:
    """Return the launch of `route`."""
    num_tokens, num_experts = router_logits_TE.shape
    num_slots = config.num_experts_per_tok + num_shared
    if out is None:
        shape, device = (num_tokens, num_slots), router_logits_TE.device
        out = (torch.empty(shape, dtype=torch.int32, device=device), torch.empty(shape, device=device))
    constants = {
        "TOKENS": TOKENS,
        "EXPERTS": num_experts,
        "EXPERTS_PAD": triton.next_power_of_2(num_experts),
        "GROUPS": config.n_group,
        "GROUPS_PAD": triton.next_power_of_2(config.n_group),
        "KEPT": config.topk_group,
        "CHOSEN": config.num_experts_per_tok,
        "SLOTS": num_slots,
        "SLOTS_PAD": triton.next_power_of_2(num_slots),
        "NORMALIZED": config.norm_topk_prob,
    }
    inputs = (router_logits_TE.contiguous(), expert_bias_E.contiguous())
    numbers = (num_tokens, float(config.routed_scaling_factor), RENORMALIZE_EPS)
    return Launch(choose_experts, triton.cdiv(num_tokens, TOKENS), (*inputs, *out, *numbers), constants, out, TOKENS)


def route(
    router_logits_TE: torch.Tensor,
    expert_bias_E: torch.Tensor,
    config: Glm4MoeConfig,
    *,
    num_shared: int = 0,
    out: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return expert ids (T, K) int32, best first, and weights (T, K) fp32; the shared experts take the last slots.

    Args:
        router_logits_TE: fp32.
        expert_bias_E: fp32; moves the choice only. Among equal sums the lower expert wins.
        config: how many are chosen, from how many groups, and how weights are scaled.
        num_shared: slots behind the chosen ones: experts E, E + 1, ... with weight 1.
        out: where ids and weights go.
    """
    ids_TK, weights_TK = route_launch(router_logits_TE, expert_bias_E, config, num_shared=num_shared, out=out).run()
    return ids_TK, weights_TK
