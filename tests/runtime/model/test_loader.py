"""What the loader takes in, and each way in which it refuses."""

import json

import pytest
import torch
from builders import fp8_channel_config

from converters.config import Glm4MoeConfig
from converters.errors import InputError
from converters.numerics.fp8 import Arithmetic, dequantize_channel, quantize_channel
from converters.schema import DtypePolicy, expand
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.model.loader import ModelLoader, load_model

FP32 = EngineConfig(dtype="float32")
IDS = torch.arange(24).view(2, 12)
EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
MTP_EXPERT = "model.layers.3.mlp.experts.0.gate_proj.weight"


def edit(checkpoint, change) -> None:
    """Change the stored tensors; config.json then announces FP8 if there is any."""
    stored: dict[str, torch.Tensor] = {}
    checkpoint.edit(lambda tensors: (change(tensors), stored.update(tensors)))
    path = checkpoint.folder / "config.json"
    config = json.loads(path.read_text())
    config.pop("quantization_config", None)
    if any(value.dtype is torch.float8_e4m3fn for value in stored.values()):
        config["quantization_config"] = fp8_channel_config([])
    path.write_text(json.dumps(config))


def quantize(tensors: dict[str, torch.Tensor], scale_dtype: torch.dtype = torch.float32) -> None:
    """Replace every quantizable weight by FP8 codes and a scale, MTP layer included."""
    for name in quantizable(tensors):
        codes, scale = quantize_channel(tensors[name], Arithmetic.FLOAT32)
        tensors[name], tensors[f"{name}_scale"] = codes, scale.to(scale_dtype)


