"""Inputs as engines quantize them: against compressed-tensors' own, and through a whole model against transformers."""

import json
from pathlib import Path

import pytest
import torch
from builders import read_tensors, write_checkpoint
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import Glm4MoeForCausalLM

from converters.errors import ConfigError, InputError
from converters.formats.inputs import InputCode, InputScheme, input_scheme
from converters.quant.scheme import Format
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.model.activations import InputQuantizer, input_quantizers
from runtime.model.loader import load_model
from tests.consumers.cases import IDS, Case, quantized, random_source, random_stats

FP8 = {"num_bits": 8, "type": "float", "symmetric": True}
NVFP4 = {"num_bits": 4, "type": "float", "symmetric": True, "scale_dtype": torch.float8_e4m3fn}
DIVISOR = 310.5


def inputs() -> torch.Tensor:
    """Tokens (6, 256) of all sizes, one of them zero, one with an outlier beyond what DIVISOR stands for."""
    hidden = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)) * torch.logspace(-6, 1, 6)[:, None]
    hidden[2] = 0.0
    hidden[4, 17] = 60.0
    return hidden


def theirs(hidden: torch.Tensor, args: QuantizationArgs, group: int, divisor: torch.Tensor | None) -> torch.Tensor:
    """Return what compressed-tensors makes of inputs, its scales found as it finds them at run time."""
    groups = hidden.unflatten(1, (-1, group))
    scale, zero_point = calculate_qparams(groups.amin(2), groups.amax(2), args, global_scale=divisor)
    return fake_quantize(hidden, scale, zero_point, args, global_scale=divisor)


@pytest.mark.parametrize(
    ("scheme", "args", "group"),
    [
        (InputScheme(InputCode.FP8), {**FP8, "strategy": "token"}, 256),
        (InputScheme(InputCode.FP8, 128), {**FP8, "strategy": "group", "group_size": 128}, 128),
        (InputScheme(InputCode.NVFP4, 16, True), {**NVFP4, "strategy": "tensor_group", "group_size": 16}, 16),
    ],
    ids=lambda value: value.label if isinstance(value, InputScheme) else "",
)
def test_values_are_those_of_compressed_tensors(scheme: InputScheme, args: dict, group: int) -> None:
    divisor = torch.tensor([DIVISOR]) if scheme.is_static else None
    expected = theirs(inputs(), QuantizationArgs(**args, dynamic=True), group, divisor)
    found = InputQuantizer(scheme, DIVISOR if scheme.is_static else 1.0)(inputs())
    assert torch.equal(found, expected)
    assert not torch.equal(found, inputs())


def test_values_by_a_calibrated_scale_saturate() -> None:
    args = QuantizationArgs(**FP8, strategy="tensor")
    scale = torch.tensor([0.0625])
    expected = fake_quantize(inputs(), scale, torch.zeros(1).to(torch.float8_e4m3fn), args)
    found = InputQuantizer(InputScheme(InputCode.FP8, None, True), 0.0625)(inputs())
    assert torch.equal(found, expected)
    assert found.max() == 448 * 0.0625


def test_int8_is_a_127th_of_the_largest_input_per_token() -> None:
    """As vLLM's kernel has it; compressed-tensors' own forward divides by 127.5."""
    hidden = inputs()
    scale = hidden.abs().amax(1, keepdim=True).double() / 127
    codes = torch.where(scale > 0, hidden.double() / scale, 0.0).round()
    found = InputQuantizer(InputScheme(InputCode.INT8))(hidden)
    assert codes.abs().max() == 127
    torch.testing.assert_close(found.double(), codes * scale, rtol=2**-22, atol=0)


def test_dtype_and_leading_dims_are_kept() -> None:
    hidden = inputs().to(torch.bfloat16).view(2, 3, 256)
    found = InputQuantizer(InputScheme(InputCode.FP8, 128))(hidden)
    assert (found.dtype, found.shape) == (torch.bfloat16, hidden.shape)
    assert found.isfinite().all()


@torch.inference_mode()
def outputs_of(model: torch.nn.Module, module: str) -> torch.Tensor:
    seen = []
    handle = model.get_submodule(module).register_forward_hook(lambda _, inputs, output: seen.append(output))
    model(IDS)
    handle.remove()
    return seen[0]


