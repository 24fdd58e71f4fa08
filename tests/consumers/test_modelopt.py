"""nvidia-modelopt on the files we write in its format: what its tensor classes restore, and its two config forms."""

import json
import warnings
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from builders import read_tensors
from quantization_peers import modelopt_nvfp4_values

from converters.convert import ConvertOptions, plan_convert
from converters.formats.declared import MODELOPT_FILE
from converters.job import run
from converters.pipeline import RunOptions
from converters.quant.scheme import Format
from converters.source import open_source
from tests.consumers.cases import CASES

NAMES = [case.name for case in CASES.values() if case.format is Format.MODELOPT]
BLOCK = {0: 128, 1: 128}


@cache
def modelopt() -> SimpleNamespace:
    with warnings.catch_warnings():
        # it tells that this transformers is newer than what it was tested with, and torch that it scripts modules
        warnings.simplefilter("ignore")
        from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
        from modelopt.torch.quantization.qtensor import FP8QTensor
    return SimpleNamespace(fp8=FP8QTensor, block=convert_hf_quant_config_format)


def restored(parts: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the fp32 weight that modelopt reads out of its own tensors."""
    codes, scale = parts["weight"], parts["weight_scale"]
    if "weight_scale_2" in parts:
        return modelopt_nvfp4_values(codes, scale, parts["weight_scale_2"])
    tensor = modelopt().fp8(codes.shape, torch.float32, codes)
    if scale.ndim == 4:
        return tensor.dequantize(torch.float32, scale=scale[:, 0, :, 0], block_sizes=BLOCK)
    return tensor.dequantize(torch.float32, scale=scale if scale.ndim == 0 else scale[:, None])


@pytest.mark.parametrize("name", NAMES)
def test_modelopt_restores_from_the_files_what_we_restore(name: str, result: Any, tmp_path: Path) -> None:
    folder = result(name)
    with open_source(folder) as source:
        quantized = [weight for weight, held in source.weights.items() if not held.format.is_plain]
        run(plan_convert(source, ConvertOptions(dequantize=True)), tmp_path / "plain", RunOptions(1), lambda _: None)
    stored, ours = read_tensors(folder), read_tensors(tmp_path / "plain")
    assert quantized
    for weight in quantized:
        module = weight.rpartition(".")[0]
        names = ("weight", "weight_scale", "weight_scale_2")
        parts = {part: stored[f"{module}.{part}"] for part in names if f"{module}.{part}" in stored}
        assert torch.equal(restored(parts).to(torch.bfloat16), ours[weight]), weight


@pytest.mark.parametrize("name", NAMES)
def test_config_is_what_modelopt_makes_of_its_own_file(name: str, result: Any) -> None:
    """Its exporter writes hf_quant_config.json and turns that into the block of config.json."""
    folder = result(name)
    block = json.loads((folder / "config.json").read_text())["quantization_config"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = modelopt().block(json.loads((folder / MODELOPT_FILE).read_text()))
    assert {**theirs, "quant_method": "modelopt"} == block
