"""Tiles around those that `runtime.kernels.moe.configs.choose` takes, timed in one run on one GPU of under ten minutes.

    PYTHONPATH=. python benchmarks/moe_tune.py [--out FOLDER] [--seconds 540] [--shape GLM-4.6] [--kind NAME]...
    TRITON_INTERPRET=1 PYTHONPATH=. python benchmarks/moe_tune.py --dry-run --out FOLDER

For each scheme and number of tokens: of up and of down, block_n, warps, stages and persistence, one changed at a time;
then the forms on either side (GEMV, smaller and larger blocks of tokens, the other operand on the left); then the best
up with the best down. Whatever is timed was held against the torch twin of the chosen tiles before, on all inputs, and
in its graph after that. Tiles without room in shared memory are refused before they are compiled. Writes moe_tune.json,
after each point anew: what is faster than the chosen tiles, and what would have to change in `choose`, as `suggested`.

`--dry-run` goes through all of it with a tiny layer in triton's interpreter: results are checked, nothing is timed.
"""

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure import write_result
from benchmarks.moe import RESULTS, TINY, facts
from benchmarks.moe_cold import COLD_TOKENS, copies_of, l2_bytes
from benchmarks.moe_compile import Case, compile_all
from benchmarks.moe_layers import MAX_CODES_ERROR, MAX_ERROR, make_batch, make_experts, make_layer
from benchmarks.moe_peers import Candidate, in_turn, of_backend
from benchmarks.moe_run import KINDS, error_of, is_right, kind_name, worst_error
from benchmarks.moe_timing import FAILURES, Deadline, reason, time_in_turn
from benchmarks.moe_variants import BOTH, DOWN, UP, FixedTiles, Variant, changes, refusal, rows_per_expert, variants
from runtime.kernels.mode import is_interpreted
from runtime.kernels.moe.configs import GEMV_ROWS, HOPPER, WIDE_ROWS, Tiles
from runtime.moe.cost import SHAPES, LayerShape
from runtime.moe.experts import LocalExperts
from runtime.moe.fused_inputs import capability_of
from runtime.moe.fused_ops import FusedOps

# on both sides of each number of rows at which the form changes
TOKENS = (1, 4, 8, 64, 256, 512, 1024, 4096)
DRY_TOKENS = 3
BATCHES, DRY_BATCHES = 4, 1
# the share of a run for what compiles ahead, and what a point may take
COMPILE_END, POINT_S = 0.25, 12.0
# less is no reason to change anything
MARGIN = 0.02
WHOLE = slice(None)


@dataclass(slots=True)
class Tuning:
    """One run: what it measures with, and what it found."""

    shape: LayerShape
    device: torch.device
    deadline: Deadline
    tokens: Sequence[int] = TOKENS
    points: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def is_dry(self) -> bool:
        """Whether results are checked only, of a tiny layer that has the tiles of the real one."""
        return self.device.type != "cuda"

    def run(self, kinds: Sequence[tuple[Any, bool]], write: Callable[[], None]) -> None:
        """Measure all points for which there is time."""
        for scheme, is_quantized in kinds:
            layer = make_layer(TINY if self.is_dry else self.shape, scheme, self.device)
            experts = make_experts(layer, is_quantized=is_quantized)
            for num_tokens in self.tokens:
                name = f"{kind_name(experts)}, {num_tokens} tokens"
                if not self.deadline.has(POINT_S):
                    self.left_out.append(name)
                    continue
                print(name, file=sys.stderr, flush=True)
                try:
                    self.points.append(self.point(experts, num_tokens))
                except FAILURES as error:
                    traceback.print_exc()
                    self.failed[name] = reason(error)
                write()
            del layer, experts
            if not self.is_dry:
                torch.cuda.empty_cache()

    def point(self, experts: LocalExperts, num_tokens: int) -> dict[str, Any]:
        """Return what became of each variant, and what is suggested."""
        scheme, is_quantized = experts.weights.scheme, experts.multiplies_codes
        tried = variants(self.shape, scheme, num_tokens, is_quantized=is_quantized)
        around, base = Around(self, experts, num_tokens, tried[0].tiles), tried[0]
        rows = around.measure(tried)
        best = {op: fastest(base, [(one, row) for one, row in zip(tried, rows, strict=True) if one.op in ("", op)])
                for op in (UP, DOWN, BOTH)}  # fmt: skip
        joined = replace(base.tiles, up=best[UP].tiles.up, down=best[DOWN].tiles.down)
        # each once, and the chosen ones by themselves: without another up or down the joined are the same
        finalists = {one.tiles: one for one in (Variant(BOTH, ", ".join(changes(base.tiles, joined)), joined),
                                                best[BOTH]) if one.tiles != base.tiles}  # fmt: skip
        last = [base, *finalists.values()]
        # those that were the fastest of many once more, beside the chosen ones alone
        again = around.measure(last) if len(last) > 1 else []
        chosen = fastest(base, list(zip(last, again, strict=False)))
        rows_each = rows_per_expert(self.shape, num_tokens)
        found = {"scheme": str(scheme), "inputs_as_codes": is_quantized, "tokens": num_tokens}
        found |= {"rows_per_expert": rows_each, "layers_in_turn": around.num_layers, "chosen": asdict(base.tiles)}
        found |= {"variants": rows, "again": again}
        if chosen.tiles != base.tiles:
            found["suggested"] = suggestion(base, chosen, rows_each)
        return found