def dequantize(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_scale")]:
        weight = name.removesuffix("_scale")
        tensors[weight] = dequantize_channel(tensors[weight], tensors.pop(name))


def quantizable(tensors: dict[str, torch.Tensor]) -> list[str]:
    parts = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
    return [name for name in tensors if name.split(".")[-2] in parts and name.endswith(".weight")]


def all_logits(loaded) -> list[torch.Tensor]:
    hidden = loaded.model(IDS)
    drafted = loaded.mtp.draft(loaded.model.embed(IDS[:, 1:]), hidden[:, :-1])
    return [loaded.model.logits(hidden), loaded.model.logits(drafted)]


@pytest.mark.parametrize("changes", [{}, {"use_qk_norm": False, "attention_bias": False, "n_shared_experts": 2}])
def test_loader_parameters_are_the_schemas_tensors(make_checkpoint, changes):
    folder = make_checkpoint(**changes).folder
    schema = expand(Glm4MoeConfig.from_folder(folder), mtp_copies=False)
    loaded = load_model(folder, FP32).model
    shapes = {name: tuple(parameter.shape) for name, parameter in loaded.named_parameters()}
    assert shapes == {name: tensor.shape for name, tensor in schema.tensors.items()}
    assert not any(parameter.is_meta for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loader_router_and_its_bias_stay_fp32(make_checkpoint, dtype):
    folder = make_checkpoint().folder
    loaded = load_model(folder, EngineConfig(dtype=dtype)).model
    schema = expand(Glm4MoeConfig.from_folder(folder), mtp_copies=False)
    fp32 = {name for name, parameter in loaded.named_parameters() if parameter.dtype is torch.float32}
    routers = {name for name, tensor in schema.tensors.items() if "router" in tensor.spec.role}
    assert {name for name in routers if schema.tensors[name].spec.dtype is DtypePolicy.KEEP_FP32}
    assert fp32 == (routers if dtype == "bfloat16" else set(schema.tensors))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_loader_fp8_checkpoint_equals_its_dequantized_twin_exactly(make_checkpoint, dtype, scale_dtype):
    checkpoint, engine = make_checkpoint(), EngineConfig(dtype=dtype)
    edit(checkpoint, lambda tensors: quantize(tensors, scale_dtype))
    quantized = load_model(checkpoint.folder, engine)
    assert quantized.model.get_parameter(EXPERT).dtype is torch.float8_e4m3fn
    assert quantized.model.get_parameter(f"{EXPERT}_scale").dtype is torch.float32
    edit(checkpoint, dequantize)
    for ours, twin in zip(all_logits(quantized), all_logits(load_model(checkpoint.folder, engine)), strict=True):
        assert torch.equal(ours, twin)


def test_loader_mtp_copies_are_compared_and_not_used(make_checkpoint):
    checkpoint = make_checkpoint()
    plain = all_logits(load_model(checkpoint.folder, FP32))
    names = ("model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight")

    def add_copies(tensors: dict[str, torch.Tensor]) -> None:
        tensors[names[0]] = tensors["model.embed_tokens.weight"].clone()
        tensors[names[1]] = tensors["lm_head.weight"] + 1

    checkpoint.edit(add_copies)
    loaded = load_model(checkpoint.folder, FP32)
    assert loaded.differing_mtp_copies == names[1:]
    assert all(map(torch.equal, all_logits(loaded), plain))
    assert load_model(checkpoint.folder, FP32, with_mtp=False).differing_mtp_copies == ()


def test_loader_fp8_head_copy_as_in_glm_4_5_air_fp8_is_taken_as_different(make_checkpoint):
    checkpoint = make_checkpoint()
    head = "model.layers.3.shared_head.head.weight"

    def add_quantized_copies(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.3.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors[head], tensors[f"{head}_scale"] = quantize_channel(tensors["lm_head.weight"], Arithmetic.FLOAT32)

    edit(checkpoint, add_quantized_copies)
    assert load_model(checkpoint.folder, FP32).differing_mtp_copies == (head,)
    assert load_model(checkpoint.folder, FP32, with_mtp=False).mtp is None


def test_loader_checkpoint_without_mtp_layer_loads_without(make_checkpoint):
    checkpoint = make_checkpoint()
    checkpoint.hf.save_pretrained(checkpoint.folder)
    assert load_model(checkpoint.folder, FP32).mtp is None


def test_loader_fills_and_releases_one_layer_at_a_time(make_checkpoint):
    folder = make_checkpoint().folder
    whole = load_model(folder, FP32).model
    with open_source(folder) as source:
        loader = ModelLoader(source, FP32)
        names = loader.layer_names(2)
        loader.fill(names)
        filled = {name for name, parameter in loader.model.named_parameters() if not parameter.is_meta}
        assert filled == set(names)
        assert all(torch.equal(loader.model.get_parameter(name), whole.get_parameter(name)) for name in names)
        loader.release(names)
        assert all(parameter.is_meta for parameter in loader.model.parameters())
        covered = [name for layer in (None, 0, 1, 2, 3) for name in loader.layer_names(layer)]
        assert sorted(covered) == sorted(loader.parameter_names)


def drop(*names: str):
    return lambda tensors: [tensors.pop(name) for name in names]


def put(name: str, value: torch.Tensor):
    return lambda tensors: tensors.update({name: value})


def quantize_and(change):
    return lambda tensors: (quantize(tensors), change(tensors))


INCOMPLETE = (
    "expected in the checkpoint, as its config says, found none{}. "
    "The checkpoint is incomplete, or its config.json is another model's."
)
BROKEN = {
    "missing_expert": (drop(EXPERT), f"tensor {EXPERT}: {INCOMPLETE.format('')}"),
    "missing_two": (drop(EXPERT, "model.norm.weight"), f"tensor {EXPERT}: {INCOMPLETE.format(', nor 1 other')}"),
    "missing_mtp_expert": (drop(MTP_EXPERT), f"tensor {MTP_EXPERT}: {INCOMPLETE.format('')}"),
    "missing_router_bias": (
        drop("model.layers.1.mlp.gate.e_score_correction_bias"),
        f"tensor model.layers.1.mlp.gate.e_score_correction_bias: {INCOMPLETE.format('')}",
    ),
    "unknown_name": (
        put("model.layers.1.mlp.surprise.weight", torch.ones(2)),
        "tensor 'model.layers.1.mlp.surprise.weight': expected a GLM-4 MoE tensor name, "
        "found one that is not in the table of tensors",
    ),
    "layer_too_many": (
        put("model.layers.9.input_layernorm.weight", torch.ones(32)),
        "tensor 'model.layers.9.input_layernorm.weight': expected a tensor of this model, found none in its config",
    ),
    "wrong_shape": (
        put("model.norm.weight", torch.ones(31)),
        "tensor model.norm.weight: expected shape [32], from config.json, found [31]",
    ),
    "integer_weight": (
        put(EXPERT, torch.ones(24, 32, dtype=torch.int8)),
        f"tensor {EXPERT}: expected one of BF16, F16, F32, found I8",
    ),
    "missing_scale": (
        quantize_and(drop(f"{EXPERT}_scale")),
        f"tensor {EXPERT}: expected a scale beside its codes, found none. "
        "Without it the weights cannot be restored; fetch the checkpoint again.",
    ),
    "scale_of_an_unquantized_weight": (
        put(f"{EXPERT}_scale", torch.ones(24, 1)),
        f"tensor {EXPERT}_scale: expected no scale, for its weight is not quantized, found one",
    ),
    "scale_without_weight": (
        quantize_and(drop(EXPERT)),
        f"tensor {EXPERT}: expected parts of a declared scheme (fp8 per channel), found weight_scale F32 [24, 1]",
    ),
    "scale_of_wrong_shape": (
        quantize_and(put(f"{EXPERT}_scale", torch.ones(1, 1))),
        f"tensor {EXPERT}: expected parts of a declared scheme (fp8 per channel), "
        "found weight_scale F32 [1, 1], weight F8_E4M3 [24, 32]",
    ),
    "quantized_embedding": (
        lambda tensors: tensors.update(
            {
                "model.embed_tokens.weight": tensors["model.embed_tokens.weight"].to(torch.float8_e4m3fn),
                "model.embed_tokens.weight_scale": torch.ones(96, 1),
            }
        ),
        "tensor model.embed_tokens.weight: expected an unquantized tensor, found F8_E4M3",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_loader_broken_checkpoint_is_refused_with_the_tensors_name(make_checkpoint, fault):
    change, message = BROKEN[fault]
    checkpoint = make_checkpoint()
    edit(checkpoint, change)
    with pytest.raises(InputError) as error:
        load_model(checkpoint.folder, FP32)
    assert str(error.value) == message


def test_loader_mtp_layer_that_the_config_denies_is_refused(make_checkpoint):
    checkpoint = make_checkpoint()
    path = checkpoint.folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_nextn_predict_layers": 0, "num_mtp_layers": 0}))
    with pytest.raises(InputError, match=r"^tensor 'model\.layers\.3\..*expected a tensor of this model"):
        load_model(checkpoint.folder, FP32)
