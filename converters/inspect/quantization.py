"""Which quantized format a checkpoint has, by what lies on disk first and by what its config says second."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.errors import ConfigError
from converters.formats.compressed_tensors import QUANT_METHOD
from converters.formats.declared import MODELOPT_FILE, QUANTIZATION_KEY, declared_schemes, read_quantization
from converters.formats.weights import Scheme
from converters.inspect.logical import CODES_SUFFIX, LogicalTensor
from converters.schema import Tensor
from converters.stored_form import ModuleSet, QuantizationRule

PLAIN = "none"
_SCALE, _INVERSE, _SECOND = "weight_scale", "weight_scale_inv", "weight_scale_2"
_STATIC = frozenset({"input_scale", "input_global_scale", "activation_scale"})
_BITS_PER_WORD = 32
Parts = Mapping[str, LogicalTensor]


@dataclass(frozen=True, slots=True)
class StoredScheme:
    """How one weight is stored. `group_size`: columns that share a scale, or the block's side; 1 = no such group."""

    scheme: str
    dialect: str
    storage: str
    group_size: int = 1
    has_scale: bool = True


@dataclass(frozen=True, slots=True)
class Quantization:
    """What is quantized and how.

    Attributes:
        scheme: in this tool's words (`fp8`, `fp8-block`, `nvfp4` ...), `none`, or `mixed`.
        dialect: whose tensor names these are.
        group_size: the largest unit that tensor parallelism must not cut.
        modules: quantized modules.
        plain_modules: matrices left unquantized, by role.
        ignore: entries of the ignore list.
        evidence: what the above is concluded from.
    """

    scheme: str
    dialect: str
    group_size: int
    modules: int
    plain_modules: dict[str, int]
    ignore: tuple[str, ...]
    kv_cache: str | None
    evidence: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Declared:
    """What the config says about quantization.

    Attributes:
        block: quantization_config, or what ModelOpt keeps in its own file; None if nothing is announced.
        schemes: what the block allows; empty if it is not implemented.
        rule: which modules are quantized, where the block is of the dialect that says so by names.
        problem: why the block cannot be used.
    """

    block: Mapping[str, Any] | None = None
    schemes: tuple[Scheme, ...] = ()
    rule: QuantizationRule | None = None
    problem: ConfigError | None = None


def read_declaration(raw_config: Mapping[str, Any], folder: Path) -> Declared:
    """Return what config.json and hf_quant_config.json announce."""
    try:
        block = read_quantization(raw_config, folder)
    except ConfigError as error:
        return Declared(block={}, problem=error)
    try:
        return Declared(block, declared_schemes(block), _rule(block))
    except ConfigError as error:
        return Declared(block, problem=error)


def _rule(block: Mapping[str, Any] | None) -> QuantizationRule | None:
    if block is None or block.get("quant_method") != QUANT_METHOD:
        return None
    targets = [ModuleSet.parse(group.get("targets"), "targets") for group in block["config_groups"].values()]
    union = ModuleSet(
        frozenset().union(*(target.names for target in targets)),
        tuple(pattern for target in targets for pattern in target.patterns),
    )
    return QuantizationRule(union, ModuleSet.parse(block.get("ignore", []), "ignore"))


def modules_of(tensors: Mapping[str, LogicalTensor]) -> dict[str, dict[str, LogicalTensor]]:
    """Return the stored parts of every weight, by the weight's name and by suffix; the weight's own is empty."""
    modules: dict[str, dict[str, LogicalTensor]] = {}
    for tensor in tensors.values():
        if tensor.parsed is not None:
            modules.setdefault(tensor.weight_name, {})[tensor.suffix] = tensor
    return modules


def stored_scheme(parts: Parts, shape: tuple[int, ...]) -> StoredScheme | None:
    """Return how a weight of this shape is stored; None if it is plain.

    Args:
        parts: its stored tensors by suffix, see `modules_of`.
        shape: its official shape.
    """
    codes = parts.get(CODES_SUFFIX) or parts.get("")
    scale = parts.get(_INVERSE) or parts.get(_SCALE)
    if codes is None or codes.dtype in FLOAT_DTYPES or len(shape) != 2:
        return None
    beside = f"scale {scale.dtype} {_spell(scale.shape, shape)}" if scale else "no scale"
    storage = f"{codes.dtype} {_spell(codes.shape, shape)}, {beside}"
    group = _group_size(scale, shape)
    return StoredScheme(_scheme(parts, codes, scale, shape, group), _dialect(parts), storage, group, scale is not None)


