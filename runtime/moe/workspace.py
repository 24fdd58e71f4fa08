"""Buffers that all MoE layers of a model use in turn: after a warm-up nothing large is allocated any more."""

from dataclasses import dataclass, field
from math import prod

import torch


@dataclass(slots=True)
class Workspace:
    """Memory by name, as large as the largest use so far.

    A buffer that grows moves, which a CUDA graph does not survive: warm up with as many tokens as will ever come, then
    set `is_fixed`.

    Args:
        device: where it lies.
        is_fixed: refuse to grow.
    """

    device: torch.device
    is_fixed: bool = False
    _buffers: dict[tuple[str, torch.dtype], torch.Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor with undefined values; it is valid until the same name is taken again."""
        size, key = prod(shape), (name, dtype)
        found = self._buffers.get(key)
        if found is None or len(found) < size:
            assert not self.is_fixed, f"{name}: {size} values after warm-up, {0 if found is None else len(found)} held"
            # the old one goes first
            self._buffers.pop(key, None)
            found = self._buffers[key] = torch.empty(size, dtype=dtype, device=self.device)
        return found[:size].view(shape)

    @property
    def num_bytes(self) -> int:
        """Memory held."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    def addresses(self) -> dict[str, int]:
        """Return where each buffer lies."""
        return {f"{name} {dtype}": buffer.data_ptr() for (name, dtype), buffer in self._buffers.items()}
