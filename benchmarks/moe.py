"""One MoE layer of GLM-4.6 by every backend and whoever else is here, in one run on one GPU of less than ten minutes.

    PYTHONPATH=. python benchmarks/moe.py [--out FOLDER] [--seconds 540] [--shape GLM-4.6]
    PYTHONPATH=. python benchmarks/moe.py --dry-run --out FOLDER

Needs a CUDA GPU, and no network. Each result is first held against an fp32 reference on the batch that is timed: of one
that is wrong the error is reported, and no time. `--dry-run` goes through all of it on the CPU with a tiny layer: what
is checked is checked, what is timed is marked as not measured. Writes moe.json and moe.svg.
"""

import argparse
import gc
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from triton.errors import TritonError

from benchmarks.measure import write_result
from benchmarks.moe_chart import roofline_svg
from benchmarks.moe_counts import count
from benchmarks.moe_layers import (
    MAX_CODES_ERROR,
    MAX_ERROR,
    ROUTINGS,
    Batch,
    checked_rows,
    make_batch,
    make_experts,
    make_layer,
    reference,
    relative_error,
)
from benchmarks.moe_peers import Candidate, ours, peers
from benchmarks.moe_timing import Deadline, floors, launches, time_in_turn
from runtime.moe.cost import H200, SHAPES, LayerShape, floor, touched_bytes
from runtime.moe.experts import LocalExperts
from runtime.moe.weights import ExpertScheme

RESULTS = Path(__file__).resolve().parent / "results"
TOKENS = tuple(1 << power for power in range(15))
TINY, TINY_TOKENS = LayerShape(64, 128, 6, 2), (1, 17)
# schemes, and whether inputs are codes as well; bf16 first, beside the peers
KINDS = (
    (ExpertScheme.BF16, False),
    (ExpertScheme.FP8_CHANNEL, True),
    (ExpertScheme.FP8_CHANNEL, False),
    (ExpertScheme.FP8_BLOCK, True),
    (ExpertScheme.INT8_CHANNEL, False),
    (ExpertScheme.INT8_W8A8, True),
    (ExpertScheme.NVFP4, False),
)
# different activations and routings in one graph
BATCHES = 4
DRY_BATCHES = 2
# left for what a point may take, and for writing down
POINT_S, CLOSING_S = 4.0, 15.0
EAGER = ", without a graph"
# what a candidate that cannot do something may raise; triton's errors are no RuntimeError
FAILURES = (RuntimeError, AssertionError, ValueError, TypeError, NotImplementedError, TritonError)
REPEATS, BATCH_SIZES = 100, (2, 17, 256, 4096)


