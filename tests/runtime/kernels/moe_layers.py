"""Layers of experts for tests of their products: weights, inputs, routing, and what comes out in fp64.

Shapes: T tokens, K choices, S slots, E experts, H hidden, I intermediate.
"""

from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import torch

from runtime.kernels.twins.quantize_rows import quantize_rows
from runtime.moe.inputs import Inputs, QuantizedRows, Rows, new_quantized_rows
from runtime.moe.layouts import contiguous_rows, masked_rows
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme, ExpertWeights, Packed, block_scales, unpacked_e2m1

Moved = TypeVar("Moved")
# inputs that products take: as they are, codes with a scale for a row, for 128 columns, for 16; the last laid out, with
# a global scale for each expert
PLAIN, ROW, GROUPED, NVFP4, NVFP4_EACH = "plain", "row", "grouped", "nvfp4", "nvfp4 each"


@dataclass(frozen=True)
class Layer:
    """A layer of experts.

    `exact`: values are small whole numbers and scales powers of two, so that no sum is ever rounded.
    """

    scheme: ExpertScheme = ExpertScheme.BF16
    dtype: torch.dtype = torch.bfloat16
    inputs: str = PLAIN
    tokens: int = 3
    experts: int = 4
    top_k: int = 2
    hidden: int = 288
    intermediate: int = 160
    routing: str = "even"
    num_shared: int = 0
    exact: bool = False
    seed: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(100 * self.tokens + self.seed)

    def topk_ids(self) -> torch.Tensor:
        """Return int64 ids (T, K); a shared expert takes the last choice."""
        g, num_routed = self.generator(), self.experts - self.num_shared
        num_routed_choices = self.top_k - self.num_shared
        ids = torch.stack([torch.randperm(num_routed, generator=g)[:num_routed_choices] for _ in range(self.tokens)])
        if self.routing == "one":
            ids = torch.arange(num_routed_choices).expand(self.tokens, -1).clone()
        if self.num_shared:
            ids = torch.cat((ids, torch.full((self.tokens, 1), self.experts - 1)), 1)
        if self.routing == "filtered":
            ids[torch.rand(ids.shape, generator=g) < 0.5] = -1
        if self.routing == "none":
            ids.fill_(-1)
        return ids

    def topk_weights(self) -> torch.Tensor:
        """Return fp32 (T, K)."""
        weights = torch.rand(self.tokens, self.top_k, generator=self.generator()) + 0.25
        if self.num_shared:
            weights[:, -1] = 1
        return weights

    def rows(self, block_m: int, *, masked: bool) -> Rows:
        ids = self.topk_ids()
        if masked:
            return masked_rows(ids, self.experts, self.tokens)
        return contiguous_rows(ids, self.experts, block_m, num_shared=self.num_shared)

    def weights(self) -> ExpertWeights:
        g, num_experts, hidden, intermediate = self.generator(), self.experts, self.hidden, self.intermediate
        up = self._packed(g, num_experts, 2 * intermediate, hidden, is_up=True)
        down = self._packed(g, num_experts, hidden, intermediate, is_up=False)
        routed = num_experts - self.num_shared
        return ExpertWeights(self.scheme, up, down, routed, self.num_shared, hidden, intermediate)

    def given(self, num_rows: int, num_columns: int, seed: int = 1) -> Inputs:
        """Return rows of activations (rows, columns), as they are or as codes."""
        g = torch.Generator().manual_seed(seed)
        if self.inputs in (NVFP4, NVFP4_EACH):
            codes = torch.randint(256, (num_rows, num_columns // 2), generator=g, dtype=torch.uint8)
            scales = self._scales(g, num_rows, num_columns // GROUP).to(torch.float8_e4m3fn)
            is_each = self.inputs == NVFP4_EACH
            return QuantizedRows(codes, scales, self._scales(g, self.experts if is_each else 1), is_laid_out=is_each)
        values = self._values(g, num_rows, num_columns).to(self.dtype)
        if self.inputs == PLAIN:
            return values
        dtype, is_grouped = self.scheme.code_dtype, self.inputs == GROUPED
        made = new_quantized_rows(num_rows, num_columns, dtype, values.device, is_grouped=is_grouped)
        if not self.exact:
            return quantize_rows(values, made)
        scales = self._scales(g, *made.scales.shape)
        return QuantizedRows(values.to(dtype), scales)

    def _values(self, g: torch.Generator, *shape: int) -> torch.Tensor:
        return torch.randint(-3, 4, shape, generator=g).float() if self.exact else torch.randn(shape, generator=g)

    def _scales(self, g: torch.Generator, *shape: int) -> torch.Tensor:
        if self.exact:
            return torch.exp2(torch.randint(-1, 2, shape, generator=g).float())
        return torch.rand(shape, generator=g) * 0.25 + 0.125

    def _packed(self, g: torch.Generator, num_experts: int, rows: int, columns: int, *, is_up: bool) -> Packed:
        if self.scheme is ExpertScheme.NVFP4:
            codes = torch.randint(256, (num_experts, rows, columns // 2), generator=g, dtype=torch.uint8)
            scales = self._scales(g, num_experts, rows, columns // GROUP).to(torch.float8_e4m3fn)
            # below the range of fp16 once gate and up are multiplied
            return Packed(codes, scales, self._scales(g, num_experts) / 64)
        values = self._values(g, num_experts, rows, columns)
        if self.scheme.is_plain:
            return Packed(values.to(self.scheme.code_dtype))
        factor = 1 if self.exact else 32
        codes = (values * factor).clamp(-127, 127).to(self.scheme.code_dtype)
        if self.scheme is ExpertScheme.FP8_BLOCK:
            kinds = (2, -(-rows // 2 // BLOCK)) if is_up else (-(-rows // BLOCK),)
            return Packed(codes, self._scales(g, num_experts, *kinds, -(-columns // BLOCK)) / factor)
        return Packed(codes, self._scales(g, num_experts, rows) / factor)


def exact_weight(weights: ExpertWeights, packed: Packed, expert: int) -> torch.Tensor:
    """Return one expert's matrix (N, K) in fp64, by the definition of the scheme."""
    codes = packed.codes[expert : expert + 1]
    if weights.scheme is ExpertScheme.NVFP4:
        scales = packed.scales[expert].double().repeat_interleave(GROUP, 1)
        return unpacked_e2m1(codes)[0].double() * scales * packed.global_scale[expert].double()
    if weights.scheme is ExpertScheme.FP8_BLOCK:
        scales = block_scales(packed.scales[expert : expert + 1], codes.shape[1:], packed is weights.up)
        return (codes.double() * scales.double())[0]
    values = codes[0].double()
    return values if packed.scales is None else values * packed.scales[expert].double()[:, None]


def exact_inputs(inputs: Inputs, experts_R: torch.Tensor | None = None) -> torch.Tensor:
    """Return rows in fp64; `experts_R`: each row's expert, for global scales of each."""
    if not isinstance(inputs, QuantizedRows):
        return inputs.double()
    if inputs.global_scale is not None:
        scales = inputs.scales.double().repeat_interleave(GROUP, 1)
        each = len(inputs.global_scale) > 1
        global_scale = inputs.global_scale[experts_R.clamp(min=0), None] if each else inputs.global_scale
        return unpacked_e2m1(inputs.codes).double() * scales * global_scale.double()
    width = BLOCK if inputs.is_grouped else inputs.codes.shape[1]
    scales = inputs.scales.double().repeat_interleave(width, 1)[:, : inputs.codes.shape[1]]
    return inputs.codes.double() * scales


def moved(value: Moved, device: str) -> Moved:
    """Return a tensor, or a dataclass of such, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if not is_dataclass(value):
        return value
    return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})
