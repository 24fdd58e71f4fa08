"""What the grid of grouped products does not say: that it sees faults, that rows do not depend on each other, codes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
import triton
import triton.language as tl

from converters.formats.inputs import InputCode, InputScheme
from runtime.kernels.moe import down, grouped, up
from runtime.kernels.moe import quantize_fp4 as fp4
from runtime.kernels.moe import quantize_rows as kernel
from runtime.kernels.twins import quantize_fp4 as fp4_twin
from runtime.kernels.twins import quantize_rows as twin
from runtime.model.activations import InputQuantizer
from runtime.moe.inputs import QuantizedRows, new_quantized_rows
from runtime.moe.layouts import MaskedRows, contiguous_rows, masked_rows
from runtime.moe.weights import unpacked_e2m1
from tests.runtime.kernels.moe_grouped import LARGE, SMALL, Case, experts_of_rows, run_case
from tests.runtime.kernels.moe_layers import Layer

TINY = Layer(tokens=5, experts=3, hidden=48, intermediate=32)


@triton.jit
def _unwidened(left, right, total):
    return tl.dot(left, right, total)


@triton.jit
def _truncated(value, dtype: tl.constexpr):
    return value.to(dtype)


@triton.jit
def _as_stored(value, dtype: tl.constexpr):
    return value


@contextmanager
def patched(owner: ModuleType | type, name: str, value: Any) -> Iterator[None]:
    kept = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, kept)


def canaries() -> dict[str, dict[str, Any]]:
    """Return what the grid says of kernels with a fault."""
    found = {}
    with patched(grouped, "product", _unwidened), patched(grouped, "operand", _as_stored):
        found["bits of bf16 multiplied"] = run_case(Case(TINY, SMALL))
    with patched(down, "stored", _truncated):
        found["results truncated"] = run_case(Case(replace(TINY, exact=True), SMALL))
    return found


def properties() -> dict[str, Any]:
    """Return what should be empty, or true, of everything else."""
    return {
        "dependent rows": dependent_rows(),
        "wrong codes": wrong_codes() + wrong_fp4_codes(),
        "NaN spreads": spread_of_nan(),
    }


def results(layer: Layer, ids: torch.Tensor, hidden: torch.Tensor, config: Any) -> torch.Tensor:
    """Return slots' results (T, K, H) of some tokens."""
    weights, rows = layer.weights(), contiguous_rows(ids, layer.experts, config.block_m)
    act = torch.zeros(len(rows.slots_P), layer.intermediate, dtype=layer.dtype)
    up.up(hidden, weights, rows, act, config)
    out = torch.zeros(ids.numel(), layer.hidden, dtype=layer.dtype)
    down.down(act, weights, rows, torch.ones(ids.shape), out, config)
    return out.view(*ids.shape, -1)


def dependent_rows() -> list[str]:
    """Return in which batches the first token's result is not that of the token alone."""
    found = []
    for swap_ab in (False, True):
        config = replace(LARGE, swap_ab=swap_ab, block_n=64, block_k=64)
        layer = replace(TINY, tokens=40, hidden=144, intermediate=80, experts=4)
        hidden, ids = layer.given(layer.tokens, layer.hidden), layer.topk_ids()
        alone = results(layer, ids[:1], hidden[:1], config)
        for tokens in (2, 17, 40):
            # first in its blocks, and last
            for order in (torch.arange(tokens), torch.arange(tokens).flip(0)):
                together = results(layer, ids[order], hidden[order], config)
                if not torch.equal(together[order.argsort()[0]], alone[0]):
                    found.append(f"{tokens} tokens, {swap_ab=}, {order[0]=}")
    return found


def spread_of_nan() -> int:
    """Return how many results of other tokens a token that is NaN changes, or -1 if its own are numbers."""
    hidden, ids = TINY.given(TINY.tokens, TINY.hidden), torch.tensor([[0, 1]] * TINY.tokens)
    before = results(TINY, ids, hidden, SMALL)
    hidden[2] = torch.nan
    after = results(TINY, ids, hidden, SMALL)
    changed = (before != after).flatten(1).any(1)
    changed[2] = False
    return int(changed.sum()) if bool(after[2].isnan().all()) else -1


