"""What compressed-tensors, nvidia-modelopt and transformers make of a weight, and weights that are hard to quantize."""

import warnings
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from compressed_tensors.compressors.nvfp4 import NVFP4PackedCompressor
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
NVFP4_ARGS = QuantizationArgs(
    num_bits=4, type="float", symmetric=True, strategy="tensor_group", group_size=16, scale_dtype=torch.float8_e4m3fn
)


@cache
def hard_weights(rows: int, columns: int) -> dict[str, torch.Tensor]:
    """Return fp32 weights by name: every kind of tensor that has broken a quantizer."""
    g = torch.Generator().manual_seed(7)
    normal = torch.randn(rows, columns, generator=g)
    outlier = normal.clone()
    outlier[:, columns // 2] *= 1000
    single = torch.zeros(rows, columns)
    single[rows // 2, columns // 3] = -3.0
    return {
        "normal": normal,
        "like weights": normal * 0.02,
        "heavy-tailed": normal / torch.rand(rows, columns, generator=g).clamp_min(1e-3),
        "all-zero": torch.zeros(rows, columns),
        "zero rows": normal * (torch.arange(rows) % 3 > 0)[:, None],
        "denormal": normal * 1e-39,
        "tiny": normal * 1e-30,
        "huge": normal * 1e37,
        "single outlier": outlier,
        "one weight": single,
        "negative only": -normal.abs(),
        "positive only": normal.abs(),
        "negative zero": torch.full((rows, columns), -0.0),
        "powers of two": torch.exp2(torch.randint(-20, 5, (rows, columns), generator=g).float()),
        "columns of all sizes": normal * torch.logspace(-8, 3, columns),
    }


def finite_as(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a weight in a dtype, cut to its range."""
    limit = torch.finfo(dtype).max
    return weight.clamp(-limit, limit).to(dtype)


def ct_channel(weight: torch.Tensor, kind: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return codes and scales (R, 1) of FP8 or INT8, strategy channel."""
    args = QuantizationArgs(**kind, strategy="channel")
    scale, zero_point = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), args)
    dtype = torch.int8 if kind["type"] == "int" else torch.float8_e4m3fn
    return quantize(weight, scale, zero_point, args, dtype=dtype), scale


def ct_tensor(weight: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP8 codes and the scale [1], strategy tensor, where other weights reach up to `largest`."""
    args = QuantizationArgs(**FP8, strategy="tensor")
    largest = largest.to(weight.dtype).flatten()
    scale, zero_point = calculate_qparams(-largest, largest, args)
    return quantize(weight, scale, zero_point, args, dtype=torch.float8_e4m3fn), scale


def ct_block(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP8 codes and scales, strategy block; rows and columns are filled up with zeros as their observer does."""
    args = QuantizationArgs(**FP8, strategy="block", block_structure=[rows, columns])
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).transpose(1, 2)
    scale, zero_point = calculate_qparams(blocks.amin((2, 3)), blocks.amax((2, 3)), args)
    return quantize(weight, scale, zero_point, args, dtype=torch.float8_e4m3fn), scale


def ct_packed(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int32 words and scales of 8-bit `pack-quantized`, by their compressor; group 0 is the channel."""
    args = QuantizationArgs(**INT8, strategy="group" if group else "channel", group_size=group or None)
    groups = weight.unflatten(1, (-1, group or weight.shape[1]))
    scale, zero_point = calculate_qparams(groups.amin(2), groups.amax(2), args)
    state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
    packed = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=args))
    return packed["weight_packed"], packed["weight_scale"]


def ct_nvfp4(weight: torch.Tensor, largest: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return packed codes, local scales and the divisor [1], by their compressor."""
    largest = largest.to(weight.dtype).flatten()
    divisor = generate_gparam(-largest, largest)
    groups = weight.unflatten(1, (-1, 16))
    scale, _ = calculate_qparams(groups.amin(2), groups.amax(2), NVFP4_ARGS, global_scale=divisor)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": divisor}
    packed = NVFP4PackedCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=NVFP4_ARGS))
    return packed["weight_packed"], packed["weight_scale"], divisor


def ct_values(codes: torch.Tensor, scale: torch.Tensor, strategy: str) -> torch.Tensor:
    """Return the fp32 weights that compressed-tensors reads out of FP8 codes and scales per channel or block."""
    structure = [128, 128] if strategy == "block" else None
    args = QuantizationArgs(**FP8, strategy=strategy, block_structure=structure)
    return dequantize(codes, scale.float(), args=args, dtype=torch.float32)


def ct_packed_values(words: torch.Tensor, scale: torch.Tensor, group: int, shape: torch.Size) -> torch.Tensor:
    """Return the fp32 weights that compressed-tensors reads out of int32 words; group 0 is the channel."""
    args = QuantizationArgs(**INT8, strategy="group" if group else "channel", group_size=group or None)
    state = {"weight_packed": words, "weight_scale": scale.float(), "weight_shape": torch.tensor(shape)}
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    return PackedQuantizationCompressor.decompress(state, scheme)["weight"]


def ct_nvfp4_values(packed: torch.Tensor, scale: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """Return the fp32 weights that compressed-tensors reads out of NVFP4."""
    codes = unpack_fp4_from_uint8(packed, packed.shape[0], packed.shape[1] * 2, dtype=torch.float32)
    return dequantize(codes, scale.float(), args=NVFP4_ARGS, global_scale=divisor, dtype=torch.float32)


@cache
def _modelopt() -> SimpleNamespace:
    with warnings.catch_warnings():
        # it tells that this transformers is newer than what it was tested with
        warnings.simplefilter("ignore")
        import modelopt.torch.quantization as mtq
        from modelopt.torch.export.unified_export_hf import _export_quantized_weight
        from modelopt.torch.quantization.qtensor import NVFP4QTensor
    return SimpleNamespace(mtq=mtq, export=_export_quantized_weight, nvfp4=NVFP4QTensor)


def modelopt_export(weight: torch.Tensor, config: str, largest: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """Return the tensors that modelopt's export writes for a linear layer, by suffix.

    Args:
        weight: (O, I).
        config: name of one of its presets.
        largest: what the maximum of fused weights is set to before the export, as it does for q/k/v and gate/up.
    """
    modelopt = _modelopt()
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    model = torch.nn.Sequential(linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        modelopt.mtq.quantize(model, getattr(modelopt.mtq, config), lambda m: m(torch.ones_like(weight[:1])))
        if largest is not None:
            model[0].weight_quantizer.amax = largest.to(weight.dtype).reshape(())
        modelopt.export(model[0], weight.dtype)
    return {n: t.detach() for n, t in (*model[0].named_buffers(), *model[0].named_parameters()) if "quantizer" not in n}


def modelopt_nvfp4_values(packed: torch.Tensor, scale: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Return the fp32 weights that modelopt reads out of NVFP4."""
    shape = torch.Size((packed.shape[0], packed.shape[1] * 2))
    quantized = _modelopt().nvfp4(shape, torch.float32, packed)
    return quantized.dequantize(torch.float32, scale=scale, double_scale=factor.reshape(()), block_sizes={-1: 16})


def deepseek_block(weight: torch.Tensor, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return FP8 codes and `weight_scale_inv` as transformers writes them; the shape must divide by the block."""
    from transformers.integrations.finegrained_fp8 import Fp8Quantize

    config = SimpleNamespace(weight_block_size=(rows, columns), scale_fmt=None)
    made = Fp8Quantize(SimpleNamespace(quantization_config=config)).convert({"x.weight": weight})
    return made["x.weight"], made["x.weight_scale_inv"]
