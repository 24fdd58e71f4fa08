"""What `quantization_config` declares: the schemes that the weights of a checkpoint may be stored in.

Three dialects: compressed-tensors, Hugging Face `fp8` (DeepSeek's), ModelOpt. What is not implemented is refused.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.config import read_json
from converters.errors import ConfigError
from converters.formats.weights import WHOLE, Coding, Form, PartRule, Scheme, Use

QUANTIZATION_KEY = "quantization_config"
MODELOPT_FILE = "hf_quant_config.json"
_SUBJECT = f"config.json: {QUANTIZATION_KEY}"
_F8 = ("F8_E4M3",)
_F32 = ("F32",)
_CHANNEL = (1, WHOLE)
_TENSOR = (WHOLE, WHOLE)
_NVFP4_GROUP = 16
_MODELOPT_BLOCK = (128, 128)
# orders that leave the columns where they are; `group` and `dynamic` ones permute them
_PLAIN_ORDERS = (None, False, "static", "weight")


def read_quantization(raw_config: Mapping[str, Any], folder: Path) -> dict[str, Any] | None:
    """Return quantization_config, or what a ModelOpt export keeps in a file of its own; None if there is neither.

    Raises:
        ConfigError: not a JSON object.
    """
    block = raw_config.get(QUANTIZATION_KEY)
    if block is None and (folder / MODELOPT_FILE).exists():
        block = read_json(folder / MODELOPT_FILE).get("quantization", {})
        block = {**block, "quant_method": "modelopt"} if isinstance(block, dict) else block
    if block is not None and not isinstance(block, dict):
        raise ConfigError(_SUBJECT, expected="an object", found=repr(block)[:80])
    return block


def declared_schemes(block: Mapping[str, Any] | None) -> tuple[Scheme, ...]:
    """Return the schemes that a quantization_config allows; none for an unquantized checkpoint.

    Raises:
        ConfigError: a method or a scheme that is not implemented.
    """
    if block is None:
        return ()
    method = block.get("quant_method")
    match method:
        case "compressed-tensors":
            groups = block.get("config_groups")
            if not isinstance(groups, Mapping) or not groups:
                raise ConfigError(f"{_SUBJECT}.config_groups", expected="at least one group", found=repr(groups)[:80])
            return tuple(scheme for name, group in groups.items() for scheme in _group_schemes(name, group))
        case "fp8":
            return (_fp8_inverse(block),)
        case "modelopt" | "modelopt_fp4":
            return _modelopt(block)
    raise ConfigError(f"{_SUBJECT}.quant_method", expected="compressed-tensors, fp8 or modelopt", found=repr(method))


def _group_schemes(name: str, group: Any) -> list[Scheme]:
    """Return what one group of compressed-tensors allows."""
    args = group.get("weights") if isinstance(group, Mapping) else None
    schemes = _compressed_schemes(args) if isinstance(args, Mapping) else []
    if not schemes:
        raise ConfigError(
            f"{_SUBJECT}.config_groups.{name}.weights",
            expected="static symmetric weights: 8-bit float or integer, 4-bit integer, or NVFP4",
            found=repr(args)[:200],
            next_step="Other schemes are not implemented.",
        )
    return schemes


def _compressed_schemes(args: Mapping[str, Any]) -> list[Scheme]:
    kind, strategy = (str(args.get("type", "int")), args.get("num_bits")), args.get("strategy")
    static = not args.get("dynamic", False) and args.get("actorder") in _PLAIN_ORDERS
    if not (static and args.get("symmetric", True) and args.get("scale_dtype") != "torch.uint8"):
        return []
    if kind == ("float", 4) and args.get("group_size") == _NVFP4_GROUP:
        return [_nvfp4_divisor()]
    scale = _scale_rule(str(strategy), args)
    if scale is None:
        return []
    label = {"float": "fp", "int": "int"}.get(kind[0])
    name = f"{label}{kind[1]} per {strategy}"
    inputs = _scalar("input_scale", Use.ACTIVATION, FLOAT_DTYPES, is_optional=True)
    if kind == ("float", 8):
        return [Scheme(name, Coding.SCALED, (PartRule("", Use.CODES, _F8, (1, 1)), scale, inputs))]
    if kind not in (("int", 8), ("int", 4)):
        return []
    codes = PartRule("", Use.CODES, ("I8",), (1, 1))
    words = PartRule("weight_packed", Use.CODES, ("I32",), (1, 32 // kind[1]))
    shape = PartRule("weight_shape", Use.SHAPE, ("I64", "I32"))
    return [
        Scheme(name, Coding.SCALED, (codes, scale, inputs)),
        Scheme(f"{name}, packed", Coding.PACKED_INT, (words, scale, shape, inputs), kind[1]),
    ]


def _scale_rule(strategy: str, args: Mapping[str, Any]) -> PartRule | None:
    """Return the rule of compressed-tensors' `weight_scale`, or None if the strategy is not implemented."""
    if strategy == "tensor":
        return _scalar("weight_scale", Use.SCALE, FLOAT_DTYPES)
    block = args.get("block_structure")
    grain = {
        "channel": _CHANNEL,
        "group": (1, args.get("group_size")),
        "block": tuple(block) if isinstance(block, list) else (),
    }.get(strategy)
    if grain is None or len(grain) != 2 or any(type(size) is not int for size in grain):
        return None
    if strategy != "channel" and not all(size > 0 for size in grain):
        return None
    return PartRule("weight_scale", Use.SCALE, FLOAT_DTYPES, grain)


