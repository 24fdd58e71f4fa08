"""What a run measures, in stages that each end in time: our backends, others beside them, further routings.

Ours come first, for every scheme: nobody else's fault then costs more than what is still to come.
"""

import gc
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.moe_cold import COLD_TOKENS, copies_of, l2_bytes
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
from benchmarks.moe_peers import Candidate, in_turn, ours, peers
from benchmarks.moe_timing import FAILURES, Deadline, profiled_launches, reason, time_in_turn
from runtime.moe.cost import LayerShape, floor, touched_bytes
from runtime.moe.experts import LocalExperts
from runtime.moe.weights import ExpertScheme

# schemes, and whether inputs are codes as well
KINDS = (
    (ExpertScheme.BF16, False),
    (ExpertScheme.FP8_CHANNEL, True),
    (ExpertScheme.FP8_BLOCK, True),
    (ExpertScheme.INT8_CHANNEL, False),
    (ExpertScheme.NVFP4, False),
    (ExpertScheme.FP8_CHANNEL, False),
    (ExpertScheme.INT8_W8A8, True),
)
# different activations and routings in one graph
BATCHES = 4
# what a point may take, of which nothing is known yet; and how much longer the next larger one may
POINT_S, GROWTH = 4.0, 2.5
# of the time of a run, when each stage is over
OWN_END, PEERS_END, ROUTINGS_END = 0.48, 0.70, 0.96
EAGER = ", without a graph"
# of those that no graph holds, launches are counted for so many
COUNTED_TOKENS = (1, 16, 256)


