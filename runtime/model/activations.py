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

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return (..., I) in the dtype of `hidden`: the values of the codes that it is rounded to."""
        code = self.scheme.code
        values = hidden.to(torch.float32)
        if self.scheme.group is None:
            return (_rounded(values / self.scale, code) * self.scale).to(hidden.dtype)
        grouped = values.unflatten(-1, (-1, self.scheme.group or values.shape[-1]))
        scale_G1 = grouped.abs().amax(-1, keepdim=True) / _LARGEST[code]
        if self.scheme.is_static:
            scale_G1 = _rounded(self.scale * scale_G1, InputCode.FP8) / self.scale
        # where all is zero, any divisor will do
        codes = _rounded(grouped / torch.where(scale_G1 == 0, 1.0, scale_G1), code)
        return (codes * scale_G1).flatten(-2).to(hidden.dtype)


def _rounded(values: torch.Tensor, code: InputCode) -> torch.Tensor:
    """Return the nearest values that a code has, ties to even, saturating."""
    largest = _LARGEST[code]
    values = values.clamp(-largest, largest)
    match code:
        case InputCode.INT8:
            return values.round()
        case InputCode.FP8:
            return values.to(torch.float8_e4m3fn).to(torch.float32)
    # E2M1 has steps of 0.5 up to 2, of 1 up to 4, of 2 up to 6
    step = torch.where(values.abs() <= 2, 0.5, torch.where(values.abs() <= 4, 1.0, 2.0))
    return (values / step).round() * step


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
