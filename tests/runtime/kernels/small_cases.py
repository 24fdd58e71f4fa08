"""Launches of the kernels around the grouped products, at sizes of GLM-4.6 and GLM-4.5-Air, without any memory."""

from collections.abc import Iterator

import torch

from converters.config import Glm4MoeConfig
from runtime.kernels.launch import Launch
from runtime.kernels.moe.build_rows import build_masked_rows_launches, build_rows_launches
from runtime.kernels.moe.combine import combine_launch
from runtime.kernels.moe.gemv import down_gemv_launch, up_gemv_launch
from runtime.kernels.moe.quantize_fp4 import quantize_fp4_rows_launch
from runtime.kernels.moe.quantize_rows import quantize_rows_launch
from runtime.kernels.moe.route import route_launch
from runtime.kernels.moe.router_logits import router_logits_launch
from runtime.kernels.ops.inputs import HeadNorms, KvPages, PagedBatch
from runtime.kernels.ops.paged_attention import paged_attention_launches, tile
from runtime.kernels.ops.rms_norm import rms_norm_launch
from runtime.kernels.ops.rope import rope_launch
from runtime.kernels.ops.sampling import philox_uniforms_launch, sample_launch
from runtime.kernels.ops.write_pages import write_pages_launch
from runtime.moe.inputs import new_quantized_rows
from runtime.moe.weights import ExpertScheme
from tests.runtime.kernels.moe_cases import (
    AIR,
    CHOICES,
    EXPERTS,
    GLM,
    HIDDEN,
    INTERMEDIATE,
    META,
    SHARD,
    TOKENS,
    Sizes,
    blocks,
    empty,
    inputs,
    product_dtype,
    weights,
)

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
HEADS, KV_HEADS, HEAD_DIM, PAGE, VOCAB = 96, 8, 128, 16, 151552
GEMV_SCHEMES = (
    ExpertScheme.BF16, ExpertScheme.FP16, ExpertScheme.FP8_CHANNEL, ExpertScheme.FP8_BLOCK, ExpertScheme.INT8_CHANNEL,
)  # fmt: skip


def routing(config: Glm4MoeConfig) -> Iterator[tuple[str, Launch]]:
    """Yield what chooses experts and sorts slots: few in one run, many in several."""
    for name, dtype in (("bf16", BF16), ("fp32", torch.float32)):
        weight = empty(EXPERTS - 1, HIDDEN, dtype=dtype)
        yield f"router_logits {name}", router_logits_launch(empty(16, HIDDEN, dtype=BF16), weight)
    for name, num_experts in (("", EXPERTS - 1), (AIR.name, AIR.experts - 1)):
        yield f"{name}route", route_launch(empty(TOKENS, num_experts), empty(num_experts), config, num_shared=1)
    for num_tokens, block_m in ((1, 16), (256, 32), (TOKENS, 128)):
        ids = empty(num_tokens, CHOICES, dtype=torch.int32)
        *counting, placing = build_rows_launches(ids, EXPERTS, block_m, num_shared=1)[0]
        yield f"place_in_blocks {num_tokens}", placing
        yield from ((f"count_runs {num_tokens}", launch) for launch in counting)
    yield "place_in_rows", build_masked_rows_launches(empty(256, CHOICES, dtype=torch.int32), EXPERTS, 256)[0][-1]


def rows() -> Iterator[tuple[str, Launch]]:
    """Yield what reads or writes rows of activations."""
    hidden, values = empty(TOKENS, HIDDEN, dtype=BF16), empty(TOKENS * CHOICES, HIDDEN, dtype=BF16)
    ids, norm = empty(TOKENS, CHOICES, dtype=torch.int32), empty(HIDDEN, dtype=BF16)
    for name, dtype, is_grouped in (("fp8", E4M3, False), ("fp8 grouped", E4M3, True), ("int8", torch.int8, False)):
        out = new_quantized_rows(TOKENS, HIDDEN, dtype, META, is_grouped=is_grouped)
        yield f"quantize_rows {name}", quantize_rows_launch(hidden, out)
    placed = blocks(128)
    for name, given in (("tokens", hidden), ("rows", empty(len(placed.slots_P), INTERMEDIATE, dtype=BF16))):
        out = inputs(ExpertScheme.NVFP4, len(placed.slots_P), given.shape[1], is_quantized=True)
        is_gathered = name == "tokens"
        yield (
            f"quantize_fp4 {name}",
            quantize_fp4_rows_launch(given, empty(EXPERTS), placed, out, is_gathered=is_gathered),
        )
    yield "combine", combine_launch(values, ids)
    yield "combine residual", combine_launch(values, ids, residual_TH=hidden)
    yield "combine norm", combine_launch(values, ids, residual_TH=hidden, norm=(norm, 1e-5))
    yield "rms_norm", rms_norm_launch(hidden, norm, 1e-5)
    yield "add_rms_norm", rms_norm_launch(hidden, norm, 1e-5, residual=hidden)