@dataclass(slots=True)
class Run:
    """One run of the benchmark: what it measures with, and what it found.

    Args:
        l2_bytes: of the cache that a few tokens must not find weights in; None: the device's.
    """

    shape: LayerShape
    tokens: Sequence[int]
    device: torch.device
    deadline: Deadline
    num_batches: int = BATCHES
    l2_bytes: int | None = None
    points: list[dict[str, Any]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)

    def measure_own(self) -> None:
        """Fill in points of our backends: each scheme, uniform routing."""
        until = self.deadline.part(OWN_END)
        for scheme, is_quantized in KINDS:
            experts = make_experts(make_layer(self.shape, scheme, self.device), is_quantized=is_quantized)
            self._sizes(experts, self._ours, [("uniform", size) for size in self.tokens], until)
            del experts
            self.free()

    def measure_peers(self) -> None:
        """Fill in points of everybody for bf16, with and without graphs."""
        experts = make_experts(make_layer(self.shape, ExpertScheme.BF16, self.device), is_quantized=False)

        def everybody(one: LocalExperts) -> list[Candidate]:
            others, absent = peers(one.weights)
            self.absent |= absent
            return [*self._ours(one), *others]

        until, first = self.deadline.part(PEERS_END), len(self.points)
        self._sizes(experts, everybody, [("uniform", size) for size in self.tokens], until, is_beside=True)
        for row in self.points[first:]:
            row["beside_peers"] = True
        del experts
        self.free()

    def measure_routings(self) -> None:
        """Fill in points of our backends where some experts have far more rows than others."""
        until = self.deadline.part(ROUTINGS_END)
        for scheme, is_quantized in KINDS:
            experts = make_experts(make_layer(self.shape, scheme, self.device), is_quantized=is_quantized)
            step = 2 if scheme is ExpertScheme.BF16 else 4
            sizes = [(routing, size) for routing in ROUTINGS[1:] for size in self.tokens[::step]]
            self._sizes(experts, self._ours, sizes, until)
            del experts
            self.free()

    def count_launches(self) -> dict[str, dict[int, int | str | None]]:
        """Return launches by candidate and tokens of those that no graph holds; see `profiled_launches`."""
        weights = make_layer(self.shape, ExpertScheme.BF16, self.device)
        others = [one for one in peers(weights)[0] if not one.is_graphable]
        found: dict[str, dict[int, int | str | None]] = {one.name: {} for one in others}
        for num_tokens in (size for size in self.tokens if size in COUNTED_TOKENS):
            batch = make_batch(self.shape, num_tokens, "uniform", self.device, seed=0)
            for one in (one for one in others if one.max_tokens is None or num_tokens <= one.max_tokens):
                if not self.deadline.has(POINT_S):
                    self.left_out.append(f"launches of {one.name}, {num_tokens} tokens")
                    continue
                found[one.name][num_tokens] = self._profiled(one, batch)
        return found

    def _profiled(self, candidate: Candidate, batch: Batch) -> int | str | None:
        if self.device.type != "cuda":
            return None
        try:
            return profiled_launches(lambda _: candidate.run(batch))
        except FAILURES as error:
            return reason(error)

    def copies(self, experts: LocalExperts) -> list[LocalExperts]:
        """Return a layer and copies of it, for few tokens: as many as no cache holds the shared experts of."""
        size = l2_bytes(self.device) if self.l2_bytes is None else self.l2_bytes
        return copies_of(experts, self.shape, size)

    def _ours(self, experts: LocalExperts) -> list[Candidate]:
        return list(ours(experts, self.device))

    def _sizes(
        self,
        experts: LocalExperts,
        make: Callable[[LocalExperts], list[Candidate]],
        sizes: Sequence[tuple[str, int]],
        until: Deadline,
        *,
        is_beside: bool = False,
    ) -> None:
        """Measure routings and tokens; of a few tokens on copies of the layer in turn."""
        candidates = make(experts)
        few = [size for size in sizes if size[1] <= COLD_TOKENS]
        if few and until.has(POINT_S):
            others = [make(copy) for copy in self.copies(experts)[1:]]
            self._series(experts, in_turn([candidates, *others]), few, until, is_beside=is_beside)
            sizes = [size for size in sizes if size not in few]
            del others
            self.free()
        self._series(experts, candidates, sizes, until, is_beside=is_beside)

    def _series(
        self,
        experts: LocalExperts,
        candidates: Sequence[Candidate],
        sizes: Iterable[tuple[str, int]],
        until: Deadline,
        *,
        is_beside: bool = False,
    ) -> None:
        """Measure routings and tokens, as many as there is time for, judging by the one before."""
        expected_s = POINT_S
        for routing, num_tokens in sizes:
            name = f"{kind_name(experts)}, {routing}, {num_tokens} tokens{', beside others' if is_beside else ''}"
            if not until.has(expected_s):
                self.left_out.append(name)
                continue
            print(name, file=sys.stderr, flush=True)
            start = time.monotonic()
            self.points += self.point(experts, candidates, routing, num_tokens, is_beside=is_beside)
            expected_s = max(POINT_S, GROWTH * (time.monotonic() - start))

    def free(self) -> None:
        """Give memory back: what is left of a layer has no room beside the next one."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def point(
        self,
        experts: LocalExperts,
        candidates: Sequence[Candidate],
        routing: str,
        num_tokens: int,
        *,
        is_beside: bool = False,
    ) -> list[dict[str, Any]]:
        """Return a row for each candidate that takes so many tokens: its error, then, if it is right, its time.

        Args:
            experts: that candidates compute.
            candidates: in the order of their turns.
            routing: one of ROUTINGS.
            num_tokens: of a batch.
            is_beside: time those that a graph can hold without one as well, as some of the others cannot be held.
        """
        batches = [make_batch(self.shape, num_tokens, routing, self.device, seed) for seed in range(self.num_batches)]
        running = [one for one in candidates if one.max_tokens is None or num_tokens <= one.max_tokens]
        chosen, num_inputs = checked_rows(num_tokens, self.device), candidates[0].num_inputs(batches)
        expected = [reference(batch, experts, chosen) for batch in batches]

        def error(number: int, found: torch.Tensor) -> float | str:
            return error_of(found, chosen, expected[number % len(batches)])

        errors = {one.name: worst_error(one.on(batches), num_inputs, error) for one in running}
        limit = MAX_CODES_ERROR if experts.multiplies_codes else MAX_ERROR
        works = {one.name: (one.on(batches), one.is_graphable) for one in running if is_right(errors[one.name], limit)}
        if is_beside:
            works |= {f"{name}{EAGER}": (work, False) for name, (work, is_graph) in works.items() if is_graph}
        timings = time_in_turn(
            works, num_inputs, self.device, lambda number, found: is_right(error(number, found), limit)
        )
        common, rows = self._facts(experts, batches, routing), []
        for one in running:
            row = {"candidate": one.name, "is_ours": one.is_ours, "version": one.version, **common}
            row |= {"layers_in_turn": 1 + len(one.others), "checked_inputs": num_inputs}
            row |= {"relative_error": errors[one.name], "is_right": is_right(errors[one.name], limit)}
            if one.name in timings:
                row["is_right"] = not timings[one.name].is_wrong
                row["time"] = timings[one.name].as_dict()
                if f"{one.name}{EAGER}" in timings:
                    row["time_without_graph"] = timings[f"{one.name}{EAGER}"].as_dict()
                if not one.is_compiled:
                    row["operations"] = count(lambda one=one: one.run(batches[0])).launches
            rows.append(row)
        return rows

    def _facts(self, experts: LocalExperts, batches: Sequence[Batch], routing: str) -> dict[str, Any]:
        """Return what the rows of a point have in common: what was multiplied, and what that takes at least."""
        scheme, num_tokens = experts.weights.scheme, len(batches[0].hidden_TH)
        num_distinct = sum(batch.num_distinct for batch in batches) / len(batches)
        least = floor(self.shape, scheme, num_tokens, is_quantized=experts.multiplies_codes)
        # the experts that were drawn, in place of those that are expected
        touched = touched_bytes(self.shape, scheme, num_tokens)
        drawn = touched / (expected_touched(self.shape, num_tokens)) * (num_distinct + self.shape.num_shared)
        return {
            "scheme": str(scheme),
            "inputs_as_codes": experts.multiplies_codes,
            "routing": routing,
            "tokens": num_tokens,
            "distinct_experts": num_distinct,
            "least_bytes": least.num_bytes - touched + drawn,
            "flop": least.flop,
            "flop_speedup": least.flop_speedup,
        }


def kind_name(experts: LocalExperts) -> str:
    """Return a scheme, and how it is multiplied."""
    return f"{experts.weights.scheme}{', inputs as codes' if experts.multiplies_codes else ''}"


def worst_error(
    work: Callable[[int], torch.Tensor], num_inputs: int, error: Callable[[int, torch.Tensor], float | str]
) -> float | str:
    """Return the largest error of all inputs, or why one has none."""
    worst = 0.0
    for number in range(num_inputs):
        try:
            found = error(number, work(number))
        except FAILURES as failure:
            return reason(failure)
        if isinstance(found, str):
            return found
        worst = max(worst, found)
    return worst


def error_of(found_TH: torch.Tensor, chosen_R: torch.Tensor | slice, expected_RH: torch.Tensor) -> float | str:
    """Return how far a result is from the reference on the chosen rows, or that it is none."""
    return relative_error(found_TH[chosen_R], expected_RH) if bool(torch.isfinite(found_TH).all()) else "not finite"


def expected_touched(shape: LayerShape, num_tokens: int) -> float:
    """Return the experts that a floor counts."""
    return touched_bytes(shape, ExpertScheme.BF16, num_tokens) / (2 * shape.expert_weights)


def is_right(error: float | str, limit: float) -> bool:
    """Whether a result may be timed: there is one, and it is no further from the reference than the limit."""
    return isinstance(error, float) and error < limit


def batches_of(run: Run, num_tokens: int) -> Iterator[Batch]:
    """Yield what one graph goes round."""
    yield from (make_batch(run.shape, num_tokens, "uniform", run.device, seed) for seed in range(run.num_batches))
