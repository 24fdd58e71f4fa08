"""Structure level: a faithful conversion has no finding, every planted defect has exactly the right one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import fp8_channel_config, ignored_modules, random_tensors, small_config, write_checkpoint
from safetensors.torch import save_file

from converters.compare import Outcome, StructureReport, compare_structure
from converters.config import Glm4MoeConfig
from converters.errors import ConfigError
from converters.findings import Severity
from converters.quant.policy import is_quantized
from converters.schema import ModelSchema, Role, Tensor, expand

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def schema_of(config: Config) -> ModelSchema:
    return expand(Glm4MoeConfig.from_hf(config))


def pick(role: Role, part: str, layer: int | None = None, expert: int | None = None) -> Tensor:
    return schema_of(small_config()).tensor(role, part, layer, expert)


GATE = pick(Role.EXPERT, "gate_proj.weight", 1, 2)
ROUTER = pick(Role.ROUTER, "gate.weight", 1)
BIAS = pick(Role.ROUTER_BIAS, "gate.e_score_correction_bias", 1)
NORM = pick(Role.NORM, "norm.weight")
SCALE = f"{GATE.module}.weight_scale"


def plain() -> tuple[Tensors, Config]:
    config = small_config()
    return random_tensors(schema_of(config)), config


def fp8() -> tuple[Tensors, Config]:
    """Quantize by torch alone: the codes do not matter here, only names, shapes and dtypes."""
    tensors, config = plain()
    schema = schema_of(config)
    for name, tensor in schema.tensors.items():
        if is_quantized(tensor):
            tensors[name] = tensors[name].to(torch.float8_e4m3fn)
            tensors[f"{tensor.module}.weight_scale"] = torch.ones(tensor.shape[0], 1)
    config["quantization_config"] = fp8_channel_config(ignored_modules(schema))
    return tensors, config


def compare(
    tmp_path: Path, candidate: tuple[Tensors, Config], source: tuple[Tensors, Config] | None = None
) -> StructureReport:
    folders = tmp_path / "source", tmp_path / "candidate"
    for folder, (tensors, config) in zip(folders, (source or plain(), candidate), strict=True):
        write_checkpoint(folder, tensors, config)
    return compare_structure(*folders)


def messages(report: StructureReport) -> list[str]:
    return [f"{finding.severity}: {finding}" for finding in report.findings]


def test_same_checkpoint_has_no_finding_and_every_tensor_is_the_same(tmp_path: Path) -> None:
    report = compare(tmp_path, plain())
    assert report.findings == ()
    assert report.outcomes == {Outcome.SAME: len(plain()[0])}
    assert (report.scheme, report.mtp, report.config_changes) == ("identity", "present", ())


def test_fp8_copy_has_no_finding_and_all_gemm_weights_are_quantized(tmp_path: Path) -> None:
    report = compare(tmp_path, fp8())
    tensors = schema_of(small_config()).tensors.values()
    quantized = sum(map(is_quantized, tensors))
    assert messages(report) == []
    assert report.outcomes == {Outcome.QUANTIZED: quantized, Outcome.SAME: len(tensors) - quantized}
    assert report.scheme == "fp8"
    assert [key for key, _, _ in report.config_changes] == ["quantization_config"]


def test_dequantized_copy_is_the_way_back(tmp_path: Path) -> None:
    report = compare(tmp_path, plain(), source=fp8())
    assert messages(report) == []
    assert report.scheme == "dequantized"
    assert report.outcomes[Outcome.DEQUANTIZED] == sum(map(is_quantized, schema_of(small_config()).tensors.values()))


def test_cast_that_the_config_declares_is_fine_and_keeps_the_bias(tmp_path: Path) -> None:
    tensors, config = plain()
    cast = {name: value.float() for name, value in tensors.items()}
    report = compare(tmp_path, (cast, {**config, "torch_dtype": "float32"}))
    assert messages(report) == []
    assert report.scheme == "cast"
    assert report.config_changes == (("torch_dtype", "bfloat16", "float32"),)


def test_config_respelled_by_transformers_5_is_no_change(tmp_path: Path) -> None:
    tensors, config = plain()
    for key in ("rope_theta", "partial_rotary_factor", "rope_scaling"):
        del config[key]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    config["transformers_version"] = "5.23.0"
    assert messages(compare(tmp_path, (tensors, config))) == []


def test_wider_tensor_cast_to_the_dtype_of_both_configs_is_a_warning(tmp_path: Path) -> None:
    source, config = plain()
    source[ROUTER.name] = source[ROUTER.name].float()
    assert messages(compare(tmp_path, plain(), source=(source, config))) == [
        f"warn: candidate: tensor {ROUTER.name}: expected F32, as in the source, found BF16, the dtype of both configs"
    ]


def drop(name: str) -> Callable[[Tensors, Config], None]:
    def plant(tensors: Tensors, _: Config) -> None:
        del tensors[name]

    return plant


def put(name: str, value: torch.Tensor) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: tensors.update({name: value})


def set_key(key: str, value: Any) -> Callable[[Tensors, Config], None]:
    return lambda tensors, config: config.update({key: value})


FP8 = torch.float8_e4m3fn
FAILURES = {
    "missing tensor": (
        drop(GATE.name),
        plain,
        f"tensor {GATE.name}: expected BF16 or F16 or F32 [24, 48], found nothing",
    ),
    "extra tensor": (
        put("model.layers.1.mlp.experts.4.up_proj.weight", torch.zeros(24, 48)),
        plain,
        "tensor model.layers.1.mlp.experts.4.up_proj.weight: expected no such tensor, "
        "found a tensor its config does not ask for",
    ),
    "unknown tensor": (
        put("model.layers.1.mlp.wat", torch.zeros(3)),
        plain,
        "tensor model.layers.1.mlp.wat: expected no such tensor, found a name that is not in the table",
    ),
    "transposed": (
        put(GATE.name, torch.zeros(48, 24, dtype=torch.bfloat16)),
        plain,
        f"tensor {GATE.name}: expected BF16 or F16 or F32 [24, 48], found BF16 [48, 24]",
    ),
    "bias cast": (
        put(BIAS.name, torch.zeros(4, dtype=torch.bfloat16)),
        plain,
        f"tensor {BIAS.name}: expected F32, as in the source: a rounded correction bias changes the choice of experts, "
        "found BF16",
    ),
    "undeclared cast": (
        put(NORM.name, torch.zeros(48, dtype=torch.float16)),
        plain,
        f"tensor {NORM.name}: expected BF16 as in the source, or BF16 as in its config, found F16",
    ),
    "scale missing": (drop(SCALE), fp8, f"tensor {SCALE}: expected BF16 or F16 or F32 [24, 1], found nothing"),
    "scale of another shape": (
        put(SCALE, torch.ones(24)),
        fp8,
        f"tensor {SCALE}: expected BF16 or F16 or F32 [24, 1], found F32 [24]",
    ),
    "weight left unquantized": (
        put(GATE.name, torch.zeros(24, 48, dtype=torch.bfloat16)),
        fp8,
        f"tensor {GATE.name}: expected F8_E4M3 [24, 48], found BF16 [24, 48]",
    ),
    "router quantized": (
        put(ROUTER.name, torch.zeros(4, 48).to(FP8)),
        fp8,
        f"tensor {ROUTER.name}: expected BF16 or F16 or F32 [4, 48], found F8_E4M3 [4, 48]",
    ),
    "codes without a config": (
        put(GATE.name, torch.zeros(24, 48).to(FP8)),
        plain,
        f"tensor {GATE.name}: expected BF16 or F16 or F32 [24, 48], found F8_E4M3 [24, 48]",
    ),
    "config value": (
        set_key("routed_scaling_factor", 1.0),
        plain,
        "config.json: routed_scaling_factor: expected 2.5, found 1.0",
    ),
    "norm epsilon": (set_key("rms_norm_eps", 1e-6), plain, "config.json: rms_norm_eps: expected 1e-05, found 1e-06"),
    "end tokens": (set_key("eos_token_id", 0), plain, "config.json: eos_token_id: expected (0, 1, 2), found (0,)"),
}


@pytest.mark.parametrize("defect", FAILURES)
def test_planted_defect_is_the_one_failure_found(tmp_path: Path, defect: str) -> None:
    plant, make, expected = FAILURES[defect]
    tensors, config = make()
    plant(tensors, config)
    report = compare(tmp_path, (tensors, config))
    assert messages(report) == [f"fail: candidate: {expected}"]
    assert sum(report.outcomes.values()) == len(plain()[0])


def test_ignored_module_that_is_quantized_fails(tmp_path: Path) -> None:
    """compressed-tensors #712: an engine builds an ignored module without a scale and reads its codes as numbers."""
    tensors, config = fp8()
    config["quantization_config"]["ignore"].append(GATE.module)
    report = compare(tmp_path, (tensors, config))
    assert messages(report) == [
        f"fail: candidate: tensor {SCALE}: expected no such tensor, found a tensor its config does not ask for",
        f"fail: candidate: tensor {GATE.name}: expected BF16 or F16 or F32 [24, 48], found F8_E4M3 [24, 48]",
    ]


