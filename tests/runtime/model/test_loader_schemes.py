"""The runtime loads what quantize writes, in every scheme and format: the model of the weights that it stands for."""

from pathlib import Path

import pytest
import torch
from quantizing import checkpoint, quantize

from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quant.scheme import SCHEMES_BY_FORMAT, Format
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.model.loader import load_model

CASES = [(format_, scheme) for format_, schemes in SCHEMES_BY_FORMAT.items() for scheme in schemes]


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("schemes") / "src")


def convert(src: Path, dst: Path, options: ConvertOptions) -> Path:
    with open_source(src) as source:
        run(plan_convert(source, options), dst, RunOptions(1), lambda _: None)
    return dst


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    model = load_model(folder, EngineConfig(dtype="float32")).model
    return model.logits(model(torch.arange(48).view(2, 24)))


@pytest.mark.parametrize(("format_", "scheme"), CASES)
def test_quantized_model_is_that_of_its_weights_in_two_layouts(
    src: Path, tmp_path: Path, format_: Format, scheme: str
) -> None:
    kv_cache = None if format_ is Format.DEEPSEEK else "fp8"
    quantize(src, tmp_path / "dst", scheme, format=format_, kv_cache=kv_cache)
    plain = convert(tmp_path / "dst", tmp_path / "plain", ConvertOptions(dequantize=True, dtype="float32"))
    packed = convert(tmp_path / "dst", tmp_path / "packed", ConvertOptions(layout=Layout.PACKED))
    expected = logits(plain)
    assert torch.equal(logits(tmp_path / "dst"), expected)
    assert torch.equal(logits(packed), expected)
    assert not torch.equal(expected, logits(src))
