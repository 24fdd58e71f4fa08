"""Layers, inputs and routings to measure with, and what they should give.

Weights are random normal numbers, or codes that use all values: zeros would be multiplied faster than anything else.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from runtime.moe.cost import LayerShape
from runtime.moe.dispatcher import Slots
from runtime.moe.experts import LocalExperts
from runtime.moe.grouped import quantize_tokens
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme, ExpertWeights, Packed
from runtime.moe.workspace import Workspace

ROUTINGS = ("uniform", "zipf", "same")
# rows that are held against the reference
CHECKED_ROWS = 512
# L2 of the difference over L2 of the result. Roundings to bf16 behind up, SwiGLU and each slot are 2^-9 of a value
# each, independent: some 0.004 together. An expert left out, or a scale of the wrong block, is above 0.1
MAX_ERROR = 0.01
# where SwiGLU is rounded to bf16 before it is rounded to codes: 2^-9 of a value, and as much of a row's scale, moves
# some 4 % of E4M3 codes to their neighbours, 0.09 away: sqrt(0.04) * 0.09 = 0.018, and the above
MAX_CODES_ERROR = 0.03
_ROUTED_SCALING = 2.5
_E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Batch:
    """Tokens (T, H) bf16 and where they go; the shared expert is the last choice of each."""

    hidden_TH: torch.Tensor
    slots: Slots

    @property
    def num_distinct(self) -> int:
        """Routed experts that are touched."""
        return len(self.slots.ids_TK[:, : -self.slots.num_shared].unique())


def make_layer(shape: LayerShape, scheme: ExpertScheme, device: torch.device, seed: int = 0) -> ExpertWeights:
    """Return random experts whose results are about as large as their inputs."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden, wide = shape.hidden_size, shape.intermediate_size
    up = _packed(scheme, shape.num_experts, 2 * wide, hidden, generator, kinds=2)
    down = _packed(scheme, shape.num_experts, hidden, wide, generator, kinds=1)
    return ExpertWeights(scheme, up, down, shape.num_routed, shape.num_shared, hidden, wide)


