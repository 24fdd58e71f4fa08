"""Grouped products in the interpreter, and their twins, held against fp64; run as a program, it says what it found.

TRITON_INTERPRET=1 python -m tests.runtime.kernels.moe_grouped

How far a result may be off is derived, not tuned. With u = 2^-24, a sum of K products in fp32, whatever its order, is
off by at most g S, with g = (K + 4) u / (1 - (K + 4) u) and S the sum of the products' sizes: K - 1 additions, and at
most five roundings of products and scales. The slope of silu is below 1.1, and to compute it adds (8 + 2 |gate|) u of
its size: 4 u for exp, |gate| u twice for its argument where a GPU takes powers of two, and the rest for the sum, the
quotient and the products. The result is rounded once more, to 2^-8 of its size in bf16, 2^-11 in fp16.
Sums of `exact` layers are not rounded at all, hence neither is anything in down but the last two products: bit for bit.
"""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from runtime.kernels.moe.configs import HOPPER, TileConfig, choose
from runtime.moe.inputs import Inputs, QuantizedRows, Rows, new_quantized_rows
from runtime.moe.layouts import MaskedRows
from runtime.moe.weights import ExpertScheme, ExpertWeights
from tests.runtime.kernels.moe_layers import (
    GROUPED,
    NVFP4,
    NVFP4_EACH,
    PLAIN,
    ROW,
    Layer,
    exact_inputs,
    exact_weight,
    moved,
)

UNIT = 2.0**-24
ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
# half of the smallest fp16, and more than any fp32 sum here loses below its range
TINY = {torch.bfloat16: 2.0**-100, torch.float16: 2.0**-25, torch.float32: 2.0**-100}
# a value that no result has
KEPT = 30000.0
BF16, FP16, FP32, FP8_CHANNEL, FP8_BLOCK, INT8_CHANNEL, INT8_W8A8, FP4 = ExpertScheme
KINDS = (
    (BF16, torch.bfloat16, PLAIN),
    (FP16, torch.float16, PLAIN),
    (FP32, torch.float32, PLAIN),
    (FP8_CHANNEL, torch.bfloat16, PLAIN),
    (FP8_CHANNEL, torch.bfloat16, ROW),
    (FP8_CHANNEL, torch.bfloat16, GROUPED),
    (FP8_BLOCK, torch.float16, PLAIN),
    (FP8_BLOCK, torch.bfloat16, GROUPED),
    (INT8_CHANNEL, torch.bfloat16, PLAIN),
    (INT8_W8A8, torch.bfloat16, ROW),
    (INT8_W8A8, torch.float16, PLAIN),
    (FP4, torch.bfloat16, PLAIN),
    (FP4, torch.float16, PLAIN),
    (FP4, torch.bfloat16, NVFP4),
)
SMALL = TileConfig(16, 32, 32, 4, 2, swap_ab=False, persistent=True, tma=False)
LARGE = TileConfig(16, 128, 128, 4, 2, swap_ab=False, persistent=True, tma=False)
CODES = replace(LARGE, block_n=256)


@dataclass(frozen=True)
class Case:
    """A layer, a layout, and tiles; `native_fp4`: NVFP4 codes are multiplied as they are."""

    layer: Layer
    config: TileConfig = LARGE
    masked: bool = False
    writes_codes: bool = False
    native_fp4: bool = False


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    return {**dict(_schemes()), **dict(_shapes()), **dict(_routings())}


