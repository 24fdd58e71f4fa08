"""What is measured besides the main table: the shared expert as a slot or apart, and whether results repeat."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.moe_cold import COLD_TOKENS
from benchmarks.moe_layers import (
    MAX_CODES_ERROR,
    MAX_ERROR,
    Batch,
    make_batch,
    make_experts,
    make_layer,
)
from benchmarks.moe_peers import Candidate, in_turn, ours
from benchmarks.moe_run import KINDS, POINT_S, Run, batches_of, error_of, is_right, kind_name, worst_error
from benchmarks.moe_timing import time_in_turn
from runtime.moe.dispatcher import Slots
from runtime.moe.experts import LocalExperts
from runtime.moe.weights import ExpertWeights, Packed

SHARED_END, DETERMINISM_END = 0.87, 0.91
REPEATS, BATCH_SIZES = 100, (2, 17, 256, 4096)
DRY_REPEATS, DRY_BATCH_SIZES = 2, BATCH_SIZES[:2]


def shared_expert(run: Run) -> list[dict[str, Any]]:
    """Return times with the shared expert as a slot, and apart behind the routed ones, in each scheme.

    Where the two differ there is the error, and no time.
    """
    rows = []
    for scheme, is_quantized in KINDS:
        experts = make_experts(make_layer(run.shape, scheme, run.device), is_quantized=is_quantized)
        rows += _shared_expert(run, experts)
    return rows


def _shared_expert(run: Run, experts: LocalExperts) -> list[dict[str, Any]]:
    until, rows = run.deadline.part(SHARED_END), []
    kind = {"scheme": str(experts.weights.scheme), "inputs_as_codes": experts.multiplies_codes}
    limit = MAX_CODES_ERROR if experts.multiplies_codes else MAX_ERROR
    for num_tokens in run.tokens[:: 2 if experts.weights.scheme.is_plain else 4]:
        if not until.has(POINT_S):
            run.left_out.append(f"shared expert, {kind_name(experts)}, {num_tokens} tokens")
            continue
        batches = list(batches_of(run, num_tokens))
        layers = run.copies(experts) if num_tokens <= COLD_TOKENS else [experts]
        ways = in_turn([both_ways(layer, batches) for layer in layers])
        rows += _compared(run, ways, batches, limit, {**kind, "tokens": num_tokens, "layers_in_turn": len(layers)})
        del layers, ways
        run.free()
    return rows


def _compared(
    run: Run, ways: list[Candidate], batches: list[Batch], limit: float, common: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return a row for each way, timed if it agrees with the first on all inputs."""
    works, num_inputs = {one.name: (one.on(batches), True) for one in ways}, ways[0].num_inputs(batches)
    expected = [ways[0].run(batch).float() for batch in batches]
    all_rows = slice(None)

    def error(number: int, found: torch.Tensor) -> float | str:
        return error_of(found, all_rows, expected[number % len(batches)])

    errors = {name: worst_error(work, num_inputs, error) for name, (work, _) in works.items()}
    timings = {}
    if all(is_right(found, limit) for found in errors.values()):
        timings = time_in_turn(
            works, num_inputs, run.device, lambda number, found: is_right(error(number, found), limit)
        )
    rows = []
    for name, found in errors.items():
        row = common | {"fused": name, "relative_error": found}
        rows.append(row | ({"time": timings[name].as_dict()} if name in timings else {}))
    return rows


def both_ways(experts: LocalExperts, batches: Sequence[Batch]) -> list[Candidate]:
    """Return the shared expert as a slot ("on") and apart ("off")."""
    slot = next(ours(experts, experts.weights.device))
    return [Candidate("on", slot.run), Candidate("off", apart(experts, batches))]


def apart(experts: LocalExperts, batches: Sequence[Batch]) -> Callable[[Batch], torch.Tensor]:
    """Return what computes routed experts by our kernels as a layer without a shared one, and that one behind them.

    Plain weights of it are multiplied by torch, codes by our kernels in launches of their own. Slots of both are made
    here, of each batch that will come: none of that is timed.
    """
    weights, device = experts.weights, experts.weights.device
    routed, alone = (
        next(ours(replace(experts, weights=part_of(weights, some)), device))
        for some in (slice(weights.num_routed), slice(weights.num_routed, None))
    )
    given = {id(batch): (routed_only(batch), shared_only(batch)) for batch in batches}

    def shared(batch: Batch) -> torch.Tensor:
        if not weights.scheme.is_plain:
            return alone.run(batch)
        gate_up = torch.nn.functional.linear(batch.hidden_TH, weights.up.codes[-1])
        active = torch.nn.functional.silu(gate_up[:, 0::2]) * gate_up[:, 1::2]
        return torch.nn.functional.linear(active, weights.down.codes[-1])

    def run(batch: Batch) -> torch.Tensor:
        of_routed, of_shared = given[id(batch)]
        return routed.run(of_routed).add_(shared(of_shared))

    return run


def routed_only(batch: Batch) -> Batch:
    """Return the choices of routed experts alone, for a layer that has no others."""
    slots = batch.slots
    num_choices = slots.num_choices - slots.num_shared
    ids_TK, weights_TK = (part[:, :num_choices].contiguous() for part in (slots.ids_TK, slots.weights_TK))
    return Batch(batch.hidden_TH, Slots(ids_TK, weights_TK, slots.num_experts - slots.num_shared, 0))


def shared_only(batch: Batch) -> Batch:
    """Return the same tokens for a layer of the shared expert alone, as its routed one."""
    ids_T1 = torch.zeros_like(batch.slots.ids_TK[:, :1])
    return Batch(batch.hidden_TH, Slots(ids_T1, torch.ones_like(batch.slots.weights_TK[:, :1]), 1, 0))


def part_of(weights: ExpertWeights, experts: slice) -> ExpertWeights:
    """Return some experts as a layer of routed ones."""

    def some(packed: Packed) -> Packed:
        scales, global_scale = (
            None if part is None else part[experts] for part in (packed.scales, packed.global_scale)
        )
        return Packed(packed.codes[experts], scales, global_scale)

    up = some(weights.up)
    return replace(weights, up=up, down=some(weights.down), num_routed=len(up.codes), num_shared=0)


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
