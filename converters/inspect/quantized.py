"""What can be wrong with a quantized checkpoint beyond its shapes.

Weights left over beside their codes, scales that no engine looks for, groups that are half quantized, ignore lists that
an engine reads otherwise than the files are written, and global scales that were never computed.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.inspect import catalog
from converters.inspect.catalog import CheckFinding
from converters.inspect.engine_readings import Engine, EngineModule, IgnoreList, Reading, engine_modules
from converters.inspect.logical import CODES_SUFFIX, LogicalTensor
from converters.inspect.quantization import Declared, stored_scheme
from converters.layout import Layout, StoredLayout
from converters.schema import CACHE_SCALES, ModelSchema

if TYPE_CHECKING:
    from converters.inspect.content import TensorContent

Modules = Mapping[str, Mapping[str, LogicalTensor]]
_NVFP4_GLOBALS = frozenset({"weight_global_scale", "weight_scale_2"})
_INPUT_GLOBALS = frozenset({"input_global_scale"})
_ONE = 0x3F800000
# what a comparison of two checkpoints adds to its own findings
FORMAT_CHECKS = frozenset({catalog.WEIGHT_TWICE, catalog.MTP_CACHE_SCALE, catalog.HALF_QUANTIZED, catalog.ENGINE_READS})


def quantized_findings(layout: StoredLayout, modules: Modules, declared: Declared) -> Iterator[CheckFinding]:
    """Yield what headers and config show.

    Args:
        layout: how the tensors are stored.
        modules: stored parts of every weight.
        declared: what the config says.
    """
    schema = layout.schema
    yield from _leftovers(modules)
    yield from _mtp_cache_scales(schema, modules)
    # engines load no other layout
    if declared.block is not None and declared.schemes and layout.layout is Layout.SPLIT:
        yield from _readings(schema, modules, declared)


def _leftovers(modules: Modules) -> Iterator[CheckFinding]:
    """Yield weights that are stored twice, plain and as codes."""
    for name, parts in modules.items():
        own = parts.get("")
        if own is not None and own.dtype in FLOAT_DTYPES and CODES_SUFFIX in parts:
            yield CheckFinding(catalog.WEIGHT_TWICE, f"tensor {name}", "codes alone", f"{own.dtype} beside its codes")


def _mtp_cache_scales(schema: ModelSchema, modules: Modules) -> Iterator[CheckFinding]:
    for name, parts in modules.items():
        tensor = schema.tensors.get(name)
        if tensor is None or schema.mtp_layer is None or tensor.layer != schema.mtp_layer:
            continue
        for suffix in sorted(parts.keys() & CACHE_SCALES):
            subject = f"tensor {parts[suffix].name}"
            yield CheckFinding(catalog.MTP_CACHE_SCALE, subject, "no scale of the KV cache", "one")


def _readings(schema: ModelSchema, modules: Modules, declared: Declared) -> Iterator[CheckFinding]:
    """Compare what each engine makes of the ignore list with what is on disk, one finding an engine."""
    ignore = IgnoreList.of(declared.block or {})
    found: dict[tuple[Engine, Reading, Reading], list[str]] = {}
    for module in engine_modules(schema):
        stored = _stored(module, modules)
        # a weight that contradicts its own config is reported as such
        if stored is None or _is_contradicted(module, modules, declared):
            continue
        if stored is Reading.REFUSED:
            expected = "all of it quantized, or all of it plain"
            yield CheckFinding(catalog.HALF_QUANTIZED, f"module {module.name}", expected, "some of each")
            continue
        for engine in Engine:
            reading = ignore.reading(engine, module, schema)
            if reading is not stored:
                found.setdefault((engine, stored, reading), []).append(module.name)
    for (engine, stored, reading), names in found.items():
        more = f", and {len(names) - 1} more" if len(names) > 1 else ""
        reads = "an error" if reading is Reading.REFUSED else f"built {reading}"
        yield CheckFinding(
            catalog.ENGINE_READS, f"ignore list as {engine} reads it", f"{names[0]} {stored}, as stored{more}", reads
        )


def _is_contradicted(module: EngineModule, modules: Modules, declared: Declared) -> bool:
    rule = declared.rule
    return rule is not None and any(
        rule.covers(tensor) is (stored_scheme(modules[tensor.name], tensor.shape) is None) for tensor in module.tensors
    )


def _stored(module: EngineModule, modules: Modules) -> Reading | None:
    """Return how a module is stored, REFUSED if some of it is quantized and some not; None if a weight is missing."""
    kinds = set()
    for tensor in module.tensors:
        parts = modules.get(tensor.name)
        if parts is None or not parts.keys() & {"", CODES_SUFFIX}:
            return None
        kinds.add(Reading.QUANTIZED if stored_scheme(parts, tensor.shape) else Reading.PLAIN)
    return kinds.pop() if len(kinds) == 1 else Reading.REFUSED


def check_globals(contents: "Iterable[TensorContent]") -> Iterator[CheckFinding]:
    """Yield NVFP4's global scales that were never computed: exactly 1 beside codes that are not all zero."""
    by_weight: dict[str, dict[str, TensorContent]] = {}
    for content in contents:
        parsed = content.tensor.parsed
        if parsed is not None and len(parsed.spec.shape) > 1 and not content.error:
            by_weight.setdefault(content.tensor.weight_name, {})[content.tensor.suffix] = content
    for parts in by_weight.values():
        codes = parts.get(CODES_SUFFIX) or parts.get("")
        for suffix in sorted(parts.keys() & (_NVFP4_GLOBALS | _INPUT_GLOBALS)):
            scale = parts[suffix]
            is_one = scale.tensor.dtype == "F32" and scale.values.first_bits == _ONE
            # it would be right for a weight as large as 2688, which only a comparison with the source can tell
            if is_one and (suffix in _INPUT_GLOBALS or (codes is not None and not codes.values.is_zero)):
                subject = f"tensor {scale.tensor.name}"
                yield CheckFinding(catalog.GLOBAL_IS_ONE, subject, "a scale that was computed", "exactly 1")