def _schemes() -> Iterator[tuple[str, Case]]:
    """Every scheme by every pair of form, layout and way to load, sums exact and not."""
    for scheme, dtype, inputs in KINDS:
        for number, (swap_ab, masked, tma) in enumerate(((0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0))):
            config = replace(LARGE, swap_ab=bool(swap_ab), tma=bool(tma), persistent=number % 2 == 0)
            layer = Layer(scheme, dtype, inputs, exact=number in (0, 3))
            form = f"{'swap' if swap_ab else 'wide'} {'masked' if masked else 'contiguous'}{' tma' if tma else ''}"
            yield f"{scheme} {inputs} {str(dtype)[6:]} {form}", Case(layer, config, bool(masked))
    for scheme in (FP8_CHANNEL, FP8_BLOCK):
        for intermediate in (160, 304):
            layer = Layer(scheme, inputs=GROUPED, hidden=128, intermediate=intermediate, experts=2)
            yield f"{scheme} writes codes {intermediate}", Case(layer, CODES, writes_codes=True)
            swapped = replace(CODES, swap_ab=True, tma=True)
            yield f"{scheme} writes codes {intermediate} swap", Case(layer, swapped, writes_codes=True)


def _shapes() -> Iterator[tuple[str, Case]]:
    """Numbers of tokens, shards of GLM-4.5-Air's 1408, tiles as chosen, numbers of experts."""
    some = (KINDS[0], KINDS[4], KINDS[11])
    for scheme, dtype, inputs in (*some, KINDS[7], KINDS[8], KINDS[9]):
        for tokens in (1, 17, 257):
            layer = Layer(scheme, dtype, inputs, tokens, hidden=48, intermediate=32)
            for masked in (False, True):
                config = replace(SMALL, block_m=64 if tokens > 17 else 16, block_n=64, block_k=64, swap_ab=masked)
                yield f"{scheme} {inputs} {tokens} tokens {masked=}", Case(layer, config, masked)
        for intermediate in (704, 352, 176):
            layer = Layer(scheme, dtype, inputs, 3, 3, 2, hidden=32, intermediate=intermediate)
            # 88 bytes are no place for a descriptor
            tma = scheme is not FP4 or intermediate != 176
            yield f"{scheme} {inputs} {intermediate} wide", Case(layer, replace(LARGE, tma=tma))
            yield f"{scheme} {inputs} {intermediate} swap", Case(layer, replace(LARGE, swap_ab=True, block_m=32))
    for scheme, dtype, inputs in some:
        for rows_per_expert in (1.0, 24.0, 48.0, 128.0):
            layer = Layer(scheme, dtype, inputs, 2, 3, 2, hidden=288, intermediate=160)
            tiles = choose(
                scheme,
                HOPPER,
                rows_per_expert,
                hidden_size=layer.hidden,
                intermediate_size=layer.intermediate,
                is_quantized=inputs != PLAIN,
            )
            yield f"{scheme} {inputs} chosen for {rows_per_expert:g}", Case(layer, tiles.up)
    for experts in (96, 160):
        layer = Layer(tokens=9, experts=experts, top_k=8, hidden=32, intermediate=16)
        yield f"{experts} experts", Case(layer, SMALL)
        yield f"{experts} experts masked", Case(layer, replace(SMALL, swap_ab=True), masked=True)


def _routings() -> Iterator[tuple[str, Case]]:
    """Choices per token, and the ways that experts and slots may be left out."""
    tiny = Layer(tokens=5, experts=8, hidden=48, intermediate=32)
    wide = replace(SMALL, block_n=64, block_k=64)
    for masked in (False, True):
        config = replace(wide, swap_ab=masked)
        for top_k in range(1, 9):
            yield f"top-{top_k} {masked=}", Case(replace(tiny, top_k=top_k), config, masked)
        for routing in ("one", "filtered", "none"):
            layer = replace(tiny, routing=routing, tokens=18, experts=5, exact=True)
            yield f"{routing} {masked=}", Case(layer, config, masked)
        shared = replace(tiny, top_k=3, num_shared=1, exact=True, tokens=19, experts=5)
        yield f"shared {masked=}", Case(shared, config, masked)
        yield f"shared filtered {masked=}", Case(replace(shared, routing="filtered"), config, masked)


