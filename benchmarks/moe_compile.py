"""Compile what a run will launch, in many processes, before anything is timed; machine code goes to triton's cache.

A process knows the launches from tensors on the meta device, which have sizes and no memory. What fails here, or comes
too late, is compiled when it is launched first.
"""

import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.moe_layers import Batch, make_experts
from benchmarks.moe_timing import FAILURES, reason
from benchmarks.moe_variants import FixedTiles, tiles_of
from runtime.kernels.launch import Launch
from runtime.kernels.moe.configs import Tiles
from runtime.moe.cost import LayerShape
from runtime.moe.dispatcher import Slots
from runtime.moe.fused_ops import FusedOps
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme, ExpertWeights, Packed
from runtime.moe.workspace import Workspace

META = torch.device("meta")


@dataclass(frozen=True, slots=True)
class Case:
    """A layer and a number of tokens that take tiles of their own.

    Args:
        shape: of the layer.
        scheme: of its weights.
        is_quantized: inputs are codes.
        is_batch_invariant: tiles are those for any number of tokens.
        num_tokens: of a batch.
        given: tiles instead of those that are chosen.
    """

    shape: LayerShape
    scheme: ExpertScheme
    is_quantized: bool
    is_batch_invariant: bool
    num_tokens: int
    given: Tiles | None = None

    @property
    def tiles(self) -> Tiles:
        """What our kernels take."""
        return self.given or tiles_of(
            self.shape,
            self.scheme,
            self.num_tokens,
            is_quantized=self.is_quantized,
            is_batch_invariant=self.is_batch_invariant,
        )


def cases(shape: LayerShape, kinds: tuple[tuple[ExpertScheme, bool], ...], tokens: tuple[int, ...]) -> Iterator[Case]:
    """Yield one case for all that take the same tiles."""
    seen = set()
    for scheme, is_quantized in kinds:
        for is_batch_invariant in (False, True):
            for num_tokens in tokens:
                case = Case(shape, scheme, is_quantized, is_batch_invariant, num_tokens)
                if (scheme, is_quantized, case.tiles) not in seen:
                    seen.add((scheme, is_quantized, case.tiles))
                    yield case


def blank_layer(shape: LayerShape, scheme: ExpertScheme) -> ExpertWeights:
    """Return experts without memory, laid out as `make_layer` makes them."""
    hidden, wide = shape.hidden_size, shape.intermediate_size
    up, down = _blank(shape, scheme, 2 * wide, hidden, kinds=2), _blank(shape, scheme, hidden, wide, kinds=1)
    return ExpertWeights(scheme, up, down, shape.num_routed, shape.num_shared, hidden, wide)


def _blank(shape: LayerShape, scheme: ExpertScheme, rows: int, columns: int, *, kinds: int) -> Packed:
    num = shape.num_experts

    def empty(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(num, *sizes, dtype=dtype, device=META)

    if scheme is ExpertScheme.NVFP4:
        scales = empty(rows, columns // GROUP, dtype=torch.float8_e4m3fn)
        return Packed(empty(rows, columns // 2, dtype=torch.uint8), scales, empty())
    codes = empty(rows, columns, dtype=scheme.code_dtype)
    if scheme.is_plain:
        return Packed(codes)
    if scheme is ExpertScheme.FP8_BLOCK:
        blocks = -(-rows // kinds // BLOCK), -(-columns // BLOCK)
        return Packed(codes, empty(2, *blocks) if kinds == 2 else empty(*blocks))
    return Packed(codes, empty(rows))


def blank_batch(shape: LayerShape, num_tokens: int) -> Batch:
    """Return tokens without memory."""
    size = (num_tokens, shape.num_slots)
    ids_TK, weights_TK = torch.empty(size, dtype=torch.int32, device=META), torch.empty(size, device=META)
    slots = Slots(ids_TK, weights_TK, shape.num_experts, shape.num_shared)
    return Batch(torch.empty(num_tokens, shape.hidden_size, dtype=torch.bfloat16, device=META), slots)


def compile_case(case: Case) -> tuple[int, str]:
    """Compile what a layer launches; return how many kernels these are, and why it failed, if it did."""
    launched: list[Launch] = []

    def warm_up(launch: Launch) -> tuple[torch.Tensor, ...]:
        launched.append(launch)
        launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants, **launch.options)
        return launch.outputs

    batch, experts = blank_batch(case.shape, case.num_tokens), blank_layer(case.shape, case.scheme)
    fused = FixedTiles(FusedOps.of_kernels(), tiles=case.tiles)
    local = make_experts(experts, is_quantized=case.is_quantized)
    with patch.object(Launch, "run", warm_up):
        try:
            fused.run(batch.hidden_TH, batch.slots, local, Workspace(META), torch.empty_like(batch.hidden_TH))
        except FAILURES as error:
            return len(launched), f"{case.scheme}, {case.num_tokens} tokens: {reason(error)}"
    return len(launched), ""


def compile_all(found: list[Case], seconds: float) -> dict[str, Any]:
    """Compile cases in as many processes as there are processors; return what came of it.

    Args:
        found: the cases.
        seconds: after which what is not compiled is left.
    """
    start = time.monotonic()
    pool = ProcessPoolExecutor(os.cpu_count(), get_context("spawn"))
    done, late = wait([pool.submit(compile_case, case) for case in found], timeout=seconds)
    pool.shutdown(wait=not late, cancel_futures=True)
    failures = [reason(error) for one in done if isinstance(error := one.exception(), Exception)]
    made = [one.result() for one in done if one.exception() is None]
    return {
        "cases": len(found),
        "late": len(late),
        "kernels": sum(count for count, _ in made),
        "failures": failures + [failure for _, failure in made if failure],
        "seconds": time.monotonic() - start,
    }
