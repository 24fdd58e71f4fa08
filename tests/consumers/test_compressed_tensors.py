"""compressed-tensors on the files we write: its own config classes, matcher and decompressors, on every scheme."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import read_tensors
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match

from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.pipeline import RunOptions
from converters.quant.scheme import Format
from converters.schema import Tensor
from converters.source import open_source
from tests.consumers.cases import CASES

NAMES = [case.name for case in CASES.values() if case.format is Format.COMPRESSED_TENSORS]


def read_config(folder: Path) -> QuantizationConfig:
    raw: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return QuantizationConfig.model_validate(raw)


def matrices(folder: Path) -> list[Tensor]:
    with open_source(folder) as source:
        return [tensor for tensor in source.schema.tensors.values() if len(tensor.shape) == 2]


def scheme_of(config: QuantizationConfig, tensor: Tensor) -> QuantizationScheme | None:
    """Return the scheme that the library applies to a module; heads and embeddings are linear modules here too."""
    module = torch.nn.Linear(1, 1, bias=False)
    found = [
        group
        for group in config.config_groups.values()
        if is_match(tensor.module, module, group.targets, config.ignore or ())
    ]
    assert len(found) <= 1, tensor.name
    return found[0] if found else None


def decompressed(folder: Path) -> Iterator[tuple[Tensor, torch.Tensor]]:
    """Yield every weight that the library's config says is quantized, as the library restores it."""
    config, stored = read_config(folder), read_tensors(folder)
    for tensor in matrices(folder):
        scheme = scheme_of(config, tensor)
        parts = {
            name.removeprefix(f"{tensor.module}."): value
            for name, value in stored.items()
            if name.rpartition(".")[0] == tensor.module and not name.endswith("bias")
        }
        if scheme is None:
            assert parts.keys() <= {"weight"}, tensor.name
            continue
        compressor = BaseCompressor.get_value_from_registry(scheme.format or config.format)
        yield tensor, compressor.decompress(parts, scheme)["weight"]


@pytest.mark.parametrize("name", NAMES)
def test_compressed_tensors_restores_from_the_files_what_we_restore(name, result, tmp_path):
    folder = result(name)
    with open_source(folder) as source:
        run(plan_convert(source, ConvertOptions(dequantize=True)), tmp_path / "plain", RunOptions(1), lambda _: None)
    ours, compared = read_tensors(tmp_path / "plain"), set()
    for tensor, theirs in decompressed(folder):
        assert ours[tensor.name].dtype is torch.bfloat16
        assert torch.equal(theirs.to(torch.bfloat16), ours[tensor.name]), tensor.name
        compared.add(tensor.name)
    with open_source(folder) as source:
        assert compared == {name for name, weight in source.weights.items() if not weight.format.is_plain}


@pytest.mark.parametrize("name", NAMES)
def test_restored_weights_are_near_the_source(name, result, source):
    """A swapped nibble or an inverted scale is off by the weight itself; NVFP4 is off by a tenth."""
    plain = read_tensors(source)
    for tensor, theirs in decompressed(result(name)):
        weight = plain[tensor.name].float()
        assert (theirs.float() - weight).norm() < 0.11 * weight.norm(), tensor.name