@dataclass(slots=True)
class Run:
    """One run of the benchmark: what it measures with, and what it found."""

    shape: LayerShape
    tokens: Sequence[int]
    device: torch.device
    deadline: Deadline
    num_batches: int = BATCHES
    batch_sizes: Sequence[int] = BATCH_SIZES
    points: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def measure(self) -> None:
        """Fill in points, one scheme after the other."""
        for scheme, is_quantized in KINDS:
            weights = make_layer(self.shape, scheme, self.device)
            experts = make_experts(weights, is_quantized=is_quantized)
            candidates = list(ours(experts, self.device))
            if scheme is ExpertScheme.BF16:
                others, self.absent = peers(weights)
                candidates += others
            for routing, num_tokens in self._batches(scheme):
                name = f"{scheme}{', inputs as codes' if is_quantized else ''}, {routing}, {num_tokens} tokens"
                if self.deadline.has(POINT_S + CLOSING_S):
                    print(name, file=sys.stderr, flush=True)
                    self.points += self.point(experts, candidates, routing, num_tokens)
                else:
                    self.left_out.append(name)
            del weights, experts, candidates
            gc.collect()

    def _batches(self, scheme: ExpertScheme) -> Iterator[tuple[str, int]]:
        """Yield routings and tokens; the uniform ones of all sizes, of others every second, most for bf16."""
        yield from (("uniform", num_tokens) for num_tokens in self.tokens)
        for routing in ROUTINGS[1:]:
            step = 2 if scheme is ExpertScheme.BF16 else 4
            yield from ((routing, num_tokens) for num_tokens in self.tokens[::step])

    def point(
        self, experts: LocalExperts, candidates: Sequence[Candidate], routing: str, num_tokens: int
    ) -> list[dict[str, Any]]:
        """Return a row for each candidate that takes so many tokens: its error, then, if it is right, its time."""
        batches = [make_batch(self.shape, num_tokens, routing, self.device, seed) for seed in range(self.num_batches)]
        running = [one for one in candidates if one.max_tokens is None or num_tokens <= one.max_tokens]
        chosen = checked_rows(num_tokens, self.device)
        expected = reference(batches[0], experts, chosen)
        errors = {one.name: error_of(one, batches[0], chosen, expected) for one in running}
        limit = MAX_CODES_ERROR if experts.multiplies_codes else MAX_ERROR
        right = [one for one in running if is_right(errors[one.name], limit)]
        works = {one.name: (lambda number, one=one: one.run(batches[number]), one.is_graphable) for one in right}
        # beside those that no graph can hold
        works |= {f"{name}{EAGER}": (work, False) for name, (work, graph) in works.items() if graph}
        timings = time_in_turn(works, len(batches), self.device)
        rows = []
        for one in running:
            row = self._row(one, experts, batches, routing)
            row |= {"relative_error": errors[one.name], "is_right": is_right(errors[one.name], limit)}
            if one.name in timings:
                row |= {"time": timings[one.name].as_dict(), "launches": launches(works[one.name][0])}
                if f"{one.name}{EAGER}" in timings:
                    row["time_without_graph"] = timings[f"{one.name}{EAGER}"].as_dict()
                row["operations"] = count(lambda one=one: one.run(batches[0])).launches
            rows.append(row)
        return rows

    def _row(
        self, candidate: Candidate, experts: LocalExperts, batches: Sequence[Batch], routing: str
    ) -> dict[str, Any]:
        scheme, num_tokens = experts.weights.scheme, len(batches[0].hidden_TH)
        num_distinct = sum(batch.num_distinct for batch in batches) / len(batches)
        least = floor(self.shape, scheme, num_tokens, is_quantized=experts.multiplies_codes)
        # the experts that were drawn, in place of those that are expected
        touched = touched_bytes(self.shape, scheme, num_tokens)
        drawn = touched / (expected_touched(self.shape, num_tokens)) * (num_distinct + self.shape.num_shared)
        return {
            "candidate": candidate.name,
            "is_ours": candidate.is_ours,
            "version": candidate.version,
            "scheme": str(scheme),
            "inputs_as_codes": experts.multiplies_codes,
            "routing": routing,
            "tokens": num_tokens,
            "distinct_experts": num_distinct,
            "least_bytes": least.num_bytes - touched + drawn,
            "flop": least.flop,
            "flop_speedup": least.flop_speedup,
        }

    def shared_expert(self) -> list[dict[str, Any]]:
        """Return times with the shared expert as a slot, and as three products of its own behind the routed ones."""
        weights = make_layer(self.shape, ExpertScheme.BF16, self.device)
        fused = next(ours(make_experts(weights, is_quantized=False), self.device))
        rows = []
        for num_tokens in self.tokens[::2]:
            if not self.deadline.has(CLOSING_S):
                self.left_out.append(f"shared expert, {num_tokens} tokens")
                continue
            batches = [
                make_batch(self.shape, num_tokens, "uniform", self.device, seed) for seed in range(self.num_batches)
            ]
            works = {
                "on": (lambda number, batches=batches: fused.run(batches[number]), True),
                "off": (lambda number, batches=batches: separate(fused, batches[number], weights), True),
            }
            expected, found = works["on"][0](0), works["off"][0](0)
            error = relative_error(found, expected.float())
            timings = time_in_turn(works, self.num_batches, self.device) if error < MAX_ERROR else {}
            rows += [
                {"tokens": num_tokens, "fused": name, "relative_error": error, "time": timing.as_dict(),
                 "launches": launches(works[name][0])}
                for name, timing in timings.items()
            ]  # fmt: skip
        return rows


def determinism(run: Run) -> list[dict[str, Any]]:
    """Return whether a row has the same bits alone and in batches, and how often repeats gave other bits."""
    rows = []
    for scheme, is_quantized in KINDS[:2]:
        experts = make_experts(make_layer(run.shape, scheme, run.device), is_quantized=is_quantized)
        candidates = {one.name: one for one in ours(experts, run.device)}
        for name in ("triton", "triton, batch-invariant"):
            whole = make_batch(run.shape, run.batch_sizes[-1], "uniform", run.device, seed=0)
            first = candidates[name].run(part(whole, 1))
            same = {
                num_tokens: torch.equal(candidates[name].run(part(whole, num_tokens))[:1], first)
                for num_tokens in run.batch_sizes
            }
            some = part(whole, run.batch_sizes[1])
            results = [candidates[name].run(some) for _ in range(REPEATS if run.device.type == "cuda" else 2)]
            others = sum(not torch.equal(result, results[0]) for result in results)
            rows.append({"candidate": name, "scheme": str(scheme), "alone_equals_in_batch_of": same,
                         "repeats": len(results), "other_bits": others})  # fmt: skip
    return rows


