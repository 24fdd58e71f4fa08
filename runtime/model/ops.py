"""What a model does besides its products and experts: our kernels, their torch twins, or torch code of its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from runtime.config import AUTO, FP8, TORCH, EngineConfig, supports_triton
from runtime.moe.plan import TRITON

# masses of tokens are whole numbers, whose sum a kernel holds in 64 bits
MAX_VOCAB = (1 << 18) - 1

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class LayerOps:
    """The steps, as kernels or as their twins; signatures are those of `runtime.kernels.ops`."""

    rms_norm: Callable[..., torch.Tensor]
    add_rms_norm: Callable[..., Pair]
    rope: Callable[..., Pair]
    write_pages: Callable[..., None]
    paged_attention: Callable[..., torch.Tensor]
    sample: Callable[..., torch.Tensor]
    philox_uniforms: Callable[..., torch.Tensor]

    @classmethod
    def of_kernels(cls, *, is_batch_invariant: bool = False) -> "LayerOps":
        """Return the Triton kernels; `is_batch_invariant`: with an attention of one tile for all numbers of tokens."""
        from runtime.kernels.ops import paged_attention, rms_norm, rope, sampling, write_pages

        found = cls._of(rms_norm, rope, write_pages, paged_attention, sampling)
        invariant = paged_attention.invariant_paged_attention
        return replace(found, paged_attention=invariant) if is_batch_invariant else found

    @classmethod
    def of_twins(cls) -> "LayerOps":
        """Return what the kernels are held against; on a GPU the host waits for it."""
        from runtime.kernels.twins import paged_attention, rms_norm, rope, sampling, write_pages

        return cls._of(rms_norm, rope, write_pages, paged_attention, sampling)

    @classmethod
    def _of(cls, rms_norm: Any, rope: Any, write_pages: Any, paged_attention: Any, sampling: Any) -> "LayerOps":
        return cls(
            rms_norm.rms_norm,
            rms_norm.add_rms_norm,
            rope.rope,
            write_pages.write_pages,
            paged_attention.paged_attention,
            sampling.sample,
            sampling.philox_uniforms,
        )


@dataclass(frozen=True, slots=True)
class OpsPlan:
    """What a model runs on.

    Args:
        ops: None: torch code over keys and values in one block.
        notes: what was chosen, and why, a sentence each.
    """

    ops: LayerOps | None
    notes: tuple[str, ...] = ()


def plan_ops(config: Glm4MoeConfig, engine: EngineConfig) -> OpsPlan:
    """Return what a model runs on.

    Raises:
        UsageError: kernels were asked for that cannot run this model.
    """
    kernels, notes = engine.kernels, tuple[str, ...]()
    if kernels == AUTO:
        kernels, why = _choose(config, engine)
        notes = (f"Norms, attention and sampling run in {kernels}: {why}.",)
    if kernels == TORCH:
        # torch code of the model itself knows no codes
        return OpsPlan(LayerOps.of_twins() if engine.kv_cache_dtype == FP8 else None, notes)
    if config.vocab_size > MAX_VOCAB:
        raise UsageError(
            f"kernels {engine.kernels!r}",
            expected=f"a vocabulary of at most {MAX_VOCAB} tokens",
            found=str(config.vocab_size),
            next_step=f"Use --kernels {TORCH}.",
        )
    return OpsPlan(LayerOps.of_kernels(is_batch_invariant=engine.moe_deterministic), notes)


def _choose(config: Glm4MoeConfig, engine: EngineConfig) -> tuple[str, str]:
    """Return what to run on, and why."""
    if engine.device == "cpu":
        return TORCH, "on the CPU kernels are only interpreted"
    if not supports_triton(engine.device):
        return TORCH, "the kernels are not made for this GPU"
    if engine.dtype != "bfloat16":
        return TORCH, f"the kernels are not made for {engine.dtype}"
    if config.vocab_size > MAX_VOCAB:
        return TORCH, f"the kernels take at most {MAX_VOCAB} tokens of a vocabulary"
    return TRITON, "kernels for this GPU"
