"""Ignore lists: every engine reads every module of every policy as it lies on disk."""

import itertools

import pytest
import torch
from builders import small_config
from engine_matchers import (
    EngineRefusal,
    compressed_tensors_group,
    engine_modules,
    sglang_fp8_group,
    sglang_modelopt_group,
    tensorrt_llm_group,
    transformers_fp8_group,
    vllm_fp8_group,
    vllm_modelopt_group,
)

from converters.config import Glm4MoeConfig
from converters.formats.compressed_tensors import Group, quantization_config
from converters.formats.ignore import (
    SGLANG_MTP,
    compressed_tensors_ignore,
    deepseek_ignore,
    modelopt_ignore,
    role_targets,
)
from converters.quant.policy import Policy, assign, parse_schemes
from converters.quant.scheme import MtpPolicy, Preset
from converters.schema import ModelSchema, Role, expand

# layers 1 and 1x, so that a name is the beginning of others; the MTP layer is 12
SCHEMA = expand(Glm4MoeConfig.from_hf(small_config(num_hidden_layers=12, n_routed_experts=2, first_k_dense_replace=2)))
IGNORES = {
    "nothing": (),
    "a layer": (r"model\.layers\.1\..*",),
    "experts of a layer": (r"model\.layers\.3\.mlp\.experts\..*",),
    "all dense down": (r"model\.layers\.\d+\.mlp\.down_proj",),
    "one attention": (r"model\.layers\.11\.self_attn\..*",),
    "o_proj": (r".*\.o_proj",),
    "all shared experts": (r".*\.shared_experts\..*",),
}
POLICIES = list(itertools.product(Preset, MtpPolicy, IGNORES))


def assigned(preset: Preset, mtp: MtpPolicy, ignore: str, scheme: str = "fp8") -> tuple[ModelSchema, dict[str, str]]:
    found = assign(SCHEMA, Policy(parse_schemes(scheme, preset), mtp, IGNORES[ignore]))
    if mtp is MtpPolicy.DROP:
        return ModelSchema(SCHEMA.config, has_mtp=False, has_mtp_copies=False), found
    return SCHEMA, found


def expected(weights: tuple[str, ...], found: dict[str, str]) -> int | None:
    (is_quantized,) = {weight in found for weight in weights}
    return 0 if is_quantized else None


@pytest.mark.parametrize(("preset", "mtp", "ignore"), POLICIES)
def test_engines_read_compressed_tensors_lists(preset: Preset, mtp: MtpPolicy, ignore: str) -> None:
    schema, found = assigned(preset, mtp, ignore)
    config = quantization_config([Group("fp8")], compressed_tensors_ignore(schema, found))
    modules = list(engine_modules(schema))
    assert {weight for module in modules for weight in module.weights} >= found.keys()
    for module in modules:
        wanted = expected(module.weights, found)
        assert compressed_tensors_group(module, config, "exact", strict=False) == wanted, module
        assert tensorrt_llm_group(module, config["ignore"]) == wanted, module
    for module in engine_modules(schema, SGLANG_MTP):
        for style in ("dotted", "contains"):
            assert compressed_tensors_group(module, config, style, strict=True) == expected(module.weights, found)


@pytest.mark.parametrize(("preset", "mtp", "ignore"), POLICIES)
def test_engines_read_deepseek_lists(preset: Preset, mtp: MtpPolicy, ignore: str) -> None:
    schema, found = assigned(preset, mtp, ignore)
    entries = deepseek_ignore(schema, found)
    for module in engine_modules(schema):
        wanted = expected(module.weights, found)
        assert vllm_fp8_group(module, entries) == wanted, module
        assert tensorrt_llm_group(module, entries) == wanted, module
        for weight in module.weights:
            assert transformers_fp8_group(weight, entries) == wanted, weight
    for module in engine_modules(schema, SGLANG_MTP):
        assert sglang_fp8_group(module, entries) == expected(module.weights, found), module


@pytest.mark.parametrize(("preset", "mtp", "ignore"), POLICIES)
def test_engines_read_modelopt_lists(preset: Preset, mtp: MtpPolicy, ignore: str) -> None:
    schema, found = assigned(preset, mtp, ignore)
    entries = modelopt_ignore(schema, found)
    for module in engine_modules(schema):
        wanted = expected(module.weights, found)
        assert vllm_modelopt_group(module, entries) == wanted, module
        assert tensorrt_llm_group(module, entries) == wanted, module
    for module in engine_modules(schema, SGLANG_MTP):
        wanted = expected(module.weights, found)
        assert sglang_modelopt_group(module, entries, is_nvfp4=False) == wanted, module
        if mtp in (MtpPolicy.KEEP, MtpPolicy.DROP):
            assert sglang_modelopt_group(module, entries, is_nvfp4=True) == wanted, module


