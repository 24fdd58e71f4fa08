"""The triton backend with its kernels in triton's interpreter, held against fp64; run as a program, prints JSON."""

import json
import sys
from dataclasses import replace

import torch

from converters.config import Glm4MoeConfig
from converters.formats.inputs import InputCode, InputScheme
from runtime.model.activations import InputQuantizer
from runtime.moe.batched import BatchedExperts
from runtime.moe.dispatcher import Slots, combine_slots
from runtime.moe.expert_map import ExpertMap
from runtime.moe.experts import LocalExperts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.layouts import FILTERED
from runtime.moe.plan import TRITON, VANILLA_PLAN, LayerPlan, MoePlan
from runtime.moe.weights import ExpertScheme, ExpertWeights, Packed
from runtime.moe.workspace import Workspace
from tests.builders import small_config
from tests.runtime.moe import interpreted_rows as rows
from tests.runtime.moe.expert_layers import exact_layer, random_experts, random_slots
from tests.runtime.moe.moe_blocks import filled_moe

H, I, E, K = 96, 80, 4, 2  # noqa: E741
SCHEMES = [scheme for scheme in ExpertScheme if scheme is not ExpertScheme.INT8_W8A8]

# the experts of each rank; the shared one is the last of each, and the third line has copies of others as well
HELD = {
    "1 rank": [[0, 1, 2, 3, 4]],
    "2 ranks": [[0, 1, 4], [2, 3, 4]],
    "2 ranks with copies": [[0, 1, 2, 4], [2, 3, 0, 4]],
    "4 ranks": [[0, 4], [1, 4], [2, 4], [3, 4]],
}
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


def ranks_difference(held: list[list[int]], *, is_masked: bool) -> float:
    """Return how far ranks with these experts, the sums of their slots taken, are from one rank with all of them."""
    weights, hidden, slots = random_experts(ExpertScheme.FP32, E, 1, H, I), torch.randn(6, H), random_slots(6, E, K)
    backend, experts = FusedExperts(FusedOps.of_kernels(), True, is_masked), ExpertMap.of(held, E + 1)

    def results(local: Slots, part: ExpertWeights) -> torch.Tensor:
        return backend.slot_results(hidden, local, LocalExperts(part), Workspace(hidden.device)).clone()

    total = torch.zeros(slots.num_slots, H)
    for rank, ids in enumerate(held):
        up, down = Packed(weights.up.codes[ids]), Packed(weights.down.codes[ids])
        part = replace(weights, up=up, down=down, num_routed=len(ids) - 1)
        total += results(experts.local_slots(slots, rank), part)
    sums = [combine_slots(values, slots, Workspace(hidden.device)) for values in (total, results(slots, weights))]
    return float((sums[0] - sums[1]).abs().max())


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
    for ranks, held in HELD.items():
        for layout in ("contiguous", "masked"):
            found[f"{ranks}, {layout}"] = ranks_difference(held, is_masked=layout == "masked")
    norms = {f"norm, {name}": share for name, share in rows.norm_differences().items()}
    fp4 = {
        "rounded nvfp4": rows.fp4_difference(6, is_masked=False),
        "rounded nvfp4, masked": rows.fp4_difference(1, is_masked=True),
    }
    bits = {f"bits, {name}": count for name, count in rows.dependent_rows().items()} | {
        "bits of codes": rows.different_codes()
    }
    return found | roundings | norms | fp4 | bits | {"block": block_difference()}


if __name__ == "__main__":
    json.dump(report(), sys.stdout)