def gemv() -> Iterator[tuple[str, Launch]]:
    """Yield the products of a token; some at an eighth of GLM-4.5-Air, where tiles and blocks are not full."""
    yield from _gemv(GLM, GEMV_SCHEMES)
    yield from _gemv(SHARD, (ExpertScheme.BF16, ExpertScheme.FP8_BLOCK))


def _gemv(sizes: Sizes, schemes: tuple[ExpertScheme, ...]) -> Iterator[tuple[str, Launch]]:
    ids = empty(1, CHOICES, dtype=torch.int32)
    # no layout is asked for here
    name = sizes.name.replace("masked ", "")
    for scheme in schemes:
        dtype, of_sizes = product_dtype(scheme), weights(scheme, sizes)
        token, active = empty(1, sizes.hidden, dtype=dtype), empty(CHOICES, sizes.intermediate, dtype=dtype)
        yield f"{name}up_gemv {scheme}", up_gemv_launch(token, ids, of_sizes)
        yield f"{name}down_gemv {scheme}", down_gemv_launch(active, ids, empty(1, CHOICES), of_sizes)


def attention() -> Iterator[tuple[str, Launch]]:
    """Yield what attention takes, with keys and values in bf16 and in FP8, for prefill and decoding."""
    norms = HeadNorms(empty(HEAD_DIM, dtype=BF16), empty(HEAD_DIM, dtype=BF16), 1e-5)
    query, key = empty(TOKENS, HEADS, HEAD_DIM, dtype=BF16), empty(TOKENS, KV_HEADS, HEAD_DIM, dtype=BF16)
    angles = empty(131072, HEAD_DIM // 4)
    yield "rope", rope_launch(query, key, angles, angles, empty(TOKENS, dtype=torch.int64), norms=norms)
    for name, dtype in (("bf16", BF16), ("fp8", E4M3)):
        stored = empty(1024, PAGE, KV_HEADS, HEAD_DIM, dtype=dtype)
        pages = KvPages(stored, stored, empty(2) if dtype is E4M3 else None)
        yield f"write_pages {name}", write_pages_launch(key, key, empty(TOKENS, dtype=torch.int64), pages)
        for kind, num_tokens, most, run in (("prefill", TOKENS, 512, 0), ("decode", 8, 1, 0), ("split", 8, 1, 512)):
            sequences, table = empty(9, dtype=torch.int32), empty(8, 64, dtype=torch.int32)
            batch = PagedBatch(sequences, empty(8, dtype=torch.int32), table, most)
            attend, *adding = paged_attention_launches(query[:num_tokens], pages, batch, run_tokens=run)
            yield f"paged_attention {kind} {name}", attend
            yield from ((f"add_runs {name}", launch) for launch in adding)
        for_all = tile(1, HEADS // KV_HEADS, is_invariant=True)
        yield f"paged_attention invariant {name}", paged_attention_launches(query, pages, batch, tile_of=for_all)[0]


def sampling() -> Iterator[tuple[str, Launch]]:
    """Yield what chooses the next token."""
    numbers, seeds = empty(8), empty(8, dtype=torch.int64)
    top_k, uniforms = empty(8, dtype=torch.int32), empty(8, dtype=torch.float64)
    yield "sample", sample_launch(empty(8, VOCAB), numbers, top_k, numbers, uniforms)
    yield "philox_uniforms", philox_uniforms_launch(seeds, seeds)


def small_launches(config: Glm4MoeConfig) -> dict[str, Launch]:
    """Return all of them by name."""
    return {**dict(routing(config)), **dict(rows()), **dict(gemv()), **dict(attention()), **dict(sampling())}
