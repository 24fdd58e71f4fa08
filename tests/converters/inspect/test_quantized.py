"""Findings on quantized checkpoints: leftovers, the MTP layer's cache scales, half groups, and what engines read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_tensors, write_checkpoint
from quantized_from import CONFIG, MAKERS, SCHEMA, Maker, plain_modules, quantize, write_pair

from converters.compare import compare_structure
from converters.inspect.engine_readings import Engine, IgnoreList, Reading, engine_modules
from converters.inspect.report import inspect_folder, scan_content
from converters.schema import Role

Stored = dict[str, torch.Tensor]
QUERY, KEY, VALUE = (SCHEMA.tensor(Role.ATTENTION, f"{x}_proj.weight", 1) for x in "qkv")
MTP = SCHEMA.mtp_layer
MTP_KEY = SCHEMA.tensor(Role.ATTENTION, "k_proj.weight", MTP)
UP = SCHEMA.tensor(Role.EXPERT, "up_proj.weight", 1, 2)
TENSORS = random_tensors(SCHEMA)


def numbers(folder: Path, *, check: bool = False) -> list[tuple[int, str]]:
    report = inspect_folder(folder, "CKPT")
    if check:
        report = scan_content(report, want_hash=False, want_values=True, on_bytes=lambda _: None)
    return [(finding.check.number, finding.subject) for finding in report.findings]


@pytest.mark.parametrize("name", MAKERS)
def test_what_a_writer_makes_has_no_finding(tmp_path: Path, name: str) -> None:
    _, copy = write_pair(tmp_path, MAKERS[name])
    assert numbers(copy, check=True) == []


def put(name: str, value: torch.Tensor) -> Callable[[Stored], object]:
    return lambda stored: stored.update({name: value})


@pytest.mark.parametrize(
    ("maker", "change", "expected"),
    [
        ("ct-nvfp4", put(UP.name, TENSORS[UP.name]), (406, f"tensor {UP.name}")),
        (
            "ct-fp8-channel",
            put(f"{MTP_KEY.module}.k_scale", torch.ones(1)),
            (407, f"tensor {MTP_KEY.module}.k_scale"),
        ),
        (
            "ct-nvfp4",
            put(f"{UP.module}.weight_global_scale", torch.ones(1)),
            (510, f"tensor {UP.module}.weight_global_scale"),
        ),
        (
            "modelopt-nvfp4",
            put(f"{UP.module}.weight_scale_2", torch.tensor(1.0)),
            (510, f"tensor {UP.module}.weight_scale_2"),
        ),
    ],
)
def test_damage_is_found(
    tmp_path: Path, maker: str, change: Callable[[Stored], object], expected: tuple[int, str]
) -> None:
    _, copy = write_pair(tmp_path, MAKERS[maker], change)
    assert expected in numbers(copy, check=True)


def test_an_input_scale_of_one_is_found(tmp_path: Path) -> None:
    maker = MAKERS["ct-nvfp4"]

    def make(weight: torch.Tensor, largest: torch.Tensor) -> Stored:
        return {**maker.make(weight, largest), "input_global_scale": torch.ones(1)}

    _, copy = write_pair(tmp_path, Maker(maker.config, make))
    found = numbers(copy, check=True)
    assert {number for number, _ in found} == {510}
    assert all(subject.endswith("input_global_scale") for _, subject in found)


def test_a_scale_of_one_for_zeros_is_right(tmp_path: Path) -> None:
    maker = MAKERS["ct-nvfp4"]
    zeros = {**TENSORS, UP.name: torch.zeros_like(TENSORS[UP.name])}
    gate = SCHEMA.tensor(Role.EXPERT, "gate_proj.weight", 1, 2).name
    stored = quantize(SCHEMA, {**zeros, gate: torch.zeros_like(zeros[gate])}, maker)
    assert float(stored[f"{UP.module}.weight_global_scale"]) == 1.0
    block = {**maker.config, "ignore": plain_modules(SCHEMA)}
    folder = write_checkpoint(tmp_path / "a", stored, {**CONFIG, "quantization_config": block})
    assert 510 not in {number for number, _ in numbers(folder, check=True)}


def with_plain(tmp_path: Path, names: list[str], ignore: list[str]) -> Path:
    """Write an FP8 checkpoint in which some weights are plain, with this ignore list beside the usual one."""
    maker = MAKERS["ct-fp8-channel"]
    stored = quantize(SCHEMA, TENSORS, maker)
    for name in names:
        del stored[f"{SCHEMA.tensors[name].module}.weight_scale"]
        stored[name] = TENSORS[name]
    block = {**maker.config, "ignore": [*plain_modules(SCHEMA), *ignore]}
    return write_checkpoint(tmp_path / "copy", stored, {**CONFIG, "quantization_config": block})


def readings(folder: Path) -> list[str]:
    findings = inspect_folder(folder, "CKPT").findings
    return [str(finding) for finding in findings if finding.check.number in (408, 409)]


ATTENTION = [QUERY, KEY, VALUE]
NAMES = [tensor.module for tensor in ATTENTION]
FUSED = f"{QUERY.module.rpartition('.')[0]}.qkv_proj"


def test_exact_names_are_read_by_all_engines(tmp_path: Path) -> None:
    assert readings(with_plain(tmp_path, [tensor.name for tensor in ATTENTION], NAMES)) == []


def test_a_pattern_is_not_read_by_tensorrt_llm(tmp_path: Path) -> None:
    pattern = r"re:.*layers\.1\.self_attn\.[qkv]_proj$"
    assert readings(with_plain(tmp_path, [tensor.name for tensor in ATTENTION], [pattern])) == [
        f"409 ignore list as TensorRT-LLM reads it: expected {FUSED} plain, as stored, found built quantized"
    ]


def test_half_of_a_fused_group_is_found(tmp_path: Path) -> None:
    assert readings(with_plain(tmp_path, [QUERY.name], [QUERY.module])) == [
        f"408 module {FUSED}: expected all of it quantized, or all of it plain, found some of each"
    ]


def mtp_weights() -> list[str]:
    return [module_tensor.name for module in engine_modules(SCHEMA) for module_tensor in module.tensors
            if module_tensor.layer == MTP]  # fmt: skip


def test_a_plain_mtp_layer_needs_the_words_of_each_engine(tmp_path: Path) -> None:
    vllm = [f"re:model\\.layers\\.{MTP}\\..*"]
    found = readings(with_plain(tmp_path / "a", mtp_weights(), vllm))
    assert [line.split(":")[0] for line in found] == [
        "409 ignore list as SGLang reads it",
        "409 ignore list as TensorRT-LLM reads it",
    ]
    everything = [*vllm, r"re:model\.decoder\..*", f"model.layers.{MTP}*"]
    assert readings(with_plain(tmp_path / "b", mtp_weights(), everything)) == []


def test_structure_level_of_verify_has_the_same_findings(tmp_path: Path) -> None:
    source, copy = write_pair(tmp_path, MAKERS["ct-fp8-channel"], put(f"{MTP_KEY.module}.k_scale", torch.ones(1)))
    findings = [str(finding) for finding in compare_structure(source, copy).findings]
    assert f"candidate: tensor {MTP_KEY.module}.k_scale: expected no scale of the KV cache, found one" in findings


def reading(engine: Engine, module: str, **block: Any) -> Reading:
    (found,) = (each for each in engine_modules(SCHEMA) if each.name == module)
    return IgnoreList.of(block).reading(engine, found, SCHEMA)


EXPERTS = UP.module.rsplit(".", 2)[0]
CT = {"quant_method": "compressed-tensors"}


@pytest.mark.parametrize(
    ("engine", "module", "block", "expected"),
    [
        (Engine.VLLM, FUSED, {**CT, "ignore": [FUSED]}, Reading.QUANTIZED),
        (Engine.VLLM, FUSED, {**CT, "ignore": [NAMES[0]]}, Reading.REFUSED),
        (Engine.VLLM, FUSED, {**CT, "ignore": ["self_attn.q_proj", "self_attn.k_proj"]}, Reading.QUANTIZED),
        (Engine.SGLANG, FUSED, {**CT, "ignore": ["q_proj", "k_proj", "v_proj"]}, Reading.PLAIN),
        (Engine.VLLM, EXPERTS, {**CT, "ignore": [rf"re:{EXPERTS}.*"]}, Reading.PLAIN),
        (Engine.TENSORRT_LLM, EXPERTS, {**CT, "ignore": [UP.module]}, Reading.QUANTIZED),
        (Engine.TENSORRT_LLM, EXPERTS, {**CT, "ignore": [f"{EXPERTS}*"]}, Reading.PLAIN),
        (Engine.VLLM, EXPERTS, {"quant_method": "fp8", "modules_to_not_convert": [UP.module]}, Reading.PLAIN),
        (Engine.VLLM, FUSED, {"quant_method": "fp8", "modules_to_not_convert": NAMES[:2]}, Reading.REFUSED),
        (Engine.SGLANG, EXPERTS, {"quant_method": "modelopt", "exclude_modules": [f"{EXPERTS}*"]}, Reading.PLAIN),
        (Engine.VLLM, FUSED, {"quant_method": "modelopt", "exclude_modules": ["*self_attn*"]}, Reading.PLAIN),
        (Engine.VLLM, FUSED, {"quant_method": "modelopt", "exclude_modules": ["lm_head"]}, Reading.QUANTIZED),
        (
            Engine.SGLANG,
            FUSED,
            {**CT, "config_groups": {"a": {"targets": [r"re:.*experts.*"]}}},
            Reading.REFUSED,
        ),
        (Engine.VLLM, FUSED, {**CT, "config_groups": {"a": {"targets": [r"re:.*experts.*"]}}}, Reading.PLAIN),
    ],
)
def test_readings_of_engines(engine: Engine, module: str, block: dict[str, Any], expected: Reading) -> None:
    assert reading(engine, module, **block) is expected
