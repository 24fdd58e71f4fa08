"""Transforms on a CUDA GPU: every thread has a stream of its own and page-locked buffers to copy through."""

import importlib.util
import threading
from dataclasses import dataclass, field

import torch

from converters.accelerator import Accelerator, Proved
from converters.errors import ResourceError, UsageError
from converters.transforms.restore import is_quantizing
from converters.transforms.rows import RowTransform

# of bf16 weights: a block then takes longer to copy than to launch
BLOCK_BYTES = 8 << 20
# Ampere: older GPUs are not compiled for in the tests
LEAST_CAPABILITY = (8, 0)


def open_accelerator(device: str) -> Accelerator | None:
    """Return what carries out transforms on a device: None for cpu, and for auto where no GPU can be used.

    Raises:
        UsageError: cuda, where no GPU can be used.
    """
    if device == "cpu":
        return None
    missing = missing_for_cuda()
    if not missing:
        return Proved(CudaAccelerator())
    if device == "auto":
        return None
    raise UsageError(
        f"--device {device}",
        expected="an NVIDIA GPU of compute capability {}.{} or newer, and triton".format(*LEAST_CAPABILITY),
        found=missing,
        next_step="Use --device cpu: the result has the same bytes.",
    )


def missing_for_cuda() -> str:
    """Return what keeps this machine from running the kernels; empty if nothing does."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use"
    if torch.version.hip is not None:
        return "a GPU that is not NVIDIA's"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        return "one of capability {}.{}".format(*capability)
    return "" if importlib.util.find_spec("triton") else "no triton"


class CudaAccelerator:
    """The current GPU.

    Per source byte of a block, on the CPU: the block itself, and at most twice as much as block and outputs together,
    since page-locked memory comes in powers of two; see `converters.accelerator.Accelerator`. On the GPU, a worker has
    a block and its outputs.
    """

    name = "cuda"
    block_bytes = BLOCK_BYTES

    def __init__(self) -> None:
        self._device = torch.cuda.current_device()
        self._lanes = threading.local()
        # a kernel is compiled by the first thread that needs it, while the others wait
        self._launching = threading.Lock()

    def supports(self, transform: RowTransform) -> bool:
        """Return whether there is a kernel for a transform."""
        return is_quantizing(transform)

    def apply(
        self, transform: RowTransform, rows_RC: torch.Tensor, *beside: torch.Tensor
    ) -> tuple[torch.Tensor, ...] | None:
        """Return the outputs of a transform; see `Accelerator.apply`.

        Raises:
            ResourceError: the GPU's memory is full.
        """
        from runtime.kernels.quantize import is_sound, prepare

        if not self.supports(transform):
            return None
        try:
            with torch.cuda.device(self._device), torch.cuda.stream(self._lane().stream):
                launch = prepare(transform, self._lane().send(rows_RC), *beside)
                if launch is None:
                    return None
                with self._launching:
                    launch.run()
                outputs = self._lane().fetch(launch.outputs)
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                "GPU memory",
                expected=f"room for {self.block_bytes * 3} bytes a worker",
                found="less",
                next_step="Use fewer workers, or --device cpu.",
            ) from error
        return outputs if is_sound(outputs) else None

    def _lane(self) -> "_Lane":
        """Return what this thread copies through."""
        if not hasattr(self._lanes, "lane"):
            self._lanes.lane = _Lane(torch.cuda.Stream(self._device))
        lane: _Lane = self._lanes.lane
        return lane


@dataclass(frozen=True, slots=True)
class _Lane:
    """The stream of one thread, and its page-locked buffers by use."""

    stream: torch.cuda.Stream
    pinned: dict[int, torch.Tensor] = field(default_factory=dict)

    def send(self, rows_RC: torch.Tensor) -> torch.Tensor:
        """Return rows on the GPU, copied in the order of the stream."""
        staged_RC = self._take(-1, rows_RC).copy_(rows_RC)
        return staged_RC.to(self.stream.device, non_blocking=True)

    def fetch(self, outputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Return outputs on the CPU, once all of the stream is done."""
        fetched = tuple(
            self._take(slot, output).copy_(output, non_blocking=True) if output.is_cuda else output
            for slot, output in enumerate(outputs)
        )
        self.stream.synchronize()
        return fetched

    def _take(self, slot: int, like: torch.Tensor) -> torch.Tensor:
        nbytes = like.numel() * like.element_size()
        if slot not in self.pinned or len(self.pinned[slot]) < nbytes:
            # not both at once
            self.pinned.pop(slot, None)
            self.pinned[slot] = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        return self.pinned[slot][:nbytes].view(like.dtype).view(like.shape)