def _scalar(suffix: str, use: Use, dtypes: tuple[str, ...], *, is_optional: bool = False) -> PartRule:
    return PartRule(suffix, use, dtypes, _TENSOR, (Form.SCALAR, Form.SINGLE), is_optional)


def _nvfp4_divisor() -> Scheme:
    codes = PartRule("weight_packed", Use.CODES, ("U8",), (1, 2))
    local = PartRule("weight_scale", Use.SCALE, _F8, (1, _NVFP4_GROUP))
    divisor = _scalar("weight_global_scale", Use.SCALE, _F32)
    inputs = _scalar("input_global_scale", Use.ACTIVATION, _F32, is_optional=True)
    return Scheme("nvfp4", Coding.NVFP4_DIVISOR, (codes, local, divisor, inputs), 4)


def _fp8_inverse(block: Mapping[str, Any]) -> Scheme:
    size = block.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or any(type(side) is not int or side < 1 for side in size):
        raise ConfigError(f"{_SUBJECT}.weight_block_size", expected="two sizes such as [128, 128]", found=repr(size))
    codes = PartRule("", Use.CODES, _F8, (1, 1))
    # DeepSeek's name; despite it, the value multiplies
    scale = PartRule("weight_scale_inv", Use.SCALE, FLOAT_DTYPES, (size[0], size[1]))
    inputs = _scalar("activation_scale", Use.ACTIVATION, FLOAT_DTYPES, is_optional=True)
    return Scheme("fp8 per block", Coding.SCALED, (codes, scale, inputs))


def _modelopt(block: Mapping[str, Any]) -> tuple[Scheme, ...]:
    algorithm = block.get("quant_algo")
    codes = PartRule("", Use.CODES, _F8, (1, 1))
    inputs = _scalar("input_scale", Use.ACTIVATION, _F32, is_optional=True)
    per_row = PartRule("weight_scale", Use.SCALE, _F32, _CHANNEL, (Form.VECTOR,))
    nibbles = PartRule("", Use.CODES, ("U8",), (1, 2))
    local = PartRule("weight_scale", Use.SCALE, _F8, (1, _NVFP4_GROUP))
    factor = _scalar("weight_scale_2", Use.SCALE, _F32)
    tensor_scale = _scalar("weight_scale", Use.SCALE, _F32)
    per_block = PartRule("weight_scale", Use.SCALE, _F32, _MODELOPT_BLOCK, (Form.BLOCKS, Form.MATRIX))
    fp8_block = Scheme("fp8 per block", Coding.SCALED, (codes, per_block))
    fp8 = Scheme("fp8 per tensor", Coding.SCALED, (codes, tensor_scale, inputs))
    fp8_channel = Scheme("fp8 per channel", Coding.SCALED, (codes, per_row, inputs))
    nvfp4 = Scheme("nvfp4", Coding.NVFP4_FACTOR, (nibbles, local, factor, inputs), 4)
    known = {
        "FP8": (fp8,),
        "FP8_PER_CHANNEL_PER_TOKEN": (fp8_channel,),
        "FP8_PB_WO": (fp8_block,),
        "NVFP4": (nvfp4,),
        "W4A16_NVFP4": (nvfp4,),
        "MIXED_PRECISION": (fp8, fp8_channel, fp8_block, nvfp4),
    }
    if not isinstance(algorithm, str) or algorithm not in known:
        raise ConfigError(f"{_SUBJECT}.quant_algo", expected=f"one of {', '.join(known)}", found=repr(algorithm))
    return known[algorithm]
