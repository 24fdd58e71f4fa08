"""The digest of the content, and the pass over the data."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import fp8_channel_config, random_tensors, small_config, write_checkpoint

from converters.config import Glm4MoeConfig
from converters.inspect import content
from converters.inspect.content import DIGEST_HEADER, Values
from converters.inspect.report import InspectReport, inspect_folder, scan_content
from converters.schema import DtypePolicy, expand
from tests.converters.inspect.layouts import Tensors, fused, fused_shared, packed, quantize

CONFIG = small_config()
SCHEMA = expand(Glm4MoeConfig.from_hf(CONFIG))


def scan(folder: Path, *, values: bool = False) -> InspectReport:
    report = inspect_folder(folder, folder.name)
    return scan_content(report, want_hash=True, want_values=values, on_bytes=lambda _: None)


def digest(folder: Path, tensors: Tensors, num_shards: int = 2, config: dict | None = None) -> str:
    write_checkpoint(folder, tensors, config or CONFIG, num_shards)
    report = scan(folder)
    assert report.findings == ()
    assert report.digest is not None
    return report.digest


@pytest.fixture
def tensors() -> Tensors:
    return random_tensors(SCHEMA)


def test_digest_is_its_definition(tmp_path: Path, tensors: Tensors) -> None:
    """Written down here a second time: whoever compares digests later must get the same."""
    lines = []
    for name, value in tensors.items():
        data = value.contiguous().view(torch.uint8).numpy().tobytes() if value.dim() else b""
        dtype = {torch.bfloat16: "BF16", torch.float32: "F32"}[value.dtype]
        shape = " x ".join(map(str, value.shape if value.dim() > 1 else (*value.shape, 1)))
        lines.append(f"{name} {dtype} {shape} {hashlib.sha256(data).hexdigest()}\n")
    expected = hashlib.sha256(DIGEST_HEADER + "".join(sorted(lines)).encode()).hexdigest()
    assert digest(tmp_path / "a", tensors) == expected


def test_digest_does_not_depend_on_shards_or_order(tmp_path: Path, tensors: Tensors) -> None:
    first = digest(tmp_path / "a", tensors, 1)
    turned = dict(reversed(tensors.items()))
    assert digest(tmp_path / "b", turned, 3) == first
    assert digest(tmp_path / "c", tensors, 5) == first


def test_digest_does_not_depend_on_the_size_of_blocks(
    tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = digest(tmp_path / "a", tensors)
    monkeypatch.setattr(content, "BLOCK_BYTES", 128)
    assert scan(tmp_path / "a").digest == first


LAYOUTS: dict[str, Callable[[Tensors], Tensors]] = {
    "packed": packed,
    "fused": fused,
    "fused-shared": lambda tensors: fused_shared(tensors, CONFIG["n_routed_experts"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_digest_does_not_depend_on_the_layout(tmp_path: Path, tensors: Tensors, layout: str) -> None:
    stored = LAYOUTS[layout](tensors)
    assert stored.keys() != tensors.keys()
    assert digest(tmp_path / "split", tensors) == digest(tmp_path / layout, stored)
    report = inspect_folder(tmp_path / layout, layout)
    assert report.view.layout == layout
    assert report.model is not None
    totals = report.model.totals
    assert (totals.tensors, totals.bytes) == (totals.expected_tensors, totals.expected_bytes)
    assert totals.tensors == len(stored)
    assert totals.parameters == totals.expected_parameters == sum(value.numel() for value in tensors.values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_digest_of_quantized_weights_does_not_depend_on_the_layout(
    tmp_path: Path, tensors: Tensors, layout: str
) -> None:
    names = [tensor.name for tensor in SCHEMA.tensors.values() if tensor.spec.dtype is DtypePolicy.QUANTIZABLE]
    coded = quantize(tensors, names)
    plain = [t.module for t in SCHEMA.tensors.values() if t.spec.dtype is not DtypePolicy.QUANTIZABLE]
    plain = [name for name in plain if not name.endswith(("q_proj", "k_proj", "v_proj"))]
    config = {**CONFIG, "quantization_config": fp8_channel_config(plain)}
    split = digest(tmp_path / "split", coded, config=config)
    assert digest(tmp_path / layout, LAYOUTS[layout](coded), config=config) == split
    assert split != digest(tmp_path / "plain", tensors)
    report = inspect_folder(tmp_path / layout, layout)
    assert report.model is not None
    assert report.model.quantization.scheme == "fp8"
    assert report.model.totals.bytes == report.model.totals.expected_bytes


def test_one_bit_changes_the_digest(tmp_path: Path, tensors: Tensors) -> None:
    first = digest(tmp_path / "a", tensors)
    name = SCHEMA.tensors.keys() - {""}
    changed = tensors[min(name)].clone()
    changed.view(torch.int16).view(-1)[7] ^= 1
    assert digest(tmp_path / "b", {**tensors, min(name): changed}) != first


def test_two_tensors_that_change_places_change_the_digest(tmp_path: Path, tensors: Tensors) -> None:
    first = digest(tmp_path / "a", tensors)
    down = [name for name in tensors if name.endswith("experts.0.down_proj.weight")]
    swapped = {**tensors, down[0]: tensors[down[1]], down[1]: tensors[down[0]]}
    assert digest(tmp_path / "b", swapped) != first


def test_no_digest_of_half_a_checkpoint(tmp_path: Path, tensors: Tensors) -> None:
    write_checkpoint(tmp_path / "a", tensors, CONFIG, 3)
    (tmp_path / "a" / "model-00002-of-00003.safetensors").unlink()
    assert scan(tmp_path / "a").digest is None


def test_every_byte_is_counted_once(tmp_path: Path, tensors: Tensors) -> None:
    write_checkpoint(tmp_path / "a", packed(tensors), CONFIG)
    read: list[int] = []
    report = inspect_folder(tmp_path / "a", "a")
    scan_content(report, want_hash=True, want_values=True, on_bytes=read.append)
    assert sum(read) == sum(value.nbytes for value in tensors.values())


def seen(values: torch.Tensor, dtype: str, *, block_bytes: int = 1 << 20) -> Values:
    data = memoryview(values.contiguous().view(torch.uint8).numpy().tobytes())
    found, width = Values(), values.element_size()
    for begin in range(0, len(data), block_bytes):
        found.add(data[begin : begin + block_bytes], dtype, begin // width)
    return found


@pytest.mark.parametrize("block_bytes", [16, 64, 1 << 20])
def test_values_are_seen_whatever_the_blocks(block_bytes: int) -> None:
    ones = torch.ones(64, dtype=torch.bfloat16)
    assert seen(ones, "BF16", block_bytes=block_bytes).is_constant
    almost = ones.clone()
    almost[63] = 2
    assert not seen(almost, "BF16", block_bytes=block_bytes).is_constant
    zeros = torch.zeros(64, dtype=torch.bfloat16)
    zeros[33] = -0.0
    found = seen(zeros, "BF16", block_bytes=block_bytes)
    assert found.is_zero
    assert not found.is_constant
    zeros[50] = float("-inf")
    found = seen(zeros, "BF16", block_bytes=block_bytes)
    assert (found.is_zero, found.first_non_finite) == (False, 50)


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        (torch.tensor([1.0, 1e-30]), "F32", True),
        (torch.tensor([1.0, 0.0]), "F32", False),
        (torch.tensor([1.0, -0.0]), "F32", False),
        (torch.tensor([1.0, -2.0]).bfloat16(), "BF16", False),
        (torch.tensor([0.125, 448.0]).to(torch.float8_e4m3fn), "F8_E4M3", True),
        (torch.tensor([0.0, 448.0]).to(torch.float8_e4m3fn), "F8_E4M3", False),
        (torch.tensor([0, 127, 254], dtype=torch.uint8), "U8", True),
        (torch.tensor([0, 127, 255], dtype=torch.uint8), "U8", False),
    ],
)
def test_only_positive_values_can_be_scales(values: torch.Tensor, dtype: str, expected: bool) -> None:
    assert seen(values, dtype).is_scale is expected
