"""What the grouped products are launched with.

Shapes: N rows and K columns of an expert's weight.
"""

from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from runtime.kernels.launch import Launch
from runtime.kernels.moe.configs import SHARED_MEMORY_BYTES, TileConfig
from runtime.moe.inputs import Inputs, QuantizedRows, Rows
from runtime.moe.layouts import MaskedRows
from runtime.moe.weights import BLOCK, ExpertScheme, Packed

# programs of a persistent kernel in the interpreter: more than one, so that tiles are shared out
_INTERPRETED_PROGRAMS = 2
_MOST_PROGRAMS_EACH = 4
_W_SCALES = {
    ExpertScheme.FP8_CHANNEL: "channel",
    ExpertScheme.FP8_BLOCK: "block",
    ExpertScheme.INT8_CHANNEL: "channel",
    ExpertScheme.INT8_W8A8: "channel",
    ExpertScheme.NVFP4: "group",
}


@dataclass(frozen=True, slots=True)
class Product:
    """A grouped product: inputs times the weights of the experts that rows belong to.

    Args:
        inputs: (rows, K).
        packed: the weights.
        scheme: theirs.
        rows: which expert and slot each row has.
        config: tiles.
        is_up: rows of the weight are interleaved, and inputs gathered unless laid out, as those of down are.
        native_fp4: NVFP4 inputs and weights are multiplied as codes, which takes Blackwell.
    """

    inputs: Inputs
    packed: Packed
    scheme: ExpertScheme
    rows: Rows
    config: TileConfig
    is_up: bool
    native_fp4: bool = False

    @property
    def codes(self) -> torch.Tensor:
        """Inputs as stored."""
        return self.inputs.codes if isinstance(self.inputs, QuantizedRows) else self.inputs

    @property
    def num_columns(self) -> int:
        """K."""
        return self.packed.codes.shape[2] * (2 if self.scheme is ExpertScheme.NVFP4 else 1)

    def launch(self, kernel: Any, out: tuple[torch.Tensor | None, ...], constants: dict[str, Any]) -> Launch:
        """Return the launch of a kernel whose arguments begin with those of `_arguments`, then `out`, then rows."""
        self._check()
        config = self.config
        arguments = (*self._arguments(), *out, *self._row_arguments())
        num_rows = self.packed.codes.shape[1]
        shape = {"N": num_rows, "K": self.num_columns, "A_TMA": self._describes_rows, "W_TMA": config.tma}
        tiles = {name: getattr(config, name.lower()) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SWAP_AB")}
        kinds = {
            "A_SCALES": self._a_scales,
            "W_SCALES": _W_SCALES.get(self.scheme, "none"),
            "IS_INT8": self.codes.dtype is torch.int8,
            "NATIVE_FP4": self.native_fp4,
            "MASKED": isinstance(self.rows, MaskedRows),
            "A_GLOBALS": int(self._has_global_each),
        }
        programs = self._num_programs(self._max_blocks() * triton.cdiv(num_rows, config.block_n))
        outputs = tuple(tensor for tensor in out if tensor is not None)
        all_constants = shape | kinds | tiles | constants
        return Launch(kernel, programs, arguments, all_constants, outputs, config.num_warps, config.num_stages)

    @property
    def is_gathered(self) -> bool:
        """Whether inputs lie in the order of tokens."""
        return self.is_up and not (isinstance(self.inputs, QuantizedRows) and self.inputs.is_laid_out)

    @property
    def _has_global_each(self) -> bool:
        """Whether inputs of each expert have a global scale of their own."""
        found = self.inputs.global_scale if isinstance(self.inputs, QuantizedRows) else None
        return found is not None and len(found) > 1

    @property
    def _a_scales(self) -> str:
        if not isinstance(self.inputs, QuantizedRows):
            return "none"
        if self.scheme is ExpertScheme.NVFP4:
            return "group"
        return "block" if self.inputs.is_grouped else "row"

    @property
    def _describes_rows(self) -> bool:
        """Whether inputs are read by a descriptor as well: where they need no gathering."""
        return self.config.tma and not self.is_gathered and self.codes.stride(0) * self.codes.itemsize % 16 == 0

    def _arguments(self) -> tuple[Any, ...]:
        config, inputs, packed = self.config, self.inputs, self.packed
        a_pack = 2 if self._a_scales == "group" else 1
        w_pack = 2 if self.scheme is ExpertScheme.NVFP4 else 1
        a, w = self.codes, packed.codes
        quantized = inputs if isinstance(inputs, QuantizedRows) else None
        return (
            _described(a, config.block_m, config.block_k // a_pack) if self._describes_rows else a,
            None if quantized is None else quantized.scales,
            None if quantized is None else quantized.global_scale,
            _described(w.flatten(0, 1), config.block_n, config.block_k // w_pack) if config.tma else w,
            packed.scales,
            packed.global_scale,
        )

    def _row_arguments(self) -> tuple[Any, ...]:
        """Slots, experts of blocks or counts, number of blocks, number of experts, capacity."""
        num_experts = len(self.packed.codes)
        if isinstance(self.rows, MaskedRows):
            return self.rows.slots, self.rows.counts, None, num_experts, self.rows.slots.shape[1]
        return self.rows.slots_P, self.rows.expert_of_block, self.rows.num_blocks, num_experts, 0

    def _max_blocks(self) -> int:
        if isinstance(self.rows, MaskedRows):
            num_experts, capacity = self.rows.slots.shape
            return num_experts * triton.cdiv(capacity, self.config.block_m)
        return len(self.rows.expert_of_block)

    def _num_programs(self, num_tiles: int) -> int:
        if not self.config.persistent:
            return num_tiles
        if self.codes.device.type != "cuda":
            return min(num_tiles, _INTERPRETED_PROGRAMS)
        config = self.config
        stage = config.block_k * (config.block_m * self.codes.itemsize + config.block_n * self.packed.codes.itemsize)
        each = min(_MOST_PROGRAMS_EACH, max(1, SHARED_MEMORY_BYTES // (stage * config.num_stages)))
        num_processors = torch.cuda.get_device_properties(self.codes.device).multi_processor_count
        return min(num_tiles, num_processors * each)

    def _check(self) -> None:
        """Hold what the caller gives against what the kernels can do."""
        rows, config = self.rows, self.config
        assert isinstance(rows, MaskedRows) or rows.block_m == config.block_m, (rows, config)
        is_grouped = self._a_scales == "block" or self.scheme is ExpertScheme.FP8_BLOCK
        assert not is_grouped or BLOCK % config.block_k == 0, config
        assert self.codes.is_contiguous(), self.codes.stride()
        if isinstance(self.inputs, QuantizedRows):
            assert self.codes.dtype is self.packed.codes.dtype, (self.codes.dtype, self.scheme)
        elif self.scheme.is_plain:
            assert self.codes.dtype is self.scheme.code_dtype, (self.codes.dtype, self.scheme)


def _described(tensor_RC: torch.Tensor, height: int, width: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(tensor_RC, [height, width])
