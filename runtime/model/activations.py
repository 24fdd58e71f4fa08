"""Inputs of linear layers as engines quantize them at run time: rounded to codes, and multiplied out again.

What is simulated are the values that a kernel multiplies, not the order in which it adds them up. Scales and codes are
computed in fp32. Shapes: ... any leading dims, I features, G groups of them.
"""

from dataclasses import dataclass

import torch

from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError
from converters.formats.inputs import InputCode, InputScheme, input_scheme
from converters.formats.weights import Coding, Use, WeightFormat
from converters.source import Source
from runtime.moe.workspace import Workspace

_LARGEST = {InputCode.INT8: 127.0, InputCode.FP8: 448.0, InputCode.NVFP4: 6.0}


@dataclass(frozen=True, slots=True)
class InputQuantizer:
    """What happens to the inputs of one linear layer.

    Attributes:
        scheme: how.
        scale: calibrated: what divides inputs, or what multiplies NVFP4's local scales before they are rounded; 1 if
            there is none.
    """

    scheme: InputScheme
    scale: float = 1.0

    def __call__(self, hidden: torch.Tensor, workspace: Workspace | None = None) -> torch.Tensor:
        """Return (..., I) in the dtype of `hidden`: the values of the codes that it is rounded to.

        Args:
            hidden: kept.
            workspace: takes the result, and all that comes before it; None: new tensors.
        """
        buffers = workspace or Workspace(hidden.device)
        code, shape = self.scheme.code, tuple(hidden.shape)
        values = buffers.take("rounding", shape, torch.float32).copy_(hidden)
        out = buffers.take("rounded", shape, hidden.dtype)
        if self.scheme.group is None:
            _round(values.div_(self.scale), code, buffers)
            return out.copy_(values.mul_(self.scale))
        grouped = values.unflatten(-1, (-1, self.scheme.group or values.shape[-1]))
        scale_G1 = buffers.take("rounding_scales", (*grouped.shape[:-1], 1), torch.float32)
        # the largest magnitude, without a tensor of magnitudes
        torch.linalg.vector_norm(grouped, float("inf"), -1, keepdim=True, out=scale_G1)
        scale_G1.div_(_LARGEST[code])
        if self.scheme.is_static:
            _round(scale_G1.mul_(self.scale), InputCode.FP8, buffers)
            scale_G1.div_(self.scale)
        # where all is zero, any divisor will do
        is_zero_G1 = torch.eq(scale_G1, 0, out=buffers.take("rounding_where", tuple(scale_G1.shape), torch.bool))
        divisor_G1 = buffers.take("rounding_divisors", tuple(scale_G1.shape), torch.float32).copy_(scale_G1)
        _round(grouped.div_(divisor_G1.masked_fill_(is_zero_G1, 1.0)), code, buffers)
        grouped.mul_(scale_G1)
        return out.copy_(values)


def _round(values: torch.Tensor, code: InputCode, buffers: Workspace) -> None:
    """Replace values by the nearest that a code has, ties to even, saturating."""
    largest, shape = _LARGEST[code], tuple(values.shape)
    values.clamp_(-largest, largest)
    match code:
        case InputCode.INT8:
            values.round_()
        case InputCode.FP8:
            values.copy_(buffers.take("rounding_codes", shape, torch.float8_e4m3fn).copy_(values))
        case InputCode.NVFP4:
            # E2M1 has steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6
            size = torch.abs(values, out=buffers.take("rounding_sizes", shape, torch.float32))
            step = buffers.take("rounding_steps", shape, torch.float32)
            is_above = buffers.take("rounding_above", shape, torch.bool)
            step.fill_(0.5).masked_fill_(torch.gt(size, 2, out=is_above), 1.0)
            step.masked_fill_(torch.gt(size, 4, out=is_above), 2.0)
            values.div_(step).round_().mul_(step)


def input_quantizers(source: Source) -> dict[str, InputQuantizer]:
    """Return what happens to the inputs of each module, by its official name; modules with none are left out.

    Raises:
        ConfigError: a scheme that is not known.
        InputError: a calibrated scale is missing, or no positive number.
    """
    if source.quantization is None:
        return {}
    found = {}
    for tensor in source.schema.tensors.values():
        (place, *_) = source.stored_layout.places(tensor)
        stored = source.weights[place.stored.name]
        scheme = None if stored.format.is_plain else input_scheme(source.quantization, tensor.module)
        if scheme is not None:
            scale = _scale(source.reader, tensor.module, stored.format) if scheme.is_static else 1.0
            found[tensor.module] = InputQuantizer(scheme, scale)
    return found


def _scale(reader: CheckpointReader, module: str, stored: WeightFormat) -> float:
    names = [f"{module}.{part.suffix}" for part in stored.used(Use.ACTIVATION)]
    if not names or names[0] not in reader.names:
        raise InputError(
            f"module {module}",
            expected="a calibrated scale of its inputs under its official name",
            found="none",
            next_step="Run 'glm4moe convert SRC DST --layout split' first, or take activations as they are.",
        )
    value = float(reader.read(names[0]).flatten()[0])
    if not value > 0:
        raise InputError(f"tensor {names[0]}", expected="a positive number", found=str(value))
    return 1.0 / value if stored.coding is Coding.NVFP4_FACTOR else value
