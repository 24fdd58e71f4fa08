"""The experts of one layer in two tensors, in the layout that grouped kernels read.

Gate and up rows alternate, so that one accumulator holds both halves of a SwiGLU: row 2i is row i of the gate, row
2i + 1 row i of the up projection. A fused shared expert is the last one.

Shapes: E experts, the shared one included, H hidden, I intermediate, N rows and K columns of one matrix; blocks are
128 x 128, groups 16 columns.
"""

from dataclasses import dataclass
from enum import StrEnum

import torch

from runtime.moe.workspace import Workspace

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

    def up_values(
        self, dtype: torch.dtype, experts: slice | torch.Tensor = slice(None), workspace: Workspace | None = None
    ) -> torch.Tensor:
        """Return some experts' interleaved gate and up weights (e, 2I, H), multiplied out in fp32 and rounded once.

        Args:
            dtype: of the result.
            experts: a slice or int64 indices (e,) on the device.
            workspace: holds the result until the next one is made, and all that comes before it; None: new tensors.
        """
        buffers = workspace or Workspace(self.device)
        chosen = _chosen(self.up, experts, buffers)
        return dequantized(self.scheme, chosen, dtype, is_interleaved=True, workspace=buffers)

    def down_values(
        self, dtype: torch.dtype, experts: slice | torch.Tensor = slice(None), workspace: Workspace | None = None
    ) -> torch.Tensor:
        """Return some experts' down weights (e, H, I), as `up_values` does."""
        buffers = workspace or Workspace(self.device)
        chosen = _chosen(self.down, experts, buffers)
        return dequantized(self.scheme, chosen, dtype, is_interleaved=False, workspace=buffers)


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


def dequantized(
    scheme: ExpertScheme,
    packed: Packed,
    dtype: torch.dtype,
    *,
    is_interleaved: bool,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Return weights (E, N, K), multiplied out in fp32 and rounded to `dtype` once; see `ExpertWeights.up_values`."""
    codes, scales = packed.codes, packed.scales
    workspace = workspace or Workspace(codes.device)
    num_columns = codes.shape[2] * (2 if scheme is ExpertScheme.NVFP4 else 1)
    shape = (*codes.shape[:2], num_columns)
    out = workspace.take("weights", shape, dtype)
    if scheme.is_plain:
        return out.copy_(codes)
    assert scales is not None, scheme
    values = out if dtype is torch.float32 else workspace.take("wide_weights", shape, torch.float32)
    match scheme:
        case ExpertScheme.NVFP4:
            assert packed.global_scale is not None, scheme
            factors = workspace.take("weight_factors", tuple(scales.shape), torch.float32).copy_(scales)
            factors.mul_(packed.global_scale[:, None, None])
            unpacked_e2m1(codes, values, workspace).unflatten(-1, (-1, GROUP)).mul_(factors[..., None])
        case ExpertScheme.FP8_BLOCK:
            rows = _block_rows(scales, shape[1], workspace, is_interleaved=is_interleaved)
            whole = num_columns // BLOCK
            blocks = values.copy_(codes)[..., : whole * BLOCK].unflatten(-1, (whole, BLOCK))
            blocks.mul_(rows[..., :whole, None])
            values[..., whole * BLOCK :].mul_(rows[..., -1:])
        case _:
            values.copy_(codes).mul_(scales[..., None])
    return values if values is out else out.copy_(values)


def block_scales(scales: torch.Tensor, shape: tuple[int, ...], is_interleaved: bool) -> torch.Tensor:
    """Return the scales of blocks as one for each weight: (E, ...) fp32 to (E, N, K), `shape` being (N, K)."""
    num_rows, num_columns = shape
    rows = _block_rows(scales, num_rows, Workspace(scales.device), is_interleaved=is_interleaved)
    return rows.repeat_interleave(BLOCK, dim=2)[:, :, :num_columns]


def _block_rows(scales: torch.Tensor, num_rows: int, workspace: Workspace, *, is_interleaved: bool) -> torch.Tensor:
    """Return the scales of blocks for each row of weights: fp32 (E, ...) to (E, N, ceil(K / 128))."""
    rows_N = torch.arange(num_rows, out=workspace.take("scale_rows", (num_rows,), torch.int64))
    if is_interleaved:
        # kinds alternate, and all blocks of one come before those of the other
        kinds_N = torch.remainder(rows_N, 2, out=workspace.take("scale_kinds", (num_rows,), torch.int64))
        rows_N.floor_divide_(2 * BLOCK).add_(kinds_N.mul_(scales.shape[2]))
        scales = scales.flatten(1, 2)
    else:
        rows_N.floor_divide_(BLOCK)
    out = workspace.take("row_scales", (len(scales), num_rows, scales.shape[2]), torch.float32)
    return torch.index_select(scales, 1, rows_N, out=out)


def unpacked_e2m1(
    codes: torch.Tensor, out: torch.Tensor | None = None, workspace: Workspace | None = None
) -> torch.Tensor:
    """Return the fp32 values (..., 2B) of bytes (..., B) with two E2M1 codes each, the low nibble first.

    Args:
        codes: uint8.
        out: contiguous, takes the result; None: a new tensor.
        workspace: takes what comes before it.
    """
    workspace, shape = workspace or Workspace(codes.device), (*codes.shape[:-1], 2 * codes.shape[-1])
    out = torch.empty(shape, device=codes.device) if out is None else out
    nibbles = workspace.take("nibbles", shape, torch.uint8)
    pairs = nibbles.unflatten(-1, (-1, 2))
    torch.bitwise_and(codes, 0xF, out=pairs[..., 0])
    torch.bitwise_right_shift(codes, 4, out=pairs[..., 1])
    is_negative = torch.ge(nibbles, 8, out=workspace.take("nibble_signs", shape, torch.bool))
    # halves of 0, 1, 2, 3, 4, 6, 8, 12: steps double at 4 and at 6. Not a table: it would be copied to a device
    out.copy_(nibbles.bitwise_and_(7))
    steps = workspace.take("nibble_steps", shape, torch.float32).copy_(out)
    out.add_(steps.sub_(4).clamp_(min=0)).add_(steps.sub_(2).clamp_(min=0), alpha=2).mul_(0.5)
    return torch.where(is_negative, torch.neg(out, out=steps), out, out=out)


def _chosen(packed: Packed, experts: slice | torch.Tensor, workspace: Workspace) -> Packed:
    scales, global_scale = packed.scales, packed.global_scale
    return Packed(
        _picked(packed.codes, experts, "chosen_codes", workspace),
        None if scales is None else _picked(scales, experts, "chosen_scales", workspace),
        None if global_scale is None else _picked(global_scale, experts, "chosen_globals", workspace),
    )


def _picked(part: torch.Tensor, experts: slice | torch.Tensor, name: str, workspace: Workspace) -> torch.Tensor:
    """Return the entries of some experts: a view, or copied; values of 8 bits as bytes, which torch copies anywhere."""
    if isinstance(experts, slice):
        return part[experts]
    stored = part.view(torch.uint8) if part.itemsize == 1 else part
    out = workspace.take(name, (len(experts), *part.shape[1:]), stored.dtype)
    return torch.index_select(stored, 0, experts, out=out).view(part.dtype)
