"""What each scheme writes for a weight in each format: names, dtypes and shapes, and the transform that makes them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from converters.checkpoint.plan import OutputTensor, SourceRows, Unit
from converters.formats.weights import cells
from converters.quant.scheme import BLOCK, NVFP4_GROUP, Arithmetic, Format, Recipe
from converters.schema import Tensor
from converters.transforms.dequantize import Constant
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)

Shape = Callable[[int, int], tuple[int, ...]]
Transform = (
    QuantizeFp8Block | QuantizeFp8Channel | QuantizeFp8Tensor | QuantizeInt8 | QuantizeInt8Packed | QuantizeNvfp4
)
# max|input| that an input scale of 1 stands for, and the largest code
_E4M3_MAX = 448.0
_NVFP4_MAX = 448.0 * 6.0
_CODES_PER_WORD = 4


@dataclass(frozen=True, slots=True)
class Output:
    """A tensor beside or instead of `weight`; `shape` takes rows and columns of the weight.

    Attributes:
        suffix: last part of its name.
        dtype: on disk; None: that of the transform's scales.
        shape: from the weight's rows and columns.
        grain: see `OutputTensor`.
    """

    suffix: str
    dtype: str | None
    shape: Shape
    grain: int = 1


def _same(rows: int, columns: int) -> tuple[int, ...]:
    return rows, columns


def _column(rows: int, _: int) -> tuple[int, ...]:
    return rows, 1


def _vector(rows: int, _: int) -> tuple[int, ...]:
    return (rows,)


def _single(*_: int) -> tuple[int, ...]:
    return (1,)


def _scalar(*_: int) -> tuple[int, ...]:
    return ()


def _blocks(rows: int, columns: int) -> tuple[int, ...]:
    return cells(rows, BLOCK), cells(columns, BLOCK)


def _blocks_apart(rows: int, columns: int) -> tuple[int, ...]:
    return cells(rows, BLOCK), 1, cells(columns, BLOCK), 1


def _words(rows: int, columns: int) -> tuple[int, ...]:
    return rows, cells(columns, _CODES_PER_WORD)


def _nibbles(rows: int, columns: int) -> tuple[int, ...]:
    return rows, columns // 2


def _groups(group: int) -> Shape:
    return lambda rows, columns: (rows, cells(columns, group))


_F8 = Output("weight", "F8_E4M3", _same)
_LOCAL = Output("weight_scale", "F8_E4M3", _groups(NVFP4_GROUP))
_NVFP4_DIVISOR = (
    Output("weight_packed", "U8", _nibbles),
    _LOCAL,
    Output("weight_global_scale", "F32", _single, 0),
)
_NVFP4_FACTOR = (Output("weight", "U8", _nibbles), _LOCAL, Output("weight_scale_2", "F32", _scalar, 0))
_CT, _MODELOPT = Format.COMPRESSED_TENSORS, Format.MODELOPT
_OUTPUTS: dict[tuple[Format, str], tuple[Output, ...]] = {
    (_CT, "fp8"): (_F8, Output("weight_scale", None, _column)),
    (_CT, "fp8-block"): (_F8, Output("weight_scale", None, _blocks, BLOCK)),
    (_CT, "fp8-static"): (_F8, Output("weight_scale", None, _single, 0)),
    (_CT, "int8"): (Output("weight", "I8", _same), Output("weight_scale", None, _column)),
    (_CT, "nvfp4"): _NVFP4_DIVISOR,
    (_CT, "nvfp4-weight-only"): _NVFP4_DIVISOR,
    (_MODELOPT, "fp8"): (_F8, Output("weight_scale", "F32", _vector)),
    (_MODELOPT, "fp8-block"): (_F8, Output("weight_scale", "F32", _blocks_apart, BLOCK)),
    (_MODELOPT, "fp8-static"): (_F8, Output("weight_scale", "F32", _scalar, 0)),
    (_MODELOPT, "nvfp4"): _NVFP4_FACTOR,
    (_MODELOPT, "nvfp4-weight-only"): _NVFP4_FACTOR,
    (Format.DEEPSEEK, "fp8-block"): (_F8, Output("weight_scale_inv", "F32", _blocks, BLOCK)),
}


def outputs_of(recipe: Recipe) -> tuple[Output, ...]:
    """Return the tensors that codes and scales of a weight are stored in, in the order in which they are made."""
    if recipe.scheme == "int8-weight-only":
        scale = _groups(recipe.group) if recipe.group else _column
        return Output("weight_packed", "I32", _words), Output("weight_scale", None, scale)
    return _OUTPUTS[recipe.format, recipe.scheme]


def transform_of(recipe: Recipe) -> Transform:
    """Return what makes codes and scales."""
    match recipe.scheme:
        case "fp8":
            return QuantizeFp8Channel(recipe.arithmetic)
        case "fp8-block":
            return QuantizeFp8Block(recipe.arithmetic, inverse=recipe.format is Format.DEEPSEEK)
        case "fp8-static":
            return QuantizeFp8Tensor(recipe.arithmetic)
        case "int8":
            return QuantizeInt8(recipe.arithmetic)
        case "int8-weight-only":
            return QuantizeInt8Packed(recipe.arithmetic, recipe.group)
    return QuantizeNvfp4(recipe.arithmetic, recipe.search)


def weight_unit(
    tensor: Tensor, dtype: str, sources: tuple[SourceRows, ...], group: tuple[SourceRows, ...], recipe: Recipe
) -> Unit:
    """Return the unit that makes codes and scales of a weight.

    Args:
        tensor: the weight.
        dtype: what it is stored in.
        sources: its rows.
        group: the rows of all weights that share a per-tensor scale with it, its own included.
        recipe: scheme, format and arithmetic.
    """
    transform = transform_of(recipe)
    rows, columns = tensor.shape
    outputs = tuple(
        OutputTensor(
            f"{tensor.module}.{output.suffix}",
            output.dtype or transform.scale_dtype(dtype),
            output.shape(rows, columns),
            output.grain,
        )
        for output in outputs_of(recipe)
    )
    return Unit(outputs, sources, transform, group=group if recipe.info.has_tensor_scale else ())


def known_units(tensor: Tensor, dtype: str, recipe: Recipe, input_amax: float | None) -> Iterator[Unit]:
    """Yield the units of what belongs to a quantized weight and is known without reading it.

    Args:
        tensor: the weight.
        dtype: what it is stored in.
        recipe: scheme, format and arithmetic.
        input_amax: largest magnitude of its inputs, for schemes with a scale of them.
    """
    if recipe.scheme == "int8-weight-only":
        yield _constant(f"{tensor.module}.weight_shape", tensor.shape, "I64", (2,))
    if not recipe.info.has_input_scale:
        return
    assert input_amax is not None, tensor
    is_ct = recipe.format is Format.COMPRESSED_TENSORS
    shape = (1,) if is_ct else ()
    if recipe.scheme == "fp8-static":
        scale_dtype = QuantizeFp8Tensor(recipe.arithmetic).scale_dtype(dtype)
        yield _constant(f"{tensor.module}.input_scale", (input_amax / _E4M3_MAX,), scale_dtype, shape)
    elif is_ct:
        divisor = _divisor(input_amax, dtype, recipe.arithmetic)
        yield _constant(f"{tensor.module}.input_global_scale", (divisor,), "F32", shape)
    else:
        yield _constant(f"{tensor.module}.input_scale", (input_amax / _NVFP4_MAX,), "F32", shape)


def kv_scale_unit(name: str, amax: float, dtype: str, format_: Format) -> Unit:
    """Return the unit of a scale of the FP8 KV cache: what a code of 1 stands for."""
    is_ct = format_ is Format.COMPRESSED_TENSORS
    return _constant(name, (amax / _E4M3_MAX,), dtype if is_ct else "F32", (1,) if is_ct else ())


def _constant(name: str, values: tuple[float, ...], dtype: str, shape: tuple[int, ...]) -> Unit:
    return Unit((OutputTensor(name, dtype, shape),), (), Constant(values, dtype))


def _divisor(amax: float, dtype: str, arithmetic: Arithmetic) -> float:
    """Return 2688 / amax; compressed-tensors computes it in the dtype of the inputs, as reciprocal and product."""
    if arithmetic is not Arithmetic.COMPRESSED_TENSORS:
        return _NVFP4_MAX / amax
    import torch

    from converters.checkpoint.dtypes import torch_dtype

    return float(_NVFP4_MAX / torch.tensor(amax, dtype=torch_dtype(dtype)))
