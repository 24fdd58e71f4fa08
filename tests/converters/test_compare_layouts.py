"""Structure level between layouts: no finding there and back, and each planted defect has exactly the right one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import read_tensors, small_checkpoint, write_checkpoint
from quantized import DIALECTS, quantized_checkpoint

from converters.compare import Outcome, StructureReport, compare_structure
from converters.convert import ConvertOptions, MtpChoice, plan_convert
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.source import open_source

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]
OTHERS = [layout for layout in Layout if layout is not Layout.SPLIT]


def convert(src: Path, dst: Path, **changes: Any) -> Path:
    with open_source(src) as source:
        run(plan_convert(source, ConvertOptions(**changes)), dst, RunOptions(workers=1), lambda _: None)
    return dst


@pytest.fixture
def fp8(small: Path, tmp_path: Path) -> Path:
    with open_source(small) as source:
        conversion = plan_quantize(source, QuantizeOptions(scheme="fp8"))
        run(conversion, tmp_path / "fp8", RunOptions(workers=1), lambda _: None)
    return tmp_path / "fp8"


def messages(report: StructureReport) -> list[str]:
    return [f"{finding.severity}: {finding}" for finding in report.findings]


def num_quantized(folder: Path) -> int:
    return sum(value.dtype is torch.float8_e4m3fn for value in read_tensors(folder).values())


@pytest.mark.parametrize("layout", OTHERS)
def test_layout_there_and_back_has_no_finding(small: Path, tmp_path: Path, layout: Layout) -> None:
    other = convert(small, tmp_path / "other", layout=layout)
    for source, candidate in ((small, other), (other, small), (other, other)):
        report = compare_structure(source, candidate)
        assert messages(report) == []
        assert report.scheme == "identity"
        assert sum(report.outcomes.values()) == len(read_tensors(small))
        assert bool(report.outcomes.get(Outcome.REPACKED)) == (source != candidate)
        assert report.outcomes.keys() <= {Outcome.SAME, Outcome.REPACKED}
    assert [key for key, _, _ in compare_structure(small, other).config_changes] == ["glm4moe_layout"]


@pytest.mark.parametrize("layout", OTHERS)
def test_fp8_in_a_layout_against_every_other_form_of_the_model(
    small: Path, fp8: Path, tmp_path: Path, layout: Layout
) -> None:
    other = convert(fp8, tmp_path / "other", layout=layout)
    quantized, total = num_quantized(fp8), len(read_tensors(small))
    for source, candidate, scheme in ((fp8, other, "identity"), (other, fp8, "identity"), (small, other, "fp8")):
        report = compare_structure(source, candidate)
        assert messages(report) == []
        assert (report.scheme, sum(report.outcomes.values())) == (scheme, total)
        assert report.outcomes.get(Outcome.QUANTIZED, 0) == (quantized if scheme == "fp8" else 0)
    report = compare_structure(other, convert(other, tmp_path / "plain", dequantize=True, layout=Layout.SPLIT))
    assert messages(report) == []
    assert (report.scheme, report.outcomes[Outcome.DEQUANTIZED]) == ("dequantized", quantized)


@pytest.mark.parametrize("layout", OTHERS)
def test_cast_and_dropped_mtp_layer_are_seen_through_a_layout(small: Path, tmp_path: Path, layout: Layout) -> None:
    other = convert(small, tmp_path / "other", layout=layout, dtype="float32", mtp=MtpChoice.DROP)
    report = compare_structure(small, other)
    assert messages(report) == [
        "warn: candidate: MTP layer: expected present, as in the source, found dropped, as its config declares"
    ]
    assert report.scheme == "cast"
    assert report.outcomes[Outcome.DROPPED] == sum("layers.3." in name for name in read_tensors(small))


@pytest.mark.parametrize("name", DIALECTS)
def test_every_quantized_dialect_dequantized_has_no_finding(tmp_path: Path, name: str) -> None:
    """The MTP layer's head is quantized in these, as in the official FP8 releases."""
    folder, _ = quantized_checkpoint(tmp_path / "src", DIALECTS[name])
    report = compare_structure(folder, folder)
    ignore_is_empty = name.startswith("ct")
    warned = {finding.subject for finding in report.findings}
    assert warned == ({"source: quantization_config.ignore", "candidate: quantization_config.ignore"} if ignore_is_empty
                      else set())  # fmt: skip
    report = compare_structure(folder, convert(folder, tmp_path / "plain", dequantize=True, layout=Layout.PACKED))
    assert [line for line in messages(report) if not line.startswith("warn: source: quantization_config.ignore")] == []
    assert report.scheme == "dequantized"


def drop(name: str) -> Callable[[Tensors, Config], None]:
    def plant(tensors: Tensors, _: Config) -> None:
        del tensors[name]

    return plant


def cut(name: str) -> Callable[[Tensors, Config], None]:
    return lambda tensors, _: tensors.update({name: tensors[name][:-1].clone()})


def put(name: str, value: torch.Tensor) -> Callable[[Tensors, Config], None]:
    return lambda tensors, _: tensors.update({name: value})


def announce(value: Any) -> Callable[[Tensors, Config], None]:
    return lambda _, config: config.update(glm4moe_layout=value)


def move_slot(_: Tensors, config: Config) -> None:
    config["glm4moe_layout"]["shared_expert_slots"] = [0]


