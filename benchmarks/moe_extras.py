"""What is measured besides the main table: the shared expert as a slot or apart, and whether results repeat."""

from typing import Any

import torch

from benchmarks.moe_layers import MAX_ERROR, Batch, make_batch, make_experts, make_layer, relative_error
from benchmarks.moe_peers import Candidate, ours
from benchmarks.moe_run import KINDS, POINT_S, Run, batches_of
from benchmarks.moe_timing import time_in_turn
from runtime.moe.weights import ExpertScheme

SHARED_END, DETERMINISM_END = 0.83, 0.88
REPEATS, BATCH_SIZES = 100, (2, 17, 256, 4096)
DRY_REPEATS, DRY_BATCH_SIZES = 2, BATCH_SIZES[:2]


def shared_expert(run: Run) -> list[dict[str, Any]]:
    """Return times with the shared expert as a slot, and as products of its own behind the routed ones.

    Where the two differ there is the error, and no time.
    """
    weights = make_layer(run.shape, ExpertScheme.BF16, run.device)
    fused = next(ours(make_experts(weights, is_quantized=False), run.device))
    until, rows = run.deadline.part(SHARED_END), []
    for num_tokens in run.tokens[::2]:
        if not until.has(POINT_S):
            run.left_out.append(f"shared expert, {num_tokens} tokens")
            continue
        batches = list(batches_of(run, num_tokens))
        works = {
            "on": (lambda number, batches=batches: fused.run(batches[number]), True),
            "off": (lambda number, batches=batches: separate(fused, batches[number], weights), True),
        }
        expected, found = works["on"][0](0), works["off"][0](0)
        error = relative_error(found, expected.float())
        timings = time_in_turn(works, run.num_batches, run.device) if error < MAX_ERROR else {}
        for name in works:
            row = {"tokens": num_tokens, "fused": name, "relative_error": error}
            rows.append(row | ({"time": timings[name].as_dict()} if name in timings else {}))
    return rows


def separate(candidate: Candidate, batch: Batch, weights: Any) -> torch.Tensor:
    """Return what a candidate makes of the routed slots, plus a shared expert that is computed by itself."""
    slots, num_shared = batch.slots, batch.slots.num_shared
    filtered = slots.ids_TK.clone()
    filtered[:, -num_shared:] = -1
    routed = Batch(batch.hidden_TH, type(slots)(filtered, slots.weights_TK, slots.num_experts, num_shared))
    gate_up = torch.nn.functional.linear(batch.hidden_TH, weights.up.codes[-1])
    active = torch.nn.functional.silu(gate_up[:, 0::2]) * gate_up[:, 1::2]
    return candidate.run(routed) + torch.nn.functional.linear(active, weights.down.codes[-1])


def determinism(run: Run) -> list[dict[str, Any]]:
    """Return whether a row has the same bits alone and in batches, and how often repeats gave other bits."""
    is_cuda, rows = run.device.type == "cuda", []
    sizes, repeats = (BATCH_SIZES, REPEATS) if is_cuda else (DRY_BATCH_SIZES, DRY_REPEATS)
    for scheme, is_quantized in KINDS[:2]:
        if not run.deadline.part(DETERMINISM_END).has(2 * POINT_S):
            run.left_out.append(f"determinism, {scheme}")
            continue
        experts = make_experts(make_layer(run.shape, scheme, run.device), is_quantized=is_quantized)
        candidates = {one.name: one for one in ours(experts, run.device)}
        for name in ("triton", "triton, batch-invariant"):
            whole = make_batch(run.shape, sizes[-1], "uniform", run.device, seed=0)
            first = candidates[name].run(part(whole, 1))
            same = {
                num_tokens: torch.equal(candidates[name].run(part(whole, num_tokens))[:1], first)
                for num_tokens in sizes
            }
            some = part(whole, sizes[1])
            results = [candidates[name].run(some) for _ in range(repeats)]
            others = sum(not torch.equal(result, results[0]) for result in results)
            rows.append({"candidate": name, "scheme": str(scheme), "alone_equals_in_batch_of": same,
                         "repeats": len(results), "other_bits": others})  # fmt: skip
    return rows


def part(batch: Batch, num_tokens: int) -> Batch:
    """Return the first tokens of a batch."""
    slots = batch.slots
    ids_TK, weights_TK = slots.ids_TK[:num_tokens].contiguous(), slots.weights_TK[:num_tokens].contiguous()
    return Batch(batch.hidden_TH[:num_tokens], type(slots)(ids_TK, weights_TK, slots.num_experts, slots.num_shared))