class Around:
    """The inputs of one point, and the results that all variants are held against."""

    def __init__(self, tuning: Tuning, experts: LocalExperts, num_tokens: int, base: Tiles) -> None:
        self.experts, self.device, self.is_dry = experts, tuning.device, tuning.is_dry
        shape, size = (TINY, DRY_TOKENS) if tuning.is_dry else (tuning.shape, num_tokens)
        seeds = range(DRY_BATCHES if tuning.is_dry else BATCHES)
        self.batches = [make_batch(shape, size, "uniform", tuning.device, seed) for seed in seeds]
        cache = l2_bytes(tuning.device) if num_tokens <= COLD_TOKENS else 0
        self.layers = copies_of(experts, shape, cache)
        self.num_layers = len(self.layers)
        twin = self._candidate("twin", experts, FusedOps.of_twins(), base)
        self.expected = [twin.run(batch).float() for batch in self.batches]
        self.limit = MAX_CODES_ERROR if experts.multiplies_codes else MAX_ERROR

    def measure(self, tried: Sequence[Variant]) -> list[dict[str, Any]]:
        """Return a row for each: why it cannot run, or its error, and its time if it is right."""
        rows = [{"op": one.op, "change": one.change} for one in tried]
        works = {}
        for place, (one, row) in enumerate(zip(tried, rows, strict=True)):
            why = refusal(self.experts.weights.scheme, one.tiles, is_quantized=self.experts.multiplies_codes)
            if why:
                row |= {"refused": why, "is_right": False}
                continue
            ops = FusedOps.of_kernels()
            candidate = in_turn([[self._candidate(str(place), layer, ops, one.tiles)] for layer in self.layers])[0]
            work = candidate.on(self.batches)
            error = worst_error(work, candidate.num_inputs(self.batches), self._error)
            row |= {"relative_error": error, "is_right": is_right(error, self.limit)}
            if row["is_right"]:
                works[str(place)] = (work, True)
        num_inputs = max(len(self.batches), self.num_layers)
        timings = time_in_turn(works, num_inputs, self.device, self._is_right)
        for place, timing in timings.items():
            rows[int(place)] |= {"time": timing.as_dict(), "is_right": not timing.is_wrong}
        return rows

    def _candidate(self, name: str, experts: LocalExperts, ops: FusedOps, tiles: Tiles) -> Candidate:
        return of_backend(name, FixedTiles(ops, tiles=tiles), experts, self.device)

    def _error(self, number: int, found: torch.Tensor) -> float | str:
        return error_of(found, WHOLE, self.expected[number % len(self.batches)])

    def _is_right(self, number: int, found: torch.Tensor) -> bool:
        return is_right(self._error(number, found), self.limit)


