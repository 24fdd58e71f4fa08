"""How to run a model; what the model is stands in its own config."""

from dataclasses import dataclass

import torch

from converters.errors import UsageError
from converters.formats.inputs import ACTIVATIONS, FULL

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
DEVICES = ("cpu", "cuda")
MOE_BACKENDS = ("vanilla",)
AUTO = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Choices of one run.

    Args:
        dtype: of activations, unquantized weights and KV cache; router, norms, softmax and logits are fp32 in any case.
        device: where the model lives.
        moe_backend: what multiplies the experts.
        activations: `full`: as they are; `as-served`: inputs of quantized layers are rounded as the checkpoint's config
            has engines do it.
        max_context_tokens: prompt and output together; None = the model's max_position_embeddings.
        prefill_chunk_tokens: prompt tokens per forward pass; bounds the memory of attention scores.
    """

    dtype: str = "bfloat16"
    device: str = "cpu"
    moe_backend: str = "vanilla"
    activations: str = FULL
    max_context_tokens: int | None = None
    prefill_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        """Refuse what is not implemented, by name."""
        _require_one_of("dtype", self.dtype, tuple(DTYPES))
        _require_one_of("device", self.device, DEVICES)
        _require_one_of("moe_backend", self.moe_backend, MOE_BACKENDS)
        _require_one_of("activations", self.activations, ACTIVATIONS)
        _require_positive("prefill_chunk_tokens", self.prefill_chunk_tokens)
        if self.max_context_tokens is not None:
            _require_positive("max_context_tokens", self.max_context_tokens)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device 'cuda'", expected="a CUDA device", found="none", next_step="Use --device cpu.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of compute as torch names it."""
        return DTYPES[self.dtype]


def resolve_dtype(name: str, checkpoint_dtype: str) -> str:
    """Return the dtype to compute in; auto = the checkpoint's own, float32 where that is float16."""
    if name != AUTO:
        return name
    return checkpoint_dtype if checkpoint_dtype in DTYPES else "float32"


def resolve_device(name: str) -> str:
    """Return the device to run on; auto = cuda where there is one."""
    if name != AUTO:
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _require_one_of(field: str, value: str, supported: tuple[str, ...]) -> None:
    if value not in supported:
        raise UsageError(f"{field} {value!r}", expected=f"one of {', '.join(supported)}")


def _require_positive(field: str, value: int) -> None:
    if value < 1:
        raise UsageError(field, expected="at least 1", found=str(value))