@pytest.mark.parametrize("mtp", MtpPolicy)
@pytest.mark.parametrize("scheme", ["experts=nvfp4,attention=fp8", "experts=nvfp4,shared-experts=fp8,dense=fp8"])
def test_engines_read_the_groups_of_several_schemes(scheme: str, mtp: MtpPolicy) -> None:
    roles = parse_schemes(scheme, None)
    found = assign(SCHEMA, Policy(roles, mtp))
    schema = SCHEMA if mtp is not MtpPolicy.DROP else ModelSchema(SCHEMA.config, False, False)
    names = list(dict.fromkeys(found.values()))
    groups = [
        Group(name, 0, tuple(role_targets(schema, {role for role, own in roles.items() if own == name})))
        for name in names
    ]
    config = quantization_config(groups, compressed_tensors_ignore(schema, found))
    assert config["format"] == "mixed-precision"

    def wanted(weights: tuple[str, ...]) -> int | None:
        (own,) = {found.get(weight) for weight in weights}
        return None if own is None else names.index(own)

    for module in engine_modules(schema):
        assert compressed_tensors_group(module, config, "exact", strict=False) == wanted(module.weights), module
    for module in engine_modules(schema, SGLANG_MTP):
        assert compressed_tensors_group(module, config, "dotted", strict=True) == wanted(module.weights), module


@pytest.mark.parametrize(("mtp", "ignore"), list(itertools.product(MtpPolicy, IGNORES)))
def test_the_library_reads_its_own_lists(mtp: MtpPolicy, ignore: str) -> None:
    """compressed-tensors' matcher, on official names: exactly the quantized linear modules match."""
    from compressed_tensors.utils.match import is_match

    schema, found = assigned(Preset.ALL_LINEAR, mtp, ignore)
    entries = compressed_tensors_ignore(schema, found)
    linear = torch.nn.Linear(1, 1)
    matched = {
        name
        for name, tensor in schema.tensors.items()
        if len(tensor.shape) == 2 and is_match(tensor.module, linear, ["Linear"], entries)
    }
    assert matched == found.keys()


def test_lists_of_the_default_policies_read_as_the_reference_has_them() -> None:
    gates = [f"model.layers.{layer}.mlp.gate" for layer in range(2, 12)]
    schema, found = assigned(Preset.ALL_LINEAR, MtpPolicy.QUANTIZE, "nothing")
    own = ["mlp.gate", "eh_proj", "embed_tokens", "shared_head.head"]
    exact = ["model.embed_tokens", *gates, *(f"model.layers.12.{name}" for name in own), "lm_head"]
    assert compressed_tensors_ignore(schema, found) == deepseek_ignore(schema, found) == exact
    assert modelopt_ignore(schema, found) == [*exact, "model.layers.12.head"]
    schema, found = assigned(Preset.ALL_LINEAR, MtpPolicy.KEEP, "nothing")
    body = ["model.embed_tokens", *gates, "lm_head"]
    regex = [r"re:model\.layers\.12\..*", r"re:model\.decoder\..*"]
    assert compressed_tensors_ignore(schema, found) == [*body, *regex, "model.layers.12*"]
    assert modelopt_ignore(schema, found) == [*body, "model.layers.12*", "model.decoder*"]


def test_whole_modules_are_globs_for_modelopt_and_patterns_for_experts_elsewhere() -> None:
    schema, found = assigned(Preset.ALL_LINEAR, MtpPolicy.KEEP, "a layer")
    assert {"model.layers.1.self_attn*", "model.layers.1.mlp*"} <= set(modelopt_ignore(schema, found))
    schema, found = assigned(Preset.ALL_LINEAR, MtpPolicy.KEEP, "experts of a layer")
    entries = compressed_tensors_ignore(schema, found)
    assert {r"re:model\.layers\.3\.mlp\.experts\..*", "model.layers.3.mlp.experts*"} <= set(entries)
    assert "model.layers.3.mlp.experts" in deepseek_ignore(schema, found)


@pytest.mark.parametrize("role", [Role.ATTENTION, Role.EXPERT])
def test_matchers_see_a_list_that_is_wrong(role: Role) -> None:
    """The matchers of this test can fail: one entry less, and an engine reads what is not there."""
    found = {name: "fp8" for name, tensor in SCHEMA.tensors.items() if tensor.spec.role is Role.DENSE_MLP}
    entries = compressed_tensors_ignore(SCHEMA, found)
    gone = {tensor.module for tensor in SCHEMA.tensors.values() if tensor.spec.role is role and tensor.layer == 5}
    spelled = {"re:model\\.layers\\.5\\.mlp\\.experts\\..*"} if role is Role.EXPERT else {min(gone)}
    config = quantization_config([Group("fp8")], [entry for entry in entries if entry not in spelled])
    misread = []
    for module in engine_modules(SCHEMA):
        try:
            if compressed_tensors_group(module, config, "exact", strict=False) != expected(module.weights, found):
                misread.append(module.layer)
        except EngineRefusal:
            misread.append(module.layer)
    assert misread == [5]
