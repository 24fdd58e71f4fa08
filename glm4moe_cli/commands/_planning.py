"""How `inspect` shows what the ranks of a mapping would hold."""

from dataclasses import asdict
from typing import Any

from converters.shard.planner import ParallelPlan, RankMemory
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes

_TOKENS = 1000


def show_plan(output: Output, plan: ParallelPlan) -> None:
    """Print a row for every rank, then how even they are and how to serve them."""
    columns = ["rank", "stage", "layers", "weights", "experts", "copies", "KV per 1k tokens", "MTP KV per 1k tokens"]
    if plan.gpu_memory is not None:
        columns += ["left of memory", "KV tokens that fit"]
    output.table("Ranks", columns, [_row(rank, plan.gpu_memory) for rank in plan.ranks])
    facts: dict[str, object] = {
        "balance": f"the largest rank has {plan.balance:.3f} times the mean",
        "weights in all": format_bytes(sum(rank.weight_bytes for rank in plan.ranks)),
    }
    if plan.gpu_memory is not None:
        facts["memory"] = _memory(plan, plan.gpu_memory)
    for engine, flags in plan.flags.items():
        facts[engine] = flags or f"not this mapping: {plan.reasons[engine]}"
    output.facts("Plan", facts)


def _row(rank: RankMemory, gpu_memory: int | None) -> list[object]:
    last = rank.first_layer + rank.num_layers - 1
    row: list[object] = [
        rank.rank,
        rank.stage,
        f"{rank.first_layer} to {last}",
        *map(format_bytes, (rank.weight_bytes, rank.expert_bytes, rank.copied_bytes)),
        *(format_bytes(_TOKENS * n) for n in (rank.kv_bytes_per_token, rank.mtp_kv_bytes_per_token)),
    ]
    if gpu_memory is not None:
        row += [format_bytes(gpu_memory - rank.weight_bytes), f"{rank.kv_tokens:,}"]
    return row


def _memory(plan: ParallelPlan, gpu_memory: int) -> str:
    largest = max(rank.weight_bytes for rank in plan.ranks)
    if largest >= gpu_memory:
        return f"{format_bytes(gpu_memory)} do not hold the {format_bytes(largest)} of the largest rank"
    tokens = min(rank.kv_tokens or 0 for rank in plan.ranks)
    return (
        f"of {format_bytes(gpu_memory)}, {format_bytes(gpu_memory - largest)} are left beside the largest rank: "
        f"{tokens:,} tokens of 16-bit cache, before activations and what the engine itself takes"
    )


def plan_json(plan: ParallelPlan) -> dict[str, Any]:
    """Return the plan as plain values."""
    found = asdict(plan)
    found["mapping"] = plan.mapping.as_json()
    found["kv_bytes_per_1k_tokens"] = [_TOKENS * rank.kv_bytes_per_token for rank in plan.ranks]
    return found