def test_fp8_as_served_is_what_transformers_computes_which_quantizes_inputs_too(tiny: Path, tmp_path: Path) -> None:
    """Bit for bit through the dense layers; of experts, transformers leaves the inputs as they are."""
    folder = quantized(tiny, tmp_path / "fp8", Case("fp8", "fp8"), None)
    hf = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    last = "model.layers.2.mlp.down_proj"
    expected = outputs_of(hf, last)
    served, full = (
        load_model(folder, EngineConfig(dtype="float32", activations=activations), with_mtp=False).model
        for activations in ("as-served", "full")
    )
    assert torch.equal(outputs_of(served, last), expected)
    assert not torch.equal(outputs_of(full, last), expected)


@pytest.mark.parametrize(
    ("scheme", "format_", "code", "count"),
    [
        ("int8", Format.COMPRESSED_TENSORS, "int8 per token", 50),
        ("fp8-block", Format.DEEPSEEK, "fp8 per 128 columns", 50),
        ("fp8-static", Format.MODELOPT, "fp8 by a calibrated scale", 47),
        ("nvfp4", Format.COMPRESSED_TENSORS, "nvfp4 per 16 columns, below a calibrated scale", 47),
        ("nvfp4-weight-only", Format.MODELOPT, "", 0),
        ("int8-weight-only", Format.COMPRESSED_TENSORS, "", 0),
    ],
)
def test_inputs_of_quantized_modules_are_quantized_and_no_others(scheme, format_, code, count, tmp_path):
    source = random_source(tmp_path / "source")
    folder = quantized(source, tmp_path / "quantized", Case("", scheme, format_), random_stats(source))
    with open_source(folder) as opened:
        found = input_quantizers(opened)
        weights = {name for name, stored in opened.weights.items() if not stored.format.is_plain}
    assert {f"{module}.weight" for module in found} == (weights if code else set())
    assert {quantizer.scheme.label for quantizer in found.values()} == ({code} if code else set())


def test_nvfp4_scales_of_both_formats_stand_for_the_same(tmp_path: Path) -> None:
    source = random_source(tmp_path / "source")
    stats = random_stats(source)
    scales = []
    for format_ in (Format.COMPRESSED_TENSORS, Format.MODELOPT):
        with open_source(quantized(source, tmp_path / format_, Case("", "nvfp4", format_), stats)) as opened:
            scales.append({name: found.scale for name, found in input_quantizers(opened).items()})
    assert scales[0] == pytest.approx(scales[1], rel=2**-22)


def test_mixed_schemes_have_their_own_inputs(tmp_path: Path) -> None:
    scheme = "experts=nvfp4-weight-only,shared-experts=int8,attention=fp8"
    folder = quantized(random_source(tmp_path / "source"), tmp_path / "mixed", Case("", scheme), None)
    with open_source(folder) as opened:
        found = {
            name.split(".", 3)[3]: str(quantizer.scheme.code) for name, quantizer in input_quantizers(opened).items()
        }
    assert {found["self_attn.q_proj"], found["mlp.shared_experts.up_proj"]} == {"fp8", "int8"}
    assert not [name for name in found if ".experts." in name or name.startswith("mlp.up")]


def test_inputs_of_an_unknown_kind_are_refused() -> None:
    group = {"targets": ["Linear"], "input_activations": {"type": "int", "num_bits": 4, "strategy": "token"}}
    with pytest.raises(ConfigError, match="expected INT8 or FP8 per token"):
        input_scheme({"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}, "model.layers.0.x")


def test_a_missing_scale_is_named(tmp_path: Path) -> None:
    source = random_source(tmp_path / "source")
    folder = quantized(source, tmp_path / "q", Case("", "fp8-static", Format.MODELOPT), random_stats(source))
    tensors = read_tensors(folder)
    del tensors["model.layers.1.self_attn.o_proj.input_scale"]
    config = json.loads((folder / "config.json").read_text())
    with (
        open_source(write_checkpoint(tmp_path / "bad", tensors, config)) as opened,
        pytest.raises(InputError, match="o_proj"),
    ):
        input_quantizers(opened)