def test_ignore_pattern_covers_the_modules_it_matches(tmp_path: Path) -> None:
    tensors, config = fp8()
    config["quantization_config"]["ignore"].append(r"re:.*experts\.2\..*")
    tensors.pop(SCALE)
    tensors[GATE.name] = torch.zeros(24, 48, dtype=torch.bfloat16)
    report = compare(tmp_path, (tensors, config))
    assert not [line for line in messages(report) if GATE.module in line]


def test_router_that_ignore_forgets_is_a_warning(tmp_path: Path) -> None:
    tensors, config = fp8()
    config["quantization_config"]["ignore"].remove(ROUTER.module)
    assert messages(compare(tmp_path, (tensors, config))) == [
        f"warn: candidate: quantization_config.ignore: expected {ROUTER.module}, which is not quantized, "
        "found no such entry"
    ]


def without_mtp(**changes: Any) -> tuple[Tensors, Config]:
    tensors, config = plain()
    names = expand(Glm4MoeConfig.from_hf(config), mtp=False).tensors
    return {name: tensors[name] for name in names}, {**config, **changes}


def test_mtp_layer_dropped_but_announced_fails(tmp_path: Path) -> None:
    report = compare(tmp_path, without_mtp())
    assert messages(report) == [
        "fail: candidate: MTP layer: expected present, or num_nextn_predict_layers 0, "
        "found dropped, but still announced"
    ]
    assert report.mtp == "dropped"
    assert report.outcomes[Outcome.DROPPED] == len(plain()[0]) - len(without_mtp()[0])


