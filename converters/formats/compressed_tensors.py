"""compressed-tensors: names beside a quantized weight, and the quantization_config block.

Source: what compressed-tensors 0.20 and llm-compressor 0.14 write for each scheme; the official FP8 releases of GLM-4.5
to 4.7 have the block of `fp8`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.quant.scheme import BLOCK, NVFP4_GROUP

QUANT_METHOD = "compressed-tensors"
# release of the library whose output this module reproduces
FORMAT_VERSION = "0.20.0"
WEIGHT_SCALE = "weight_scale"
ANY_LINEAR = "Linear"
MIXED = "mixed-precision"
_FORMATS = {
    "fp8": "float-quantized",
    "fp8-block": "float-quantized",
    "fp8-static": "float-quantized",
    "int8": "int-quantized",
    "int8-weight-only": "pack-quantized",
    "nvfp4": "nvfp4-pack-quantized",
    "nvfp4-weight-only": "nvfp4-pack-quantized",
}


@dataclass(frozen=True, slots=True)
class Group:
    """Modules with one scheme.

    Attributes:
        scheme: its name on the command line.
        group_size: columns that share a scale, where the scheme leaves it open; 0: the whole row.
        targets: the class `Linear`, or `re:` patterns.
    """

    scheme: str
    group_size: int = 0
    targets: tuple[str, ...] = (ANY_LINEAR,)

    @property
    def format(self) -> str:
        """The library's name of the compressor."""
        return _FORMATS[self.scheme]


def quantization_config(
    groups: Sequence[Group], ignore: Iterable[str], *, has_kv_scales: bool = False
) -> dict[str, Any]:
    """Return quantization_config.

    Args:
        groups: of modules, each with its scheme; where several have different compressors, engines read each group's
            own `format`.
        ignore: names and patterns of the linear modules that stay unquantized.
        has_kv_scales: scales of an FP8 KV cache are among the tensors.
    """
    formats = dict.fromkeys(group.format for group in groups)
    return {
        "config_groups": {f"group_{number}": _group(group) for number, group in enumerate(groups)},
        "format": next(iter(formats)) if len(formats) == 1 else MIXED,
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": _args(8, "float", strategy="tensor", dynamic=False) if has_kv_scales else None,
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
        "version": FORMAT_VERSION,
    }


def _group(group: Group) -> dict[str, Any]:
    weights, inputs = _arguments(group)
    return {
        "format": group.format,
        "targets": list(group.targets),
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
    }


def _arguments(group: Group) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Return the arguments of weights and of inputs; None: inputs are not quantized."""
    match group.scheme:
        case "fp8":
            return _args(8, "float", strategy="channel"), _args(8, "float", strategy="token", dynamic=True)
        case "fp8-block":
            weights = _args(8, "float", strategy="block", block_structure=[BLOCK, BLOCK])
            return weights, _args(8, "float", BLOCK, strategy="group", dynamic=True)
        case "fp8-static":
            return _args(8, "float", strategy="tensor"), _args(8, "float", strategy="tensor")
        case "int8":
            return _args(8, "int", strategy="channel"), _args(8, "int", strategy="token", dynamic=True)
        case "int8-weight-only" if group.group_size:
            return _args(8, "int", group.group_size, strategy="group"), None
        case "int8-weight-only":
            return _args(8, "int", strategy="channel"), None
    nvfp4: Mapping[str, Any] = {"strategy": "tensor_group", "scale_dtype": "torch.float8_e4m3fn"}
    weights = _args(4, "float", NVFP4_GROUP, **nvfp4)
    if group.scheme == "nvfp4-weight-only":
        return weights, None
    # local: scales of 16 columns are found at run time, below the calibrated scale of the tensor
    return weights, _args(4, "float", NVFP4_GROUP, **nvfp4, dynamic="local", observer="static_minmax")


def _args(
    num_bits: int, kind: str, group_size: int | None = None, *, strategy: str, dynamic: bool | str = False, **more: Any
) -> dict[str, Any]:
    found = {"num_bits": num_bits, "type": kind, "symmetric": True, "group_size": group_size, "strategy": strategy}
    return {**found, **more, "dynamic": dynamic}