def part(batch: Batch, num_tokens: int) -> Batch:
    """Return the first tokens of a batch."""
    slots = batch.slots
    ids_TK, weights_TK = slots.ids_TK[:num_tokens].contiguous(), slots.weights_TK[:num_tokens].contiguous()
    return Batch(batch.hidden_TH[:num_tokens], type(slots)(ids_TK, weights_TK, slots.num_experts, slots.num_shared))


def error_of(candidate: Candidate, batch: Batch, chosen: torch.Tensor, expected: torch.Tensor) -> float | str:
    """Return how far a result is from the reference on the chosen rows, or why there is none."""
    try:
        found = candidate.run(batch)
    except FAILURES as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    if not bool(torch.isfinite(found).all()):
        return "not finite"
    return relative_error(found[chosen], expected)


def separate(candidate: Candidate, batch: Batch, weights: Any) -> torch.Tensor:
    """Return what a candidate makes of the routed slots, plus a shared expert that is computed by itself."""
    slots, num_shared = batch.slots, batch.slots.num_shared
    filtered = slots.ids_TK.clone()
    filtered[:, -num_shared:] = -1
    routed = Batch(batch.hidden_TH, type(slots)(filtered, slots.weights_TK, slots.num_experts, num_shared))
    gate_up = torch.nn.functional.linear(batch.hidden_TH, weights.up.codes[-1])
    active = torch.nn.functional.silu(gate_up[:, 0::2]) * gate_up[:, 1::2]
    return candidate.run(routed) + torch.nn.functional.linear(active, weights.down.codes[-1])


def expected_touched(shape: LayerShape, num_tokens: int) -> float:
    """Return the experts that a floor counts."""
    return touched_bytes(shape, ExpertScheme.BF16, num_tokens) / (2 * shape.expert_weights)


def is_right(error: float | str, limit: float) -> bool:
    """Whether a result may be timed: there is one, and it is no further from the reference than the limit."""
    return isinstance(error, float) and error < limit


def facts(device: torch.device) -> dict[str, Any]:
    """Return what a reader needs to judge the figures: machine and versions."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cuda":
        import triton

        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "triton": triton.__version__, "cuda": torch.version.cuda}
        found["processors"], found["memory_bytes"] = properties.multi_processor_count, properties.total_memory
    return found


def with_shares(points: list[dict[str, Any]], limits: dict[str, float | None]) -> None:
    """Add to each timed row what part of the measured floor it reaches, and how much it computes a second."""
    read, flop = limits["read_bytes_per_s"], limits["bf16_flop_per_s"]
    for row in points:
        time_us = row.get("time", {}).get("median_us")
        if time_us is None or read is None or flop is None:
            continue
        least_s = max(row["least_bytes"] / read, row["flop"] / (flop * row["flop_speedup"]))
        row["share_of_floor"], row["tflop_per_s"] = least_s * 1e6 / time_us, row["flop"] / time_us / 1e6


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and write; 1 if one of our results was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="GLM-4.6")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    if not args.dry_run and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA GPU: use --dry-run")
    device = torch.device("cpu" if args.dry_run else "cuda")
    shape, tokens = (TINY, TINY_TOKENS) if args.dry_run else (SHAPES[args.shape], TOKENS)
    run = Run(shape, tokens, device, Deadline(args.seconds))
    if args.dry_run:
        run.num_batches, run.batch_sizes = DRY_BATCHES, BATCH_SIZES[:2]
    result: dict[str, Any] = {"is_measured": not args.dry_run, "environment": facts(device)}
    result["shape"] = {"name": "tiny" if args.dry_run else args.shape, "experts": shape.num_experts}
    result["limits"] = floors(device)
    try:
        run.measure()
        result["shared_expert_fused"] = run.shared_expert()
        result["determinism"] = determinism(run)
    finally:
        # a GPU that fails takes everything with it, but what is known by then
        wrong = finish(run, result, args.out)
    print(f"{len(run.points)} points, {len(run.left_out)} left out, wrong: {wrong or 'none'}")
    return 1 if wrong else 0


def finish(run: Run, result: dict[str, Any], out: Path) -> list[str]:
    """Write what was found, and return which of our backends were wrong."""
    with_shares(run.points, result["limits"])
    wrong = sorted({row["candidate"] for row in run.points if row["is_ours"] and not row["is_right"]})
    result |= {"points": run.points, "absent": run.absent, "left_out": run.left_out, "wrong": wrong}
    result["seconds"] = run.deadline.elapsed_s
    out.mkdir(parents=True, exist_ok=True)
    write_result(out / "moe.json", result)
    (out / "moe.svg").write_text(roofline_svg(run.shape, H200, run.points), encoding="utf-8")
    return wrong


if __name__ == "__main__":
    raise SystemExit(main())