def run_case(case: Case, device: str = "cpu") -> dict[str, Any]:
    """Return by how much of what is allowed kernels and twins are off, and what else is wrong."""
    from runtime.kernels.moe import down, up
    from runtime.kernels.twins import down as down_twin
    from runtime.kernels.twins import up as up_twin

    layer, config = case.layer, case.config
    weights, rows = layer.weights(), layer.rows(config.block_m, masked=case.masked)
    there, rows_there = moved(weights, device), moved(rows, device)
    slots = (rows.slots if isinstance(rows, MaskedRows) else rows.slots_P).flatten().long()
    given = layer.given(len(slots) if layer.inputs == NVFP4_EACH else layer.tokens, layer.hidden)
    made = moved(_out(case, weights, len(slots)), device), _out(case, weights, len(slots))
    up.up(moved(given, device), there, rows_there, made[0], config, native_fp4=case.native_fp4)
    up_twin.up(given, weights, rows, made[1], config)
    found: dict[str, Any] = {}
    for name, out in zip(NAMES, made, strict=True):
        found[f"up {name}"] = _up_share(case, weights, rows, given, moved(out, "cpu"), _is_short(name, given, device))
    inputs = layer.given(len(slots), layer.intermediate, seed=2)
    if not isinstance(inputs, QuantizedRows):
        # what padding holds may not matter
        inputs[slots < 0] = torch.nan
    topk_weights = layer.topk_weights()
    out = torch.full((layer.tokens * layer.top_k, layer.hidden), KEPT, dtype=layer.dtype)
    given_down = moved(inputs, device), there, rows_there, topk_weights.to(device), moved(out.clone(), device)
    outs = [
        down.down(*given_down, config, native_fp4=case.native_fp4).cpu(),
        down_twin.down(inputs, weights, rows, topk_weights, out.clone(), config),
    ]
    for name, out in zip(NAMES, outs, strict=True):
        found[f"down {name}"] = _down_share(case, weights, rows, inputs, out, _is_short(name, inputs, device))
    found["different"] = int((outs[0] != outs[1]).sum()) if layer.exact else 0
    found["values"] = outs[0].numel() + len(slots) * layer.intermediate
    return found


def _is_short(name: str, inputs: Inputs, device: str) -> bool:
    """Whether sums of a step have 14 bits: FP8 codes on a GPU."""
    is_fp8 = isinstance(inputs, QuantizedRows) and inputs.codes.dtype is torch.float8_e4m3fn
    return is_fp8 and device != "cpu" and name == "kernel"


NAMES = ("kernel", "twin")


def _out(case: Case, weights: ExpertWeights, num_rows: int) -> Inputs:
    columns = weights.intermediate_size
    if not case.writes_codes:
        return torch.full((num_rows, columns), KEPT, dtype=case.layer.dtype)
    out = new_quantized_rows(num_rows, columns, torch.float8_e4m3fn, torch.device("cpu"), is_grouped=True)
    out.scales.fill_(KEPT)
    out.codes.view(torch.uint8).fill_(0x38)
    return out


def experts_of_rows(rows: Rows) -> torch.Tensor:
    """Return the expert of each row (R,)."""
    if isinstance(rows, MaskedRows):
        return torch.arange(len(rows.slots)).repeat_interleave(rows.slots.shape[1])
    return rows.expert_of_block.long().repeat_interleave(rows.block_m)


