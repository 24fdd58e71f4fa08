"""Plan a quantization: which weights, to what, and the metadata that engines read."""

from dataclasses import asdict, dataclass

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.checkpoint.plan import DEFAULT_MAX_SHARD_BYTES, OutputPlan, OutputTensor, SourceRows, Unit, pack_shards
from converters.conversion import Conversion, passthrough_files
from converters.errors import UsageError
from converters.formats.compressed_tensors import WEIGHT_SCALE, fp8_channel_config
from converters.formats.declared import QUANTIZATION_KEY
from converters.layout import Layout
from converters.quant.policy import ignored_modules, is_quantized
from converters.quant.scheme import SCHEMES, Arithmetic
from converters.schema import Tensor
from converters.source import Source
from converters.transforms.rows import QuantizeFp8Channel
from converters.units import copy_unit


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What to quantize to. `fp8` is E4M3 per output channel with activations quantized per token at run time."""

    scheme: str
    arithmetic: Arithmetic = Arithmetic.FLOAT32
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES


def plan_quantize(source: Source, options: QuantizeOptions) -> Conversion:
    """Return the conversion; no tensor data is read.

    Raises:
        UsageError: unknown scheme, or a source that is quantized already.
    """
    if options.scheme not in SCHEMES:
        raise UsageError("--scheme", expected=f"one of {', '.join(SCHEMES)}", found=options.scheme)
    if source.is_quantized:
        raise UsageError(
            str(source.folder),
            expected="an unquantized source",
            found="quantization_config in it",
            next_step="Quantizing twice adds up the errors; start from the original checkpoint.",
        )
    if source.layout is not Layout.SPLIT:
        raise UsageError(
            str(source.folder),
            expected="a source in the split layout",
            found=source.layout,
            next_step=f"Run 'glm4moe convert {source.folder} DST --layout split' first.",
        )
    units = [_unit(source, tensor, options) for tensor in source.schema.tensors.values()]
    plan = OutputPlan(pack_shards(units, options.max_shard_bytes))
    plan.check_complete(map(source.reader.entry, source.reader.names))
    config = {**source.raw_config, QUANTIZATION_KEY: fp8_channel_config(ignored_modules(source.schema))}
    return Conversion(source, plan, config, passthrough_files(source.folder), "quantize", asdict(options))


def _unit(source: Source, tensor: Tensor, options: QuantizeOptions) -> Unit:
    if not is_quantized(tensor):
        return copy_unit(source, tensor.name)
    entry = source.reader.entry(tensor.name)
    assert entry.dtype in FLOAT_DTYPES, entry
    codes = OutputTensor(tensor.name, "F8_E4M3", entry.shape)
    is_narrow = entry.dtype == "F16" and options.arithmetic is Arithmetic.FLOAT32
    scale_dtype = "F32" if is_narrow else entry.dtype
    scale = OutputTensor(f"{tensor.module}.{WEIGHT_SCALE}", scale_dtype, (entry.shape[0], 1))
    return Unit((codes, scale), (SourceRows(tensor.name, 0, codes.rows),), QuantizeFp8Channel(options.arithmetic))
