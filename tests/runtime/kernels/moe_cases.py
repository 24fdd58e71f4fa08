"""Launches of every kernel of the mixture of experts that is shipped, at GLM-4.6's sizes, without any memory.

Tensors are on the meta device, whose addresses count as aligned. The number of experts is no constant of any kernel but
those that route and sort.
"""

from collections.abc import Callable
from functools import cache, partial

import torch

from runtime.kernels.launch import Launch
from runtime.kernels.moe.configs import BLACKWELL, FP8_SCHEMES, SHIPPED, Shipped
from runtime.kernels.moe.down import down_launch
from runtime.kernels.moe.up import up_launch
from runtime.moe.inputs import INPUT_GROUP, Inputs, QuantizedRows, new_quantized_rows
from runtime.moe.layouts import ContiguousRows, capacity
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme, ExpertWeights, Packed

HIDDEN, INTERMEDIATE, EXPERTS, CHOICES = 5120, 1536, 161, 9
# tokens: enough for a full block of every expert
TOKENS = 4096
META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def packed(scheme: ExpertScheme, num_rows: int, num_columns: int, *, is_up: bool) -> Packed:
    """Return one matrix of all experts, (E, N, K)."""
    if scheme is ExpertScheme.NVFP4:
        codes = empty(EXPERTS, num_rows, num_columns // 2, dtype=torch.uint8)
        return Packed(codes, empty(EXPERTS, num_rows, num_columns // GROUP, dtype=torch.float8_e4m3fn), empty(EXPERTS))
    codes = empty(EXPERTS, num_rows, num_columns, dtype=scheme.code_dtype)
    if scheme.is_plain:
        return Packed(codes)
    if scheme is ExpertScheme.FP8_BLOCK:
        kinds = (2, num_rows // 2 // BLOCK) if is_up else (num_rows // BLOCK,)
        return Packed(codes, empty(EXPERTS, *kinds, num_columns // BLOCK))
    return Packed(codes, empty(EXPERTS, num_rows))


@cache
def weights(scheme: ExpertScheme) -> ExpertWeights:
    """Return a layer of GLM-4.6, the shared expert fused."""
    up = packed(scheme, 2 * INTERMEDIATE, HIDDEN, is_up=True)
    down = packed(scheme, HIDDEN, INTERMEDIATE, is_up=False)
    return ExpertWeights(scheme, up, down, EXPERTS - 1, 1, HIDDEN, INTERMEDIATE)


def inputs(scheme: ExpertScheme, num_rows: int, num_columns: int, *, is_quantized: bool) -> Inputs:
    """Return rows of activations: fp16 for fp16 weights, else bf16; or codes."""
    if not is_quantized:
        return empty(num_rows, num_columns, dtype=scheme.code_dtype if scheme.is_plain else torch.bfloat16)
    if scheme is ExpertScheme.NVFP4:
        scales = empty(num_rows, num_columns // GROUP, dtype=torch.float8_e4m3fn)
        codes, globals_E = empty(num_rows, num_columns // 2, dtype=torch.uint8), empty(EXPERTS)
        return QuantizedRows(codes, scales, globals_E, is_laid_out=True)
    num_scales = num_columns // BLOCK if scheme is ExpertScheme.FP8_BLOCK else 1
    return QuantizedRows(empty(num_rows, num_columns, dtype=scheme.code_dtype), empty(num_rows, num_scales))


def blocks(block_m: int) -> ContiguousRows:
    """Return the layout of TOKENS tokens."""
    num_rows = capacity(TOKENS * CHOICES, EXPERTS, block_m)
    return ContiguousRows(
        empty(num_rows, dtype=torch.int32),
        empty(num_rows // block_m, dtype=torch.int32),
        empty(1, dtype=torch.int32),
        block_m,
        empty(TOKENS * CHOICES, dtype=torch.int32),
    )


def product(shipped: Shipped, *, to_codes: bool = False) -> Launch:
    """Return the launch of a grouped product; `to_codes`: up, rounding what it writes."""
    scheme, config, rows = shipped.scheme, shipped.config, blocks(shipped.config.block_m)
    num_rows, dtype = len(rows.slots_P), torch.float16 if scheme is ExpertScheme.FP16 else torch.bfloat16
    is_native = scheme is ExpertScheme.NVFP4 and shipped.is_quantized and shipped.capability == BLACKWELL
    made = weights(scheme)
    if shipped.op == "up":
        # NVFP4 inputs are laid out before they become codes
        num_inputs = num_rows if is_native else TOKENS
        given = inputs(scheme, num_inputs, HIDDEN, is_quantized=shipped.is_quantized)
        out: Inputs = empty(num_rows, INTERMEDIATE, dtype=dtype)
        if to_codes:
            out = new_quantized_rows(num_rows, INTERMEDIATE, scheme.code_dtype, META, is_grouped=True)
        return up_launch(given, made, rows, out, config, native_fp4=is_native, rounded_to=dtype)
    given = inputs(scheme, num_rows, INTERMEDIATE, is_quantized=shipped.is_quantized)
    out = empty(TOKENS * CHOICES, HIDDEN, dtype=dtype)
    return down_launch(given, made, rows, empty(TOKENS, CHOICES), out, config, native_fp4=is_native)


def product_launches(capability: int) -> dict[str, Callable[[], Launch]]:
    """Return what makes the launch of every product that is shipped for a compute capability, by name."""
    found: dict[str, Callable[[], Launch]] = {}
    for shipped in SHIPPED:
        if shipped.capability != capability:
            continue
        name = shipped.name.removesuffix(f" sm_{capability}")
        found[name] = partial(product, shipped)
        if shipped.op == "up" and shipped.is_quantized and shipped.scheme in FP8_SCHEMES:
            is_wide_enough = shipped.config.block_n % (2 * INPUT_GROUP) == 0
            found |= {f"{name} to codes": partial(product, shipped, to_codes=True)} if is_wide_enough else {}
    return found
