"""The triton backend with its kernels in triton's interpreter, held against fp64; run as a program, prints JSON."""

import json
import sys
from dataclasses import replace

import torch

from converters.config import Glm4MoeConfig
from converters.formats.inputs import InputCode, InputScheme
from runtime.model.activations import InputQuantizer
from runtime.moe.batched import BatchedExperts
from runtime.moe.experts import LocalExperts
from runtime.moe.fused import FusedExperts, FusedOps
from runtime.moe.layouts import FILTERED
from runtime.moe.plan import TRITON, VANILLA_PLAN, LayerPlan, MoePlan
from runtime.moe.weights import ExpertScheme
from runtime.moe.workspace import Workspace
from tests.builders import small_config
from tests.runtime.moe.expert_layers import exact_layer, random_experts, random_slots
from tests.runtime.moe.moe_blocks import filled_moe

H, I, E, K = 96, 80, 4, 2  # noqa: E741
SCHEMES = [scheme for scheme in ExpertScheme if scheme is not ExpertScheme.INT8_W8A8]

ROUNDED = (ExpertScheme.FP8_CHANNEL, ExpertScheme.FP8_BLOCK, ExpertScheme.INT8_W8A8)


def excess(scheme: ExpertScheme, num_tokens: int, **options: bool) -> float:
    """Return the largest error as a share of the budget."""
    dtype = scheme.code_dtype if scheme.is_plain else torch.bfloat16
    experts = LocalExperts(random_experts(scheme, E, 1, H, I))
    hidden, slots = torch.randn(num_tokens, H).to(dtype), random_slots(num_tokens, E, K)
    if num_tokens > 1:
        slots.ids_TK[1, 0] = FILTERED
    out, backend = torch.empty_like(hidden), FusedExperts(FusedOps.of_kernels(), **options)
    backend.run(hidden, slots, experts, Workspace(hidden.device), out)
    exact = exact_layer(hidden, slots, experts.weights)
    return float(((out.double() - exact.values).abs() / exact.budget).max())


def rounding_difference(scheme: ExpertScheme) -> float:
    """Return how far products of codes are from those of the values of codes, as a share of what rounding changes.

    In fp32: in bf16, values of codes are rounded again, about as much as they were by becoming codes.
    """
    is_block, is_int8 = scheme is ExpertScheme.FP8_BLOCK, scheme is ExpertScheme.INT8_W8A8
    code = InputCode.INT8 if is_int8 else InputCode.FP8
    rounding = InputQuantizer(InputScheme(code, 128 if is_block else 0))
    # whole groups of 128 columns
    weights = random_experts(scheme, E, 1, 256, 128)
    hidden, slots, results = torch.randn(6, 256), random_slots(6, E, K), []
    for backend, experts in (
        (FusedExperts(FusedOps.of_kernels()), LocalExperts(weights, rounding, rounding, multiplies_codes=True)),
        (BatchedExperts(), LocalExperts(weights, rounding, rounding)),
        (BatchedExperts(), LocalExperts(weights)),
    ):
        out = torch.empty_like(hidden)
        backend.run(hidden, slots, experts, Workspace(hidden.device), out)
        results.append(out.float())
    codes, values, full = results
    return float((codes - values).abs().mean() / (full - values).abs().mean())


def block_difference() -> float:
    """Return how far a whole block, routed by its kernel, is from the loop over experts, relative to its size."""
    config = replace(Glm4MoeConfig.from_hf(small_config()), n_routed_experts=8)
    hidden = torch.randn(1, 5, config.hidden_size)
    plan = MoePlan(TRITON, {5: LayerPlan(ExpertScheme.FP32, 1)})
    expected = filled_moe(config, VANILLA_PLAN)(hidden, None)
    return float((filled_moe(config, plan)(hidden, None) - expected).abs().max() / expected.abs().max())


def report() -> dict[str, float]:
    """Return shares of the budget, and the block's difference."""
    torch.manual_seed(0)
    found = {f"{scheme} {num_tokens}": excess(scheme, num_tokens) for scheme in SCHEMES for num_tokens in (5,)}
    found |= {f"{scheme} one token": excess(scheme, 1) for scheme in (ExpertScheme.BF16, ExpertScheme.FP8_CHANNEL)}
    found["masked layout"] = excess(ExpertScheme.BF16, 5, is_masked=True)
    found["batch invariant"] = excess(ExpertScheme.BF16, 1, is_batch_invariant=True)
    roundings = {f"rounded {scheme}": rounding_difference(scheme) for scheme in ROUNDED}
    return found | roundings | {"block": block_difference()}


if __name__ == "__main__":
    json.dump(report(), sys.stdout)