def _scheme(
    parts: Parts, codes: LogicalTensor, scale: LogicalTensor | None, shape: tuple[int, ...], group_size: int
) -> str:
    has_exponents = scale is not None and scale.dtype == "U8"
    match codes.dtype:
        case "F8_E4M3":
            return "mxfp8" if has_exponents else _fp8(parts, scale, group_size)
        case "I8":
            return "int8"
        case "I32":
            return f"int{_BITS_PER_WORD * codes.shape[-1] // max(1, shape[1])}-weight-only"
        case "U8" if has_exponents:
            return "mxfp4"
        case "U8":
            return "nvfp4" if _STATIC & parts.keys() else "nvfp4-weight-only"
    return "unknown"


def _fp8(parts: Parts, scale: LogicalTensor | None, group_size: int) -> str:
    if _INVERSE in parts or group_size > 1:
        return "fp8-block"
    if scale is not None and prod(scale.shape) == 1:
        return "fp8-static" if _STATIC & parts.keys() else "fp8-tensor"
    return "fp8"


def _dialect(parts: Parts) -> str:
    if _INVERSE in parts:
        return "deepseek"
    scale = parts.get(_SCALE)
    # ModelOpt's fp32 scales are scalars, vectors or 4-D; compressed-tensors' have one or two dims
    own_shape = scale is not None and "" in parts and scale.dtype == "F32" and len(scale.shape) in (0, 4)
    return "modelopt" if own_shape or _SECOND in parts else QUANT_METHOD


def _group_size(scale: LogicalTensor | None, shape: tuple[int, ...]) -> int:
    """Return how many columns share a scale, rounded up to a power of two for a ragged last block; 1 per channel."""
    if scale is None or len(scale.shape) < 2 or prod(scale.shape[1:]) <= 1:
        return 1
    count = prod(scale.shape[1:])
    columns = -(-shape[1] // count)
    return columns if columns * count == shape[1] else 1 << (columns - 1).bit_length()


def _spell(stored: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """Return a stored shape in terms of the weight's: [N, K], [N, 1], [N, K/2]."""
    words = []
    for index, size in enumerate(stored):
        letter, whole = ("N", shape[0]) if index == 0 else ("K", shape[1])
        grain = -(-whole // max(1, size))
        if size == whole:
            words.append(letter)
        elif size > 1 and -(-whole // grain) == size:
            words.append(f"{letter}/{grain}")
        else:
            words.append(str(size))
    return f"[{', '.join(words)}]"


def describe(
    modules: Mapping[str, Parts], tensors: Mapping[str, Tensor], declared: Declared, raw_config: Mapping[str, Any]
) -> Quantization:
    """Return which format the stored modules are in, with the evidence.

    Args:
        modules: see `modules_of`.
        tensors: the official tensors by name.
        declared: what the config says.
        raw_config: to tell where it says so.
    """
    schemes: Counter[StoredScheme] = Counter()
    plain: Counter[str] = Counter()
    for name, tensor in tensors.items():
        if name not in modules or len(tensor.shape) != 2:
            continue
        found = stored_scheme(modules[name], tensor.shape)
        if found is None:
            plain[tensor.spec.role.value] += 1
        else:
            schemes[found] += 1
    block = declared.block or {}
    names = {found.scheme for found in schemes}
    place = QUANTIZATION_KEY if raw_config.get(QUANTIZATION_KEY) is not None else MODELOPT_FILE
    return Quantization(
        scheme="mixed" if len(names) > 1 else next(iter(names), PLAIN),
        dialect=", ".join(sorted({found.dialect for found in schemes})),
        group_size=max((found.group_size for found in schemes), default=1),
        modules=schemes.total(),
        plain_modules=dict(plain) if schemes else {},
        ignore=_ignore_entries(block),
        kv_cache=_kv_cache(block),
        evidence=(*_stored_evidence(schemes), *_config_evidence(block, place)),
    )


def _stored_evidence(schemes: Counter[StoredScheme]) -> Iterator[str]:
    for found, count in sorted(schemes.items(), key=lambda item: (-item[1], item[0].scheme, item[0].storage)):
        yield f"{count} weights stored as {found.scheme}: {found.storage}"


def _config_evidence(block: Mapping[str, Any], place: str) -> Iterator[str]:
    for key in ("quant_method", "quant_algo", "format", "weight_block_size", "activation_scheme"):
        if block.get(key) is not None:
            yield f"{place} {key} {str(block[key])[:100]}"


def _ignore_entries(block: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the list of what is not quantized, under any of its three names."""
    lists = (block.get(key) for key in ("ignore", "modules_to_not_convert", "exclude_modules"))
    entries = next((found for found in lists if isinstance(found, list)), [])
    return tuple(entry for entry in entries if isinstance(entry, str))


def _kv_cache(block: Mapping[str, Any]) -> str | None:
    scheme = block.get("kv_cache_scheme")
    if isinstance(scheme, Mapping):
        return f"{scheme.get('type')}{scheme.get('num_bits')}"
    algorithm = block.get("kv_cache_quant_algo")
    return str(algorithm).lower() if algorithm else None