def wrong_codes() -> list[str]:
    """Return where codes of rows are not the twin's, or their values not those of simulated inputs."""
    found = []
    codes = {torch.float8_e4m3fn: InputCode.FP8, torch.int8: InputCode.INT8}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for code_dtype, code in codes.items():
            for columns, is_grouped in ((200, False), (384, True), (128, False)):
                name = f"{dtype} {code_dtype} {columns} {is_grouped=}"
                values = _hard_rows(columns).to(dtype)
                # row 3 is nobody's, and a slot has no row
                position = torch.tensor([*range(len(values))], dtype=torch.int32).flip(0)
                position[position == 3] = -1
                outs = [
                    new_quantized_rows(len(values), columns, code_dtype, values.device, is_grouped=is_grouped)
                    for _ in range(2)
                ]
                for out in outs:
                    out.codes.view(torch.uint8).fill_(0x11)
                    out.scales.fill_(7)
                kernel.quantize_rows(values, outs[0], position)
                twin.quantize_rows(values, outs[1], position)
                if not torch.equal(outs[0].codes.view(torch.uint8), outs[1].codes.view(torch.uint8)):
                    found.append(f"{name}: codes")
                if not torch.equal(outs[0].scales, outs[1].scales) or not bool((outs[0].scales[3] == 7).all()):
                    found.append(f"{name}: scales")
                scheme = InputScheme(code, is_static=False, group=128 if is_grouped else 0)
                simulated = InputQuantizer(scheme)(values.float())
                width = 128 if is_grouped else columns
                made = outs[0].codes.float() * outs[0].scales.repeat_interleave(width, 1)
                used = position[position >= 0].long()
                if not torch.equal(made[used], simulated[used]):
                    found.append(f"{name}: values")
    return found


def wrong_fp4_codes() -> list[str]:
    """Return where NVFP4 codes of rows are not the twin's, or their values not those of simulated inputs."""
    found, factors = [], torch.tensor([2688 / 4.5, 90.0, 1e-3, 3e6])
    values = _hard_rows(208)
    ids = torch.tensor([[0, 1], [2, 3], [-1, 0], [3, 2], [1, -1], [2, 0], [1, 3], [0, 3], [-1, -1]])
    for name, rows in (("blocks", contiguous_rows(ids, 4, 16)), ("masked", masked_rows(ids, 4, 9))):
        slots = (rows.slots if isinstance(rows, MaskedRows) else rows.slots_P).flatten().long()
        for is_gathered, given in ((True, values), (False, values[slots.clamp(min=0) // 2].bfloat16())):
            sizes, outs = len(slots), []
            for make in (fp4, fp4_twin):
                scales = torch.full((sizes, 13), 7.0).to(torch.float8_e4m3fn)
                out = QuantizedRows(torch.full((sizes, 104), 0x11, dtype=torch.uint8), scales, is_laid_out=True)
                outs.append(make.quantize_fp4_rows(given, factors, rows, out, is_gathered=is_gathered))
            if not torch.equal(outs[0].codes, outs[1].codes):
                found.append(f"fp4 {name} {is_gathered=}: codes")
            if not torch.equal(outs[0].scales.view(torch.uint8), outs[1].scales.view(torch.uint8)):
                found.append(f"fp4 {name} {is_gathered=}: scales")
            if not bool((outs[0].codes[slots < 0] == 0x11).all()):
                found.append(f"fp4 {name} {is_gathered=}: rows that are not used")
            experts = experts_of_rows(rows)
            for row in (slots >= 0).nonzero().flatten().tolist():
                factor = float(factors[experts[row]])
                simulated = InputQuantizer(InputScheme(InputCode.NVFP4, 16, is_static=True), factor)
                source = given[slots[row] // 2 if is_gathered else row].float()
                made = unpacked_e2m1(outs[0].codes[row]) * (outs[0].scales[row].float() / factor).repeat_interleave(16)
                if not torch.equal(made, simulated(source[None])[0]):
                    found.append(f"fp4 {name} {is_gathered=}: values of row {row}")
    return found


def _hard_rows(columns: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(3)
    normal = torch.randn(5, columns, generator=g)
    half_steps = ((torch.arange(columns) % 256) - 127.5).clamp(-127, 127)
    tiny = torch.randn(1, columns, generator=g) * 2.0**-20
    return torch.cat([normal, torch.zeros(1, columns), half_steps[None], tiny, normal[:1] * 1000])
