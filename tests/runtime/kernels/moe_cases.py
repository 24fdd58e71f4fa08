"""Launches of every kernel of the mixture of experts that is shipped, without any memory.

All at GLM-4.6's sizes. Sizes are constants of a kernel, and so is the layout: at GLM-4.5-Air's, and at an eighth of
its columns in the masked layout, the largest tiles of each scheme, which have the fewest registers to spare, and those
that write codes. 176 columns end within a step and within a block of scales; no descriptor addresses them in NVFP4.

Tensors are on the meta device, whose addresses count as aligned. The number of experts is no constant of any kernel but
those that route and sort.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial

import torch

from runtime.kernels.launch import Launch
from runtime.kernels.moe.configs import BLACKWELL, FP8_SCHEMES, SHIPPED, Shipped, can_describe
from runtime.kernels.moe.down import down_launch
from runtime.kernels.moe.up import up_launch
from runtime.moe.inputs import INPUT_GROUP, Inputs, QuantizedRows, Rows, new_quantized_rows
from runtime.moe.layouts import ContiguousRows, MaskedRows, capacity
from runtime.moe.weights import BLOCK, GROUP, ExpertScheme, ExpertWeights, Packed


@dataclass(frozen=True)
class Sizes:
    """Those of a layer or a rank's part of it, the shared expert fused.

    Args:
        name: what a kernel's name begins with.
        hidden: H.
        intermediate: I.
        experts: the shared one included.
        is_masked: the layout of rows.
    """

    name: str
    hidden: int
    intermediate: int
    experts: int
    is_masked: bool = False


GLM = Sizes("", 5120, 1536, 161)
AIR = Sizes("GLM-4.5-Air ", 4096, 1408, 129)
SHARD = Sizes("GLM-4.5-Air masked I=176 ", 4096, 176, 129, is_masked=True)
HIDDEN, INTERMEDIATE, EXPERTS, CHOICES = GLM.hidden, GLM.intermediate, GLM.experts, 9
# tokens: enough for a full block of every expert
TOKENS = 4096
META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def packed(scheme: ExpertScheme, sizes: Sizes, num_rows: int, num_columns: int, *, is_up: bool) -> Packed:
    """Return one matrix of all experts, (E, N, K)."""
    num_experts = sizes.experts
    if scheme is ExpertScheme.NVFP4:
        codes = empty(num_experts, num_rows, num_columns // 2, dtype=torch.uint8)
        scales = empty(num_experts, num_rows, num_columns // GROUP, dtype=torch.float8_e4m3fn)
        return Packed(codes, scales, empty(num_experts))
    codes = empty(num_experts, num_rows, num_columns, dtype=scheme.code_dtype)
    if scheme.is_plain:
        return Packed(codes)
    if scheme is ExpertScheme.FP8_BLOCK:
        kinds = (2, -(-num_rows // 2 // BLOCK)) if is_up else (-(-num_rows // BLOCK),)
        return Packed(codes, empty(num_experts, *kinds, -(-num_columns // BLOCK)))
    return Packed(codes, empty(num_experts, num_rows))


@cache
def weights(scheme: ExpertScheme, sizes: Sizes = GLM) -> ExpertWeights:
    """Return a layer."""
    up = packed(scheme, sizes, 2 * sizes.intermediate, sizes.hidden, is_up=True)
    down = packed(scheme, sizes, sizes.hidden, sizes.intermediate, is_up=False)
    return ExpertWeights(scheme, up, down, sizes.experts - 1, 1, sizes.hidden, sizes.intermediate)


def inputs(scheme: ExpertScheme, num_rows: int, num_columns: int, *, is_quantized: bool) -> Inputs:
    """Return rows of activations: fp16 for fp16 weights, else bf16; or codes."""
    if not is_quantized:
        return empty(num_rows, num_columns, dtype=scheme.code_dtype if scheme.is_plain else torch.bfloat16)
    if scheme is ExpertScheme.NVFP4:
        scales = empty(num_rows, num_columns // GROUP, dtype=torch.float8_e4m3fn)
        codes, globals_E = empty(num_rows, num_columns // 2, dtype=torch.uint8), empty(EXPERTS)
        return QuantizedRows(codes, scales, globals_E, is_laid_out=True)
    num_scales = -(-num_columns // BLOCK) if scheme is ExpertScheme.FP8_BLOCK else 1
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


def masked() -> MaskedRows:
    """Return the masked layout of as many rows of each expert."""
    num_rows = TOKENS // 16
    slots = empty(SHARD.experts, num_rows, dtype=torch.int32)
    return MaskedRows(slots, empty(SHARD.experts, dtype=torch.int32), empty(num_rows * CHOICES, dtype=torch.int32))


def product(shipped: Shipped, sizes: Sizes = GLM, *, to_codes: bool = False) -> Launch:
    """Return the launch of a grouped product; `to_codes`: up, rounding what it writes."""
    scheme, config = shipped.scheme, shipped.config
    rows: Rows = masked() if sizes.is_masked else blocks(config.block_m)
    num_rows = (rows.slots if isinstance(rows, MaskedRows) else rows.slots_P).numel()
    num_tokens, dtype = len(rows.position_of_slot) // CHOICES, product_dtype(scheme)
    is_native = scheme is ExpertScheme.NVFP4 and shipped.is_quantized and shipped.capability == BLACKWELL
    made = weights(scheme, sizes)
    if shipped.op == "up":
        # NVFP4 inputs are laid out before they become codes
        num_inputs = num_rows if is_native else num_tokens
        given = inputs(scheme, num_inputs, sizes.hidden, is_quantized=shipped.is_quantized)
        out: Inputs = empty(num_rows, sizes.intermediate, dtype=dtype)
        if to_codes:
            out = new_quantized_rows(num_rows, sizes.intermediate, scheme.code_dtype, META, is_grouped=True)
        return up_launch(given, made, rows, out, config, native_fp4=is_native, rounded_to=dtype)
    given = inputs(scheme, num_rows, sizes.intermediate, is_quantized=shipped.is_quantized)
    out = empty(num_tokens * CHOICES, sizes.hidden, dtype=dtype)
    config = config if can_describe(scheme, sizes.intermediate) else replace(config, tma=False)
    return down_launch(given, made, rows, empty(num_tokens, CHOICES), out, config, native_fp4=is_native)


def product_dtype(scheme: ExpertScheme) -> torch.dtype:
    """Return the dtype of activations."""
    return torch.float16 if scheme is ExpertScheme.FP16 else torch.bfloat16


def can_write_codes(shipped: Shipped) -> bool:
    """Return whether a product may round what it writes."""
    is_kind = shipped.op == "up" and shipped.is_quantized and shipped.scheme in FP8_SCHEMES
    return is_kind and shipped.config.block_n % (2 * INPUT_GROUP) == 0


def _largest(products: Iterable[Shipped]) -> tuple[Shipped, ...]:
    """Return of each kind of product the one with the largest tiles."""
    found: dict[tuple[str, ExpertScheme, bool, int], Shipped] = {}
    for one in products:
        kind = one.op, one.scheme, one.is_quantized, one.capability
        found[kind] = max(found.get(kind, one), one, key=lambda made: (made.config.block_m, made.config.block_n))
    return tuple(found.values())


LARGEST = _largest(SHIPPED)
LARGEST_CODED = _largest(one for one in SHIPPED if one.scheme is ExpertScheme.FP8_BLOCK and can_write_codes(one))


def product_launches(capability: int) -> dict[str, Callable[[], Launch]]:
    """Return what makes the launch of every product that is shipped for a compute capability, by name."""
    found: dict[str, Callable[[], Launch]] = {}
    for sizes, products, coded in (
        (GLM, SHIPPED, tuple(one for one in SHIPPED if can_write_codes(one))),
        (AIR, LARGEST, LARGEST_CODED),
        (SHARD, LARGEST, LARGEST_CODED),
    ):
        for shipped in products:
            found[sizes.name + shipped.name] = partial(product, shipped, sizes)
        for shipped in coded:
            name = f"{sizes.name}{shipped.name}".replace(" sm_", " to codes sm_")
            found[name] = partial(product, shipped, sizes, to_codes=True)
    ending = f" sm_{capability}"
    return {name.removesuffix(ending): make for name, make in found.items() if name.endswith(ending)}
