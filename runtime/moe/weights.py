"""The experts of one layer in two tensors, in the layout that grouped kernels read.

Gate and up rows alternate, so that one accumulator holds both halves of a SwiGLU: row 2i is row i of the gate, row
2i + 1 row i of the up projection. A fused shared expert is the last one.

Shapes: E experts, the shared one included, H hidden, I intermediate, N rows and K columns of one matrix; blocks are
128 x 128, groups 16 columns.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

BLOCK = 128
GROUP = 16


class ExpertScheme(StrEnum):
    """How experts are stored, and what multiplies them. `w8a16`: 8-bit codes, inputs as they are."""

    BF16 = "bf16"
    FP16 = "fp16"
    FP32 = "fp32"
    FP8_CHANNEL = "fp8-channel"
    FP8_BLOCK = "fp8-block"
    INT8_CHANNEL = "int8-channel"
    INT8_W8A8 = "int8-w8a8"
    NVFP4 = "nvfp4"

    @property
    def is_plain(self) -> bool:
        """Whether the values themselves are stored."""
        return self in PLAIN_DTYPES

    @property
    def code_dtype(self) -> torch.dtype:
        """Dtype of the codes."""
        return PLAIN_DTYPES.get(self) or _CODE_DTYPES[self]


PLAIN_DTYPES = {
    ExpertScheme.BF16: torch.bfloat16,
    ExpertScheme.FP16: torch.float16,
    ExpertScheme.FP32: torch.float32,
}
_CODE_DTYPES = {
    ExpertScheme.FP8_CHANNEL: torch.float8_e4m3fn,
    ExpertScheme.FP8_BLOCK: torch.float8_e4m3fn,
    ExpertScheme.INT8_CHANNEL: torch.int8,
    ExpertScheme.INT8_W8A8: torch.int8,
    ExpertScheme.NVFP4: torch.uint8,
}


@dataclass(frozen=True, slots=True)
class Packed:
    """One matrix of all experts, N x K each.

    Args:
        codes: (E, N, K) values, float8_e4m3fn or int8; NVFP4 (E, N, K / 2) uint8, the even column in the low nibble.
        scales: fp32 (E, N) per channel; fp32 (E, ceil(N / 128), ceil(K / 128)) per block, for up
            (E, 2, ceil(I / 128), ceil(K / 128)) since blocks are those of gate and up before they were interleaved: row
            r belongs to block row (r // 2) // 128 of kind r % 2; NVFP4 (E, N, K / 16) float8_e4m3fn.
        global_scale: NVFP4: fp32 (E,); weight = code * scale * global_scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor | None = None
    global_scale: torch.Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Memory of all parts."""
        parts = (self.codes, self.scales, self.global_scale)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The experts of one layer.

    Args:
        scheme: of all of them.
        up: (E, 2I, H), gate and up interleaved.
        down: (E, H, I).
        num_routed: experts that the router chooses from.
        num_shared: 0, or 1: the last expert sees every token.
        hidden_size: H.
        intermediate_size: I.
    """

    scheme: ExpertScheme
    up: Packed
    down: Packed
    num_routed: int
    num_shared: int
    hidden_size: int
    intermediate_size: int

    @property
    def num_experts(self) -> int:
        """E, the shared one included."""
        return self.num_routed + self.num_shared

    @property
    def device(self) -> torch.device:
        """Where they lie."""
        return self.up.codes.device

    @property
    def num_bytes(self) -> int:
        """Memory of codes and scales."""
        return self.up.num_bytes + self.down.num_bytes

    def up_values(self, dtype: torch.dtype, experts: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Return some experts' interleaved gate and up weights (e, 2I, H), multiplied out in fp32 and rounded once.

        Args:
            dtype: of the result.
            experts: a slice or int64 indices (e,) on the device.
        """
        return dequantized(self.scheme, _chosen(self.up, experts), dtype, is_interleaved=True)

    def down_values(self, dtype: torch.dtype, experts: slice | torch.Tensor = slice(None)) -> torch.Tensor:
        """Return some experts' down weights (e, H, I), as `up_values` does."""
        return dequantized(self.scheme, _chosen(self.down, experts), dtype, is_interleaved=False)


def plain_weights(
    gate_EIH: torch.Tensor, up_EIH: torch.Tensor, down_EHI: torch.Tensor, *, num_shared: int = 0
) -> ExpertWeights:
    """Return experts that are stored as they are, of one dtype; of them the last `num_shared` is shared."""
    schemes = {dtype: scheme for scheme, dtype in PLAIN_DTYPES.items()}
    num_experts, intermediate_size, hidden_size = gate_EIH.shape
    return ExpertWeights(
        schemes[gate_EIH.dtype],
        Packed(interleave(gate_EIH, up_EIH)),
        Packed(down_EHI.contiguous()),
        num_experts - num_shared,
        num_shared,
        hidden_size,
        intermediate_size,
    )


def interleave(gate: torch.Tensor, up: torch.Tensor, dim: int = 1) -> torch.Tensor:
    """Return gate and up alternating along a dim: (E, I, ...) twice gives (E, 2I, ...)."""
    return torch.stack((gate, up), dim + 1).flatten(dim, dim + 1)


def dequantized(scheme: ExpertScheme, packed: Packed, dtype: torch.dtype, *, is_interleaved: bool) -> torch.Tensor:
    """Return weights (E, N, K), multiplied out in fp32 and rounded to `dtype` once."""
    codes, scales = packed.codes, packed.scales
    if scheme.is_plain:
        return codes.to(dtype)
    assert scales is not None, scheme
    match scheme:
        case ExpertScheme.NVFP4:
            assert packed.global_scale is not None, scheme
            factors = scales.to(torch.float32) * packed.global_scale[:, None, None]
            values = unpacked_e2m1(codes).unflatten(-1, (-1, GROUP)) * factors[..., None]
            return values.flatten(-2).to(dtype)
        case ExpertScheme.FP8_BLOCK:
            return (codes.to(torch.float32) * block_scales(scales, codes.shape[1:], is_interleaved)).to(dtype)
        case _:
            return (codes.to(torch.float32) * scales[..., None]).to(dtype)


def block_scales(scales: torch.Tensor, shape: tuple[int, ...], is_interleaved: bool) -> torch.Tensor:
    """Return the scales of blocks as one for each weight: (E, ...) fp32 to (E, N, K), `shape` being (N, K)."""
    num_rows, num_columns = shape
    if is_interleaved:
        # (E, 2, rows of blocks, columns of blocks): kinds alternate
        scales = scales.repeat_interleave(BLOCK, dim=2)[:, :, : num_rows // 2].transpose(1, 2).flatten(1, 2)
    else:
        scales = scales.repeat_interleave(BLOCK, dim=1)[:, :num_rows]
    return scales.repeat_interleave(BLOCK, dim=2)[:, :, :num_columns]


def unpacked_e2m1(codes: torch.Tensor) -> torch.Tensor:
    """Return the fp32 values (..., 2B) of bytes (..., B) with two E2M1 codes each, the low nibble first."""
    nibbles = torch.stack((codes & 0xF, codes >> 4), -1).flatten(-2)
    size, power = (nibbles & 7).to(torch.float32), ((nibbles >> 1) & 3).to(torch.int32)
    # not a table: on a device it would have to be copied there. Codes below 2 are subnormal
    normal = torch.ldexp((2 + (nibbles & 1)).to(torch.float32), power - 2)
    values = torch.where(size < 2, size * 0.5, normal)
    return torch.where(nibbles < 8, values, -values)


def _chosen(packed: Packed, experts: slice | torch.Tensor) -> Packed:
    return Packed(
        packed.codes[experts],
        None if packed.scales is None else packed.scales[experts],
        None if packed.global_scale is None else packed.global_scale[experts],
    )