def fastest(base: Variant, measured: Sequence[tuple[Variant, dict[str, Any]]]) -> Variant:
    """Return the fastest variant, or the base if that is not slower by more than MARGIN and in every round."""
    times = {one: row["time"] for one, row in measured if row["is_right"] and "time" in row}
    times = {one: time for one, time in times.items() if time["median_us"] is not None}
    if base not in times:
        return base
    best = min(times, key=lambda one: times[one]["median_us"])
    is_faster = times[best]["median_us"] < (1 - MARGIN) * times[base]["median_us"]
    return best if is_faster and times[best]["max_us"] < times[base]["min_us"] else base


def suggestion(base: Variant, best: Variant, rows: float) -> list[str]:
    """Return what would have to change in `choose` for so many rows per expert."""
    found = changes(base.tiles, best.tiles)
    if best.tiles.is_gemv != base.tiles.is_gemv:
        found.append(f"GEMV_ROWS {GEMV_ROWS} -> {'more than' if best.tiles.is_gemv else 'at most'} {rows:g}")
    elif best.tiles.up.swap_ab != base.tiles.up.swap_ab:
        found.append(f"WIDE_ROWS {WIDE_ROWS} -> {'more than' if best.tiles.up.swap_ab else 'at most'} {rows:g}")
    return found


def compile_ahead(tuning: Tuning, kinds: Sequence[tuple[Any, bool]]) -> dict[str, Any]:
    """Compile all variants that are not refused, and return what came of it."""
    if tuning.is_dry or capability_of(tuning.device) != HOPPER:
        return {"left_out": "tiles are those of Hopper"}
    cases: dict[Any, Case] = {}
    for scheme, is_quantized in kinds:
        for num_tokens in tuning.tokens:
            found = variants(tuning.shape, scheme, num_tokens, is_quantized=is_quantized)
            fitting = (one.tiles for one in found if not refusal(scheme, one.tiles, is_quantized=is_quantized))
            for tiles in fitting:
                case = Case(tuning.shape, scheme, is_quantized, False, num_tokens, tiles)
                cases.setdefault((scheme, is_quantized, tiles), case)
    return compile_all(list(cases.values()), COMPILE_END * tuning.deadline.seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure and write; 1 if the chosen tiles were wrong anywhere, or a point failed."""
    names = {f"{scheme}{', codes' if is_quantized else ''}": (scheme, is_quantized) for scheme, is_quantized in KINDS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--seconds", type=float, default=540.0)
    parser.add_argument("--shape", choices=list(SHAPES), default="GLM-4.6")
    parser.add_argument("--kind", choices=list(names), action="append", help="scheme of weights; default: all")
    parser.add_argument("--tokens", type=int, action="append", help="of a batch; default: those around boundaries")
    parser.add_argument("--dry-run", action="store_true")
    args = parser.parse_args(arguments)
    if args.dry_run and not is_interpreted():
        raise SystemExit("a dry run needs TRITON_INTERPRET=1 in the environment")
    if not args.dry_run and (is_interpreted() or not torch.cuda.is_available()):
        raise SystemExit("there is no CUDA GPU, or kernels are interpreted: use --dry-run")
    device = torch.device("cpu" if args.dry_run else "cuda")
    tuning = Tuning(SHAPES[args.shape], device, Deadline(args.seconds), args.tokens or TOKENS)
    kinds = [names[name] for name in args.kind or names]
    result: dict[str, Any] = {"is_measured": not args.dry_run, "environment": facts(device), "shape": args.shape}
    result |= {"compiled": compile_ahead(tuning, kinds), "points": tuning.points, "left_out": tuning.left_out}
    result["failed"] = tuning.failed

    def write() -> None:
        result["seconds"] = tuning.deadline.elapsed_s
        args.out.mkdir(parents=True, exist_ok=True)
        write_result(args.out / "moe_tune.json", result)

    tuning.run(kinds, write)
    write()
    for point in tuning.points:
        for line in point.get("suggested", ()):
            print(f"{point['scheme']}, codes {point['inputs_as_codes']}, {point['tokens']} tokens: {line}")
    wrong = [point for point in tuning.points if not point["variants"][0]["is_right"]]
    counts = f"{len(tuning.points)} points, {len(tuning.left_out)} left out"
    print(f"{counts}, wrong as chosen: {len(wrong)}, failed: {tuning.failed or 'none'}")
    return 1 if wrong or tuning.failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