def product(
    weights: ExpertWeights, packed: Any, expert: int, a_MK: torch.Tensor, is_short: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows times an expert's weight in fp64, and how far the sum of a kernel may be off."""
    w_NK = exact_weight(weights, packed, expert)
    # each of 32 products may be cut at 2^-13 of the largest
    terms = (a_MK.shape[1] + 4) * UNIT + (2.0**-8 if is_short else 0)
    return a_MK @ w_NK.T, terms / (1 - terms) * (a_MK.abs() @ w_NK.abs().T)


def _share(found: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor, dtype: torch.dtype) -> float:
    """Return the largest share of what is allowed, rounding to a dtype included; inf for NaN."""
    allowed = allowed + ROUNDING[dtype] * (expected.abs() + allowed) + TINY[dtype]
    share = float(((found.double() - expected).abs() / allowed).max()) if found.numel() else 0.0
    return share if share == share else float("inf")


def _up_share(case: Case, weights: ExpertWeights, rows: Rows, given: Inputs, out: Inputs, is_short: bool) -> float:
    """Return the largest share of what is allowed; inf if a row that is not used was written."""
    slots = (rows.slots if isinstance(rows, MaskedRows) else rows.slots_P).flatten().long()
    experts = experts_of_rows(rows)
    is_laid_out = case.layer.inputs == NVFP4_EACH
    source = torch.arange(len(slots)) if is_laid_out else slots // case.layer.top_k
    values = exact_inputs(given, experts)
    is_code = isinstance(out, QuantizedRows)
    unused = out.scales[slots < 0] if is_code else out[slots < 0]
    worst = 0.0 if bool((unused == KEPT).all()) else float("inf")
    for expert in experts[slots >= 0].unique().tolist():
        chosen = (experts == expert) & (slots >= 0)
        total, off = product(weights, weights.up, expert, values[source[chosen]], is_short)
        gate, up = total[:, 0::2], total[:, 1::2]
        silu = gate * gate.sigmoid()
        expected = silu * up
        allowed = 1.1 * off[:, 0::2] * (up.abs() + off[:, 1::2]) + silu.abs() * off[:, 1::2]
        allowed = allowed + (8 + 2 * gate.abs()) * UNIT * (expected.abs() + allowed)
        if is_code:
            worst = max(worst, _code_share(out, chosen, expected, allowed))
        else:
            worst = max(worst, _share(out[chosen], expected, allowed, case.layer.dtype))
    return worst


def _code_share(out: QuantizedRows, chosen: torch.Tensor, expected: torch.Tensor, allowed: torch.Tensor) -> float:
    """As `_share`; E4M3 is off by 2^-4 of a value, or half of its smallest, 2^-9, times the scale."""
    made = QuantizedRows(out.codes.view(torch.uint8)[chosen].view(out.codes.dtype), out.scales[chosen])
    scales = made.scales.double().repeat_interleave(128, 1)[:, : expected.shape[1]]
    allowed = allowed + 2.0**-4 * (expected.abs() + allowed) + 2.0**-10 * scales
    # a group's largest has the largest code
    is_full = bool((made.codes.float().abs().amax(1) == 448).all())
    return float(((exact_inputs(made) - expected).abs() / allowed).max()) if is_full else float("inf")


def _down_share(
    case: Case, weights: ExpertWeights, rows: Rows, inputs: Inputs, out: torch.Tensor, is_short: bool
) -> float:
    layer = case.layer
    position = rows.position_of_slot.long()
    experts, topk = experts_of_rows(rows), layer.topk_weights().flatten().double()
    values = exact_inputs(inputs, experts)
    worst = 0.0 if bool((out[position < 0] == KEPT).all()) else float("inf")
    slot = (position >= 0).nonzero().flatten()
    for expert in experts[position[slot]].unique().tolist():
        chosen = slot[experts[position[slot]] == expert]
        total, off = product(weights, weights.down, expert, values[position[chosen]], is_short)
        expected, off = total * topk[chosen, None], off * topk[chosen, None]
        worst = max(worst, _share(out[chosen], expected, off + UNIT * (expected.abs() + off), layer.dtype))
    return worst


def main() -> None:
    """Run all on the CPU."""
    from tests.runtime.kernels import moe_grouped_further as further

    torch.set_num_threads(1)
    found = {name: run_case(case) for name, case in cases().items()}
    json.dump({"cases": found, "canaries": further.canaries(), **further.properties()}, sys.stdout)


if __name__ == "__main__":
    main()
