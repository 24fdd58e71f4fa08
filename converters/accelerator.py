"""What may carry out transforms in place of the CPU. The bytes of a result do not depend on it."""

import threading
from typing import TYPE_CHECKING, Protocol

from converters.errors import UsageError
from converters.transforms.quantize import QuantizeFp8Block
from converters.transforms.rows import RowTransform

if TYPE_CHECKING:
    import torch

# the part of a block that is made twice: its copies fit into what the transform may use anyway
_PROOF_SHARE = 8


class Accelerator(Protocol):
    """Carries out transforms of blocks, for any number of threads at once."""

    @property
    def name(self) -> str:
        """What users call it."""

    @property
    def block_bytes(self) -> int:
        """Source bytes that are worth handing over at once."""

    def supports(self, transform: RowTransform) -> bool:
        """Return whether it carries out a transform, for most rows at least."""

    def apply(
        self, transform: RowTransform, rows_RC: "torch.Tensor", *beside: "torch.Tensor"
    ) -> "tuple[torch.Tensor, ...] | None":
        """Return what the transform returns, byte for byte; None to leave these rows to the transform.

        Memory in use per source byte, on the CPU, is at most the transform's `working_bytes`. What is returned lies
        there and is overwritten when the same thread calls again.
        """


class Proved:
    """An accelerator whose first rows of each kind are made on the CPU too.

    Raises:
        UsageError: they have other bytes there.
    """

    def __init__(self, inner: Accelerator) -> None:
        self.inner = inner
        self._lock = threading.Lock()
        self._proved: set[tuple[RowTransform, torch.dtype, int]] = set()

    @property
    def name(self) -> str:
        """What users call it."""
        return self.inner.name

    @property
    def block_bytes(self) -> int:
        """Source bytes that are worth handing over at once."""
        return self.inner.block_bytes

    def supports(self, transform: RowTransform) -> bool:
        """Return whether it carries out a transform."""
        return self.inner.supports(transform)

    def apply(
        self, transform: RowTransform, rows_RC: "torch.Tensor", *beside: "torch.Tensor"
    ) -> "tuple[torch.Tensor, ...] | None":
        """Return what the accelerator returns; see `Accelerator.apply`."""
        made = self.inner.apply(transform, rows_RC, *beside)
        kind = (transform, rows_RC.dtype, rows_RC.shape[1])
        if made is not None and kind not in self._proved:
            # one at a time, so that the copies of all workers do not add up
            with self._lock:
                if kind not in self._proved:
                    self._prove(transform, rows_RC, beside, made)
                    self._proved.add(kind)
        return made

    def _prove(
        self,
        transform: RowTransform,
        rows_RC: "torch.Tensor",
        beside: "tuple[torch.Tensor, ...]",
        made: "tuple[torch.Tensor, ...]",
    ) -> None:
        import torch

        grain = transform.rows if isinstance(transform, QuantizeFp8Block) else 1
        rows = max(1, len(rows_RC) // _PROOF_SHARE // grain) * grain
        expected = transform(rows_RC[:rows], *(rows_BC[:rows] for rows_BC in beside))
        for ours, theirs in zip(made, expected, strict=True):
            found = ours[: len(theirs)]
            if found.dtype is not theirs.dtype or not torch.equal(_bytes(found), _bytes(theirs)):
                raise UsageError(
                    f"--device {self.name}",
                    expected="the bytes that the CPU makes",
                    found=f"others in {transform.name}",
                    next_step="Use --device cpu, and report the versions that 'glm4moe doctor' shows.",
                )


def _bytes(block: "torch.Tensor") -> "torch.Tensor":
    import torch

    return block.contiguous().view(-1).view(torch.uint8)