PREFIX = "model.layers.1"
STACK = f"{PREFIX}.mlp.experts.gate_up_proj"
QKV = f"{PREFIX}.self_attn.qkv_proj"
FLOAT = "BF16 or F16 or F32"
KEY = "candidate: config.json: glm4moe_layout"
ADDITIONAL = "expected no such tensor, found a tensor its config does not ask for"
Case = tuple[Layout, bool, Callable[[Tensors, Config], None], list[str]]
DEFECTS: dict[str, Case] = {
    "stack missing": (
        Layout.PACKED, False, drop(STACK), [f"candidate: tensor {STACK}: expected {FLOAT} [4, 48, 48], found nothing"]
    ),
    "expert missing": (
        Layout.PACKED, False, cut(STACK),
        [f"candidate: tensor {STACK}: expected {FLOAT} [4, 48, 48], found BF16 [3, 48, 48]"],
    ),
    "expert split off": (
        Layout.PACKED, False, put(f"{PREFIX}.mlp.experts.0.up_proj.weight", torch.ones(24, 48)),
        [f"candidate: tensor {PREFIX}.mlp.experts.0.up_proj.weight: {ADDITIONAL}"],
    ),
    "stack cast": (
        Layout.PACKED, False, put(STACK, torch.ones(4, 48, 48, dtype=torch.float16)),
        [f"candidate: tensor {STACK}: expected BF16 as in the source, or BF16 as in its config, found F16"],
    ),
    "stack without scales": (
        Layout.PACKED, True, drop(f"{STACK}_scale"),
        [f"candidate: tensor {STACK}_scale: expected {FLOAT} [4, 48, 1], found nothing"],
    ),
    "scales of fewer experts": (
        Layout.PACKED, True, cut(f"{STACK}_scale"),
        [f"candidate: tensor {STACK}_scale: expected {FLOAT} [4, 48, 1], found BF16 [3, 48, 1]"],
    ),
    "fused weight missing": (
        Layout.FUSED, False, drop(f"{QKV}.weight"),
        [f"candidate: tensor {QKV}.weight: expected {FLOAT} [160, 48], found nothing"],
    ),
    "fused bias missing": (
        Layout.FUSED, False, drop(f"{QKV}.bias"),
        [f"candidate: tensor {QKV}.bias: expected {FLOAT} [160], found nothing"],
    ),
    "fused scale missing": (
        Layout.FUSED, True, drop(f"{QKV}.weight_scale"),
        [f"candidate: tensor {QKV}.weight_scale: expected {FLOAT} [160, 1], found nothing"],
    ),
    "shared expert missing": (
        Layout.FUSED_SHARED, False, drop(f"{PREFIX}.mlp.experts.4.up_proj.weight"),
        [f"candidate: tensor {PREFIX}.mlp.experts.4.up_proj.weight: expected {FLOAT} [24, 48], found nothing"],
    ),
    "another layout announced": (
        Layout.PACKED, False, announce({"name": "fused"}),
        [f"{KEY}: expected packed, as the tensors' names show, found 'fused'"],
    ),
    "unknown layout announced": (
        Layout.FUSED, False, announce("bundled"),
        [f"{KEY}: expected fused, as the tensors' names show, found 'bundled'"],
    ),
    "wrong slot announced": (
        Layout.FUSED_SHARED, False, move_slot, [f"{KEY}.shared_expert_slots: expected [4], found [0]"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defect_is_the_one_failure_found(small: Path, fp8: Path, tmp_path: Path, defect: str) -> None:
    layout, is_quantized, plant, expected = DEFECTS[defect]
    source = fp8 if is_quantized else small
    folder = convert(source, tmp_path / "other", layout=layout)
    tensors, config = read_tensors(folder), json.loads((folder / "config.json").read_text())
    plant(tensors, config)
    report = compare_structure(source, write_checkpoint(tmp_path / "broken", tensors, config))
    assert messages(report) == [f"fail: {line}" for line in expected]
    assert sum(report.outcomes.values()) == len(read_tensors(small))


def test_layout_is_recognised_without_being_announced(small: Path, tmp_path: Path) -> None:
    folder = convert(small, tmp_path / "other", layout=Layout.PACKED)
    config = json.loads((folder / "config.json").read_text())
    del config["glm4moe_layout"]
    (folder / "config.json").write_text(json.dumps(config))
    assert messages(compare_structure(small, folder)) == []


def test_codes_in_another_scheme_are_not_the_sources(tmp_path: Path) -> None:
    folders = [quantized_checkpoint(tmp_path / name, DIALECTS[name])[0] for name in ("ct-fp8-channel", "ct-fp8-tensor")]
    found = {
        (finding.expected, finding.found)
        for finding in compare_structure(*folders).findings
        if finding.severity == "fail"
    }
    assert found == {("F8_E4M3 (fp8 per channel), as in the source", "F8_E4M3 (fp8 per tensor)")}


def test_correction_bias_that_both_lack_is_no_finding_and_one_that_is_lost_is(tmp_path: Path) -> None:
    full = small_checkpoint(tmp_path / "full")
    tensors = {name: value for name, value in read_tensors(full).items() if "correction_bias" not in name}
    config = json.loads((full / "config.json").read_text())
    without = write_checkpoint(tmp_path / "without", tensors, config)
    packed = convert(without, tmp_path / "packed", layout=Layout.PACKED)
    assert messages(compare_structure(without, packed)) == []
    assert messages(compare_structure(full, packed)) == [
        f"fail: candidate: tensor model.layers.{layer}.mlp.gate.e_score_correction_bias: "
        "expected as in the source, found nothing"
        for layer in (1, 2, 3)
    ]
