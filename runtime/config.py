"""How to run a model; what the model is stands in its own config."""

from dataclasses import dataclass

import torch

from converters.errors import UsageError
from converters.formats.inputs import ACTIVATIONS, FULL
from runtime.kernels.mode import is_interpreted
from runtime.moe.plan import BACKENDS, BATCHED, CUTLASS, TRITON, VANILLA

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("cpu", "cuda")
AUTO = "auto"
TORCH = "torch"
FP8 = "fp8"
MOE_BACKENDS = (AUTO, *BACKENDS)
KERNELS = (AUTO, TORCH, TRITON)
KV_CACHE_DTYPES = (AUTO, FP8)
ON, OFF = "on", "off"
FUSED_SHARED_EXPERTS = (AUTO, ON, OFF)
# torch's grouped product is written for it and later
_CUTLASS_CAPABILITY = (8, 0)
# what the kernels are compiled and tested for
_TRITON_CAPABILITY = (9, 0)
# matrix units that multiply NVFP4 codes
_FP4_CAPABILITY = (10, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Choices of one run.

    Args:
        dtype: of activations and unquantized weights; router, norms, softmax and logits are fp32 in any case. float16
            ends at 65,504: where a model's activations exceed it, logits are NaN, and sampling refuses them.
        device: where the model lives.
        moe_backend: what multiplies the experts; auto = what suits device, scheme and rows per expert.
        kernels: what norms, turns heads, attends and samples: torch, or our kernels over a paged KV cache; auto = what
            suits device and dtype.
        kv_cache_dtype: of keys and values; auto = dtype; fp8 = E4M3 codes by the checkpoint's scales, 1 without them.
        fused_shared_experts: compute the shared expert as one of the experts; auto = where backend and schemes allow.
        moe_deterministic: what the experts add to a token does not depend on what it is batched with, nor does what
            kernels attend to; the products of other layers are torch's.
        activations: `full`: as they are; `as-served`: inputs of quantized layers are rounded as the checkpoint's config
            has engines do it.
        max_context_tokens: prompt and output together; None = the model's max_position_embeddings.
        prefill_chunk_tokens: prompt tokens per forward pass; bounds the memory of attention scores.
    """

    dtype: str = "bfloat16"
    device: str = "cpu"
    moe_backend: str = VANILLA
    kernels: str = TORCH
    kv_cache_dtype: str = AUTO
    fused_shared_experts: str = AUTO
    moe_deterministic: bool = False
    activations: str = FULL
    max_context_tokens: int | None = None
    prefill_chunk_tokens: int = 512

    def __post_init__(self) -> None:
        """Refuse what is not implemented, by name."""
        _require_one_of("dtype", self.dtype, tuple(DTYPES))
        _require_one_of("device", self.device, DEVICES)
        _require_one_of("moe_backend", self.moe_backend, MOE_BACKENDS)
        _require_one_of("kernels", self.kernels, KERNELS)
        _require_one_of("kv_cache_dtype", self.kv_cache_dtype, KV_CACHE_DTYPES)
        _require_one_of("fused_shared_experts", self.fused_shared_experts, FUSED_SHARED_EXPERTS)
        _require_one_of("activations", self.activations, ACTIVATIONS)
        _require_positive("prefill_chunk_tokens", self.prefill_chunk_tokens)
        if self.max_context_tokens is not None:
            _require_positive("max_context_tokens", self.max_context_tokens)
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UsageError("device 'cuda'", expected="a CUDA device", found="none", next_step="Use --device cpu.")
        self._check_moe()
        if self.kernels == TRITON:
            _require_triton("kernels", self.device, f"--kernels {TORCH}")

    def _check_moe(self) -> None:
        """Refuse what no model changes; what depends on the checkpoint is refused when it is planned."""
        subject, fits_both = f"moe_backend {self.moe_backend!r}", f"{BATCHED} or {TRITON}"
        if self.moe_deterministic and self.moe_backend in (VANILLA, CUTLASS):
            raise UsageError(subject, expected=f"{fits_both} with moe_deterministic", found=self.moe_backend)
        if self.moe_deterministic and self.fused_shared_experts == OFF:
            raise UsageError("fused_shared_experts 'off'", expected="on or auto with moe_deterministic", found=OFF)
        if self.moe_backend == VANILLA and self.fused_shared_experts == ON:
            found, others = "experts that run one after the other", f"{BATCHED}, {CUTLASS} or {TRITON}"
            raise UsageError(subject, expected=f"{others} with fused_shared_experts 'on'", found=found)
        if self.moe_backend == TRITON:
            _require_triton("moe_backend", self.device, f"--moe-backend {BATCHED}")
            self._require_dtype_of_tiles(subject)
        if self.moe_backend == CUTLASS and not supports_cutlass(self.device, self.dtype):
            raise UsageError(
                subject,
                expected="bfloat16 on a GPU of compute capability 8.0 or later",
                found=f"{self.dtype} on {torch.cuda.get_device_name()}",
                next_step=f"Use --moe-backend {BATCHED}.",
            )

    def _require_dtype_of_tiles(self, subject: str) -> None:
        """Refuse fp32 on a GPU: tiles of it exceed a program's shared memory where an expert has some ten rows."""
        if self.dtype == "float32" and not is_interpreted():
            raise UsageError(
                subject,
                expected="bfloat16 or float16 on a GPU",
                found=self.dtype,
                next_step=f"Use --dtype bfloat16, or --moe-backend {BATCHED}.",
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of compute as torch names it."""
        return DTYPES[self.dtype]


def supports_cutlass(device: str, dtype: str) -> bool:
    """Return whether torch has a grouped product for a device and dtype; on the CPU it takes all."""
    is_new = device == "cpu" or torch.cuda.get_device_capability() >= _CUTLASS_CAPABILITY
    return is_new and (device == "cpu" or dtype == "bfloat16")


def supports_triton(device: str) -> bool:
    """Return whether the fused kernels run on a device: on Hopper and later, or anywhere in triton's interpreter."""
    if is_interpreted():
        return True
    return device == "cuda" and torch.cuda.get_device_capability() >= _TRITON_CAPABILITY


def multiplies_fp4(device: str) -> bool:
    """Return whether the kernels multiply NVFP4 codes with each other: on Blackwell, or in triton's interpreter."""
    if is_interpreted():
        return True
    return device == "cuda" and torch.cuda.get_device_capability() >= _FP4_CAPABILITY


def resolve_dtype(name: str, checkpoint_dtype: str) -> str:
    """Return the dtype to compute in; auto = the checkpoint's own, float32 where that is float16: it may overflow."""
    if name != AUTO:
        return name
    return checkpoint_dtype if checkpoint_dtype in DTYPES and checkpoint_dtype != "float16" else "float32"


def resolve_device(name: str) -> str:
    """Return the device to run on; auto = cuda where there is one."""
    if name != AUTO:
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


def _require_triton(field: str, device: str, instead: str) -> None:
    if not supports_triton(device):
        raise UsageError(
            f"{field} {TRITON!r}",
            expected="a GPU of compute capability 9.0 or later, or TRITON_INTERPRET=1",
            found="the CPU" if device == "cpu" else torch.cuda.get_device_name(),
            next_step=f"Use {instead}.",
        )


def _require_one_of(field: str, value: str, supported: tuple[str, ...]) -> None:
    if value not in supported:
        raise UsageError(f"{field} {value!r}", expected=f"one of {', '.join(supported)}")


def _require_positive(field: str, value: int) -> None:
    if value < 1:
        raise UsageError(field, expected="at least 1", found=str(value))
