"""Random experts in every scheme, what they compute exactly, and how far a backend may be from it."""

from dataclasses import dataclass

import torch

from runtime.moe.dispatcher import Slots
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme, ExpertWeights, Packed, dequantized, interleave

FP32_ROUNDOFF = 2.0**-24
# half the distance to the next number, relative
ROUNDOFF = {torch.float32: FP32_ROUNDOFF, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
# max |silu'|, and how far silu computed in fp32 is from silu
_SILU_SLOPE, _SILU_ERROR = 1.1, 8 * FP32_ROUNDOFF


def cells(size: int) -> int:
    return -(-size // BLOCK)


def random_experts(
    scheme: ExpertScheme, num_routed: int, num_shared: int, hidden_size: int, intermediate_size: int
) -> ExpertWeights:
    """Return experts whose codes use all values and whose scales are no powers of two."""
    g, num = torch.Generator().manual_seed(len(scheme)), num_routed + num_shared

    def packed(num_rows: int, num_columns: int, blocks: tuple[int, ...]) -> Packed:
        shape = (num, num_rows, num_columns)
        scale = 0.6 * num_columns**-0.5
        if scheme.is_plain:
            return Packed((torch.randn(shape, generator=g) * scale).to(scheme.code_dtype))
        if scheme is ExpertScheme.NVFP4:
            codes = torch.randint(0, 256, (num, num_rows, num_columns // 2), generator=g, dtype=torch.uint8)
            local = torch.rand(num, num_rows, num_columns // GROUP, generator=g) * 400 + 1
            return Packed(codes, local.to(torch.float8_e4m3fn), (torch.rand(num, generator=g) + 0.5) * scale / 700)
        grid = blocks if scheme is ExpertScheme.FP8_BLOCK else (num_rows,)
        scales = torch.rand(num, *grid, generator=g) + 0.5
        if scheme.code_dtype is torch.int8:
            codes = torch.randint(-128, 128, shape, generator=g, dtype=torch.int8)
            return Packed(codes, scales * scale / 70)
        codes = (torch.randn(shape, generator=g) * 100).clamp(-448, 448).to(torch.float8_e4m3fn)
        return Packed(codes, scales * scale / 100)

    rows, columns = cells(intermediate_size), cells(hidden_size)
    up = packed(2 * intermediate_size, hidden_size, (2, rows, columns))
    down = packed(hidden_size, intermediate_size, (columns, rows))
    return ExpertWeights(scheme, up, down, num_routed, num_shared, hidden_size, intermediate_size)


def random_slots(num_tokens: int, num_routed: int, top_k: int, num_shared: int = 1, seed: int = 0) -> Slots:
    """Return slots as a router and a fused shared expert make them; routed weights add up to 2.5."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(num_routed, generator=g)[:top_k] for _ in range(num_tokens)])
    weights = torch.rand(num_tokens, top_k, generator=g)
    weights = 2.5 * weights / weights.sum(1, keepdim=True)
    if num_shared:
        ids = torch.cat((ids, torch.full((num_tokens, 1), num_routed)), 1)
        weights = torch.cat((weights, torch.ones(num_tokens, 1)), 1)
    return Slots(ids.to(torch.int32), weights, num_routed + num_shared, num_shared)


def exact_values(weights: ExpertWeights) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what up (E, 2I, H) and down (E, H, I) stand for, in fp64."""
    return tuple(_exact(weights.scheme, packed, is_up) for packed, is_up in ((weights.up, True), (weights.down, False)))


def _exact(scheme: ExpertScheme, packed: Packed, is_up: bool) -> torch.Tensor:
    if scheme.is_plain:
        return packed.codes.double()
    if scheme is ExpertScheme.NVFP4:
        magnitudes = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        table = torch.cat((magnitudes, -magnitudes))
        codes = packed.codes.long()
        values = torch.stack((table[codes & 15], table[codes >> 4]), -1).flatten(-2)
        local = packed.scales.double().repeat_interleave(GROUP, -1)
        return values * local * packed.global_scale.double()[:, None, None]
    codes = packed.codes.double()
    if scheme is not ExpertScheme.FP8_BLOCK:
        return codes * packed.scales.double()[..., None]
    num_rows, num_columns = codes.shape[1:]

    def wide(scales: torch.Tensor, rows: int) -> torch.Tensor:
        return scales.double().repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)[:, :rows, :num_columns]

    if not is_up:
        return codes * wide(packed.scales, num_rows)
    gate, up = (wide(packed.scales[:, kind], num_rows // 2) for kind in (0, 1))
    return codes * interleave(gate, up)


@dataclass
class Exact:
    """The result in fp64 (T, H), and the budget (T, H)."""

    values: torch.Tensor
    budget: torch.Tensor


def exact_layer(hidden_TD: torch.Tensor, slots: Slots, weights: ExpertWeights) -> Exact:
    """Return what a layer computes, and how far sums in fp32 and roundings to the dtype of `hidden_TD` may lead away.

    With u the unit roundoff of the dtype, u32 that of fp32, and g(n) = n u32 / (1 - n u32), the bound of a dot product
    of n terms in any order: weights that are multiplied out are off by u + 3 u32, each product's sum by g(n) of the sum
    of magnitudes, and each intermediate by u when it is stored. Errors go through |silu'| <= 1.1 and the magnitudes of
    the weights that follow. The last sum is over slots in fp32, and up to three roundings go with it: of a weighted
    result, of the routed part, and of the total where the shared expert is added apart.
    """
    u = ROUNDOFF[hidden_TD.dtype]
    u_weight = 0.0 if weights.scheme.is_plain else u + 3 * FP32_ROUNDOFF
    up_ENK, down_ENK = exact_values(weights)
    total, error, magnitude = (torch.zeros(hidden_TD.shape, dtype=torch.float64) for _ in range(3))
    for choice in range(slots.num_choices):
        ids = slots.ids_TK[:, choice].long()
        kept = (ids >= 0).double()[:, None] * slots.weights_TK[:, choice, None].double()
        up_TNK, down_TNK = up_ENK[ids.clamp(min=0)], down_ENK[ids.clamp(min=0)]
        x = hidden_TD.double()[:, :, None]
        both, d_both = _product(up_TNK, x, torch.zeros_like(x), u, u_weight)
        gate, up = both[:, 0::2], both[:, 1::2]
        d_gate, d_up = d_both[:, 0::2], d_both[:, 1::2]
        silu = gate * torch.sigmoid(gate)
        d_silu = _SILU_SLOPE * d_gate
        d_silu = d_silu + (u + _SILU_ERROR) * (silu.abs() + d_silu)
        active = silu * up
        d_active = up.abs() * d_silu + silu.abs() * d_up + d_silu * d_up
        d_active = d_active + u * (active.abs() + d_active)
        out, d_out = _product(down_TNK, active, d_active, u, u_weight)
        total += kept * out[:, :, 0]
        error += kept * d_out[:, :, 0]
        magnitude += kept * (out.abs() + d_out)[:, :, 0]
    error = error + _growth(slots.num_choices + 1) * magnitude
    return Exact(total, error + 3 * u * (magnitude + error))


def _product(
    weight: torch.Tensor, x: torch.Tensor, d_x: torch.Tensor, u: float, u_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    out = weight @ x
    size = weight.abs()
    error = size @ d_x + (_growth(weight.shape[-1] + 1) + u_weight) * (size @ (x.abs() + d_x))
    return out, error + u * (out.abs() + error)


def _growth(num_terms: int) -> float:
    return num_terms * FP32_ROUNDOFF / (1 - num_terms * FP32_ROUNDOFF)


def values_of(weights: ExpertWeights, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return gate (E, I, H), up (E, I, H) and down (E, H, I), multiplied out."""
    up = dequantized(weights.scheme, weights.up, dtype, is_interleaved=True)
    return up[:, 0::2], up[:, 1::2], dequantized(weights.scheme, weights.down, dtype, is_interleaved=False)