def test_mtp_layer_dropped_and_declared_is_a_warning(tmp_path: Path) -> None:
    report = compare(tmp_path, without_mtp(num_nextn_predict_layers=0))
    assert messages(report) == [
        "warn: candidate: MTP layer: expected present, as in the source, found dropped, as its config declares"
    ]


def test_mtp_layer_that_the_source_lost_is_said_of_both(tmp_path: Path) -> None:
    report = compare(tmp_path, without_mtp(), source=without_mtp())
    assert [finding.severity for finding in report.findings] == [Severity.WARN, Severity.WARN]
    assert report.mtp == "absent"


def test_mtp_layer_without_its_private_embedding_fails(tmp_path: Path) -> None:
    tensors, config = plain()
    copies = [pick(Role.MTP_EMBEDDING, "embed_tokens.weight", 3).name, pick(Role.MTP_HEAD, "head.weight", 3).name]
    for name in copies:
        tensors.pop(name)
    assert messages(compare(tmp_path, (tensors, config))) == [
        f"fail: candidate: tensor {name}: expected as in the source, found nothing" for name in copies
    ]


def test_defect_of_the_source_is_said_of_the_source(tmp_path: Path) -> None:
    tensors, config = plain()
    tensors.pop(GATE.name)
    report = compare(tmp_path, plain(), source=(tensors, config))
    assert messages(report)[0] == (
        f"fail: source: tensor {GATE.name}: expected BF16 or F16 or F32 [24, 48], found nothing"
    )