def _packed(
    scheme: ExpertScheme, num: int, rows: int, columns: int, generator: torch.Generator, *, kinds: int
) -> Packed:
    device, size = generator.device, columns**-0.5

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=generator, device=device) + 0.5

    def normal(dtype: torch.dtype, factor: float) -> torch.Tensor:
        made = torch.empty(num, rows, columns, dtype=dtype, device=device)
        limit = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
        # an expert at a time: in fp32 a layer is larger than the device's memory may be
        for expert in made:
            values = torch.randn(rows, columns, generator=generator, device=device) * factor
            # before torch 2.13, what is beyond the largest E4M3 becomes NaN
            expert.copy_(values.clamp(-limit, limit))
        return made

    if scheme.is_plain:
        return Packed(normal(scheme.code_dtype, size))
    if scheme is ExpertScheme.NVFP4:
        shape = (num, rows, columns // 2)
        codes = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator, device=device)
        scales = torch.empty(num, rows, columns // GROUP, dtype=_E4M3, device=device)
        for expert in scales:
            expert.copy_(uniform(*expert.shape) * 200)
        return Packed(codes, scales, uniform(num) * size / 600)
    grid: tuple[int, ...] = (rows,)
    if scheme is ExpertScheme.FP8_BLOCK:
        blocks = -(-rows // kinds // BLOCK), -(-columns // BLOCK)
        grid = (2, *blocks) if kinds == 2 else blocks
    factor = 40.0 if scheme.code_dtype is torch.int8 else 100.0
    return Packed(normal(scheme.code_dtype, factor), uniform(num, *grid) * size / factor)


def make_batch(shape: LayerShape, num_tokens: int, routing: str, device: torch.device, seed: int) -> Batch:
    """Return tokens and one of ROUTINGS: any expert alike, a few far more often than others, or the same for all."""
    generator = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(num_tokens, shape.hidden_size, generator=generator, device=device).to(torch.bfloat16)
    chance = torch.ones(shape.num_routed, device=device)
    if routing == "zipf":
        chance = 1 / torch.arange(1, shape.num_routed + 1, device=device)
    if routing == "same":
        ids = torch.arange(shape.num_chosen, device=device).expand(num_tokens, -1)
    else:
        ids = torch.multinomial(chance.expand(num_tokens, -1), shape.num_chosen, generator=generator)
    weights = torch.rand(ids.shape, generator=generator, device=device)
    weights = _ROUTED_SCALING * weights / weights.sum(1, keepdim=True)
    if shape.num_shared:
        ids = torch.cat((ids, torch.full((num_tokens, 1), shape.num_routed, device=device)), 1)
        weights = torch.cat((weights, torch.ones(num_tokens, 1, device=device)), 1)
    slots = Slots(ids.to(torch.int32), weights, shape.num_experts, shape.num_shared)
    return Batch(hidden, slots)


def make_experts(weights: ExpertWeights, *, is_quantized: bool) -> LocalExperts:
    """Return a layer's experts; `is_quantized`: inputs are rounded to 8 bits and multiplied as codes."""
    if not is_quantized:
        return LocalExperts(weights)

    def round_rows(values_RK: torch.Tensor, _: Workspace | None = None, /) -> torch.Tensor:
        return rounded(weights.scheme, values_RK)

    return LocalExperts(weights, round_rows, round_rows, multiplies_codes=True)


def rounded(scheme: ExpertScheme, values_RK: torch.Tensor) -> torch.Tensor:
    """Return rows as 8-bit codes would give them, in their dtype."""
    wide, group = values_RK.to(torch.float32), values_RK.shape[1]
    if scheme is ExpertScheme.INT8_W8A8:
        scale = wide.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
        return ((wide / scale).round().clamp(-127, 127) * scale).to(values_RK.dtype)
    if scheme is ExpertScheme.FP8_BLOCK:
        group = BLOCK
    parts = F.pad(wide, (0, -wide.shape[1] % group)).reshape(-1, group)
    codes, scales = quantize_tokens(parts)
    made = (codes.to(torch.float32) * scales[:, None]).reshape(len(wide), -1)[:, : wide.shape[1]]
    return made.to(values_RK.dtype)


def checked_rows(num_tokens: int, device: torch.device) -> torch.Tensor:
    """Return which tokens are held against the reference: all, or evenly spread ones with the first and the last."""
    return torch.linspace(0, num_tokens - 1, min(num_tokens, CHECKED_ROWS), device=device).round().long().unique()


def reference(batch: Batch, experts: LocalExperts, rows_R: torch.Tensor) -> torch.Tensor:
    """Return (R, H) fp32 of some tokens, an expert after the other in fp32."""
    ids_RK, weights_RK = batch.slots.ids_TK[rows_R], batch.slots.weights_TK[rows_R]
    hidden_RH = batch.hidden_TH[rows_R]
    if experts.round_inputs is not None:
        hidden_RH = experts.round_inputs(hidden_RH.float())
    out_RH = torch.zeros(hidden_RH.shape, device=hidden_RH.device)
    for expert in ids_RK.unique().tolist():
        if expert < 0:
            continue
        row, choice = (ids_RK == expert).nonzero().unbind(1)
        one = slice(expert, expert + 1)
        gate, up = (
            (hidden_RH[row].float() @ experts.weights.up_values(torch.float32, one)[0].T)
            .unflatten(1, (-1, 2))
            .unbind(2)
        )
        active = F.silu(gate) * up
        if experts.round_activations is not None:
            active = experts.round_activations(active.to(torch.bfloat16).float())
        down = active @ experts.weights.down_values(torch.float32, one)[0].T
        out_RH.index_add_(0, row, down * weights_RK[row, choice, None])
    return out_RH


def relative_error(found_RH: torch.Tensor, expected_RH: torch.Tensor) -> float:
    """Return L2 of the difference over L2 of what is expected; not a number where the result is none."""
    difference = (found_RH.to(torch.float32) - expected_RH).norm()
    return float(difference / expected_RH.norm())
