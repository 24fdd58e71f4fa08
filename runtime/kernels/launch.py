"""A kernel with its arguments: what runs on a GPU, in the interpreter, or is compiled without either."""

from dataclasses import dataclass
from typing import Any

import torch

from converters.quant.scheme import Arithmetic


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch, and the tensors that it leaves behind.

    Attributes:
        kernel: a function under `triton.jit`.
        programs: how many of it.
        arguments: tensors, descriptors of tensors, numbers, and None for what is not there, in the kernel's order.
        constants: what it is compiled for.
        outputs: as the torch twin returns them; those that were known before may lie on the CPU.
        num_warps: of a program.
        num_stages: how many steps of a loop are loaded ahead; None is triton's choice.
    """

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, Any]
    outputs: tuple[torch.Tensor, ...]
    num_warps: int = 4
    num_stages: int | None = None

    def run(self) -> tuple[torch.Tensor, ...]:
        """Launch on the current stream and return the outputs, which may not be there yet."""
        self.kernel[(self.programs,)](*self.arguments, **self.constants, **self.options)
        return self.outputs

    @property
    def options(self) -> dict[str, Any]:
        """How to compile it: a fused product and sum has other last bits."""
        stages = {} if self.num_stages is None else {"num_stages": self.num_stages}
        return {"num_warps": self.num_warps, "enable_fp_fusion": False, **stages}


def as_stored(weight_RC: torch.Tensor) -> torch.Tensor:
    """Return weights as kernels take them: bf16 as int16."""
    return weight_RC.view(torch.int16) if weight_RC.dtype is torch.bfloat16 else weight_RC


@dataclass(frozen=True, slots=True)
class Rules:
    """What an arithmetic asks of a kernel, for weights of a dtype."""

    arithmetic: Arithmetic
    weight_dtype: torch.dtype

    @property
    def scale_dtype(self) -> torch.dtype:
        """Dtype of scales that are stored, but for those in E4M3."""
        is_wide = self.weight_dtype is torch.float16 and self.arithmetic is Arithmetic.FLOAT32
        return torch.float32 if is_wide or self.is_modelopt else self.weight_dtype

    @property
    def is_modelopt(self) -> bool:
        """Whether scales are made as modelopt makes them."""
        return self.arithmetic is Arithmetic.MODELOPT

    @property
    def is_narrow(self) -> bool:
        """Whether quotients are rounded to the weight's dtype."""
        return self.arithmetic is Arithmetic.COMPRESSED_TENSORS

    @property
    def is_positive_zero(self) -> bool:
        """Whether a weight of -0 gets the code of +0."""
        return self.arithmetic is Arithmetic.COMPRESSED_TENSORS

    def constants(self, largest_code: float) -> dict[str, Any]:
        """Return the constants of `runtime.kernels.numbers.symmetric_scale`."""
        least = torch.finfo(self.weight_dtype).tiny if self.is_modelopt else torch.finfo(self.scale_dtype).eps
        return {"LARGEST": largest_code, "LEAST": least, "IS_MODELOPT": self.is_modelopt}

    def new_scales(self, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
        """Return room for scales."""
        return torch.empty(shape, dtype=self.scale_dtype, device=device)