@pytest.mark.parametrize(("name", "severity"), [("generation_config.json", "fail"), ("LICENSE", "warn")])
def test_lost_file_fails_only_if_engines_read_it(tmp_path: Path, name: str, severity: str) -> None:
    for folder in ("source", "candidate"):
        write_checkpoint(tmp_path / folder, *plain())
    (tmp_path / "candidate" / name).unlink()
    report = compare_structure(tmp_path / "source", tmp_path / "candidate")
    assert messages(report) == [f"{severity}: candidate: {name}: expected as in the source, found no such file"]


def test_mtp_file_that_the_index_forgot_is_a_warning(tmp_path: Path) -> None:
    """SGLang #17166: a GLM-4.7 release had such a file; engines that follow the index never see the layer."""
    tensors, config = plain()
    write_checkpoint(tmp_path / "source", tensors, config)
    body = without_mtp()[0]
    folder = write_checkpoint(tmp_path / "candidate", body, config)
    save_file({name: tensors[name] for name in tensors.keys() - body.keys()}, folder / "mtp.safetensors")
    report = compare_structure(tmp_path / "source", folder)
    assert messages(report) == [
        "warn: candidate: index: expected every file that belongs to the checkpoint, "
        "found mtp.safetensors is not in the index; its tensors were taken in."
    ]
    assert report.mtp == "present"


def test_changed_file_is_a_warning(tmp_path: Path) -> None:
    for folder in ("source", "candidate"):
        write_checkpoint(tmp_path / folder, *plain())
        (tmp_path / folder / "chat_template.jinja").write_text(folder)
    report = compare_structure(tmp_path / "source", tmp_path / "candidate")
    assert messages(report) == [
        "warn: candidate: chat_template.jinja: expected the bytes of the source, found other bytes"
    ]


def test_key_that_this_tool_does_not_read_is_a_warning(tmp_path: Path) -> None:
    tensors, config = plain()
    report = compare(tmp_path, (tensors, {**config, "use_cache": False}))
    assert messages(report) == ["warn: candidate: config.json: use_cache: expected True, found False"]


def test_failures_stand_before_warnings(tmp_path: Path) -> None:
    tensors, config = plain()
    tensors.pop(GATE.name)
    report = compare(tmp_path, (tensors, {**config, "use_cache": False}))
    assert [finding.severity for finding in report.findings] == [Severity.FAIL, Severity.WARN]


@pytest.mark.parametrize(
    ("path", "value", "subject"),
    [
        (("quant_method",), "awq", "quant_method"),
        (("config_groups",), {}, "config_groups"),
        (("config_groups", "group_0", "weights", "num_bits"), 4, "config_groups.group_0.weights"),
        (("config_groups", "group_0", "targets"), "Linear", "config_groups.group_0.targets"),
        (("ignore",), ["re:("], "ignore 're:('"),
    ],
)
def test_quantization_that_is_not_implemented_is_refused_by_name(
    tmp_path: Path, path: tuple[str, ...], value: Any, subject: str
) -> None:
    tensors, config = fp8()
    block = json.loads(json.dumps(config["quantization_config"]))
    target = block
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(ConfigError) as caught:
        compare(tmp_path, (tensors, {**config, "quantization_config": block}))
    assert caught.value.subject == f"config.json: quantization_config.{subject}"
