"""The table of tensors against published totals and against what transformers saves."""

import json
from pathlib import Path
from typing import Any

import pytest
from builders import small_config
from hypothesis import given, settings
from hypothesis import strategies as st

from converters.config import Glm4MoeConfig
from converters.errors import InputError
from converters.schema import COMPANIONS, TABLE, DtypePolicy, Role, expand, parse, schema_for_parsed

# model, MTP copies -> tensors, parameters, bytes with an fp32 correction bias and bf16 otherwise: the Hub's own totals
OFFICIAL = {
    ("GLM-4.5", True): (44_691, 358_337_791_296, 716_675_611_392),
    ("GLM-4.5-Air", True): (18_329, 110_468_824_832, 220_937_661_440),
    ("GLM-4.6", False): (44_689, 356_785_898_816, 713_571_826_432),
    ("GLM-4.7", True): (44_691, 358_337_791_296, 716_675_611_392),
}
MAIN = {"GLM-4.5": (44_189, 352_797_829_024), "GLM-4.5-Air": (17_925, 106_852_251_264)}


def config_of(fixtures_dir: Path, model: str) -> Glm4MoeConfig:
    return Glm4MoeConfig.from_hf(json.loads((fixtures_dir / "configs" / f"{model}.json").read_text()))


@pytest.mark.parametrize(("model", "copies"), OFFICIAL)
def test_expanded_table_reproduces_the_published_totals(fixtures_dir: Path, model: str, copies: bool) -> None:
    tensors = expand(config_of(fixtures_dir, model), mtp_copies=copies).tensors.values()
    num_bytes = sum(t.numel * (4 if t.spec.dtype is DtypePolicy.KEEP_FP32 else 2) for t in tensors)
    assert (len(tensors), sum(t.numel for t in tensors), num_bytes) == OFFICIAL[model, copies]


@pytest.mark.parametrize("model", MAIN)
def test_main_model_without_mtp_has_the_published_size(fixtures_dir: Path, model: str) -> None:
    tensors = expand(config_of(fixtures_dir, model), mtp=False).tensors.values()
    assert (len(tensors), sum(t.numel for t in tensors)) == MAIN[model]


def test_layer_46_is_the_mtp_layer_of_air_and_an_ordinary_one_of_the_others(fixtures_dir: Path) -> None:
    air = expand(config_of(fixtures_dir, "GLM-4.5-Air"))
    large = expand(config_of(fixtures_dir, "GLM-4.5"))
    name = "model.layers.46.eh_proj.weight"
    assert air.tensors[name].shape == (4096, 8192)
    assert name not in large.tensors
    assert (air.mtp_layer, large.mtp_layer) == (46, 92)


def test_every_name_parses_back_to_its_tensor(fixtures_dir: Path) -> None:
    for (model, copies), (count, _, _) in OFFICIAL.items():
        schema = expand(config_of(fixtures_dir, model), mtp_copies=copies)
        assert len(schema.tensors) == count
        for name, tensor in schema.tensors.items():
            parsed = parse(name)
            assert (parsed.spec, parsed.layer, parsed.expert, parsed.companion) == (
                tensor.spec,
                tensor.layer,
                tensor.expert,
                None,
            )
            assert schema.tensor(tensor.spec.role, tensor.spec.part, tensor.layer, tensor.expert) is tensor


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.03.input_layernorm.weight",
        "model.layers.-1.input_layernorm.weight",
        "model.layers.x.input_layernorm.weight",
        "model.layers.\u0663.input_layernorm.weight",
        "model.layers.3.mlp.gate.bias",
        "model.layers.3.mlp.experts.gate_proj.weight",
        "model.layers.3.mlp.experts.1.2.gate_proj.weight",
        "layers.3.input_layernorm.weight",
        "model.layers.3.self_attn.o_proj.bias",
        "",
    ],
)
def test_name_outside_the_table_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="not in the table of tensors"):
        parse(name)


def test_companion_names_its_weight() -> None:
    parsed = parse("model.layers.4.mlp.experts.12.up_proj.weight_scale")
    assert (parsed.spec.role, parsed.layer, parsed.expert, parsed.companion) == (Role.EXPERT, 4, 12, "weight_scale")


def test_locate_refuses_a_tensor_that_the_config_does_not_have() -> None:
    schema = expand(Glm4MoeConfig.from_hf(small_config()))
    with pytest.raises(InputError, match="none in its config"):
        schema.locate("model.layers.9.input_layernorm.weight")
    with pytest.raises(InputError, match="none in its config"):
        schema.locate("model.layers.1.mlp.experts.4.gate_proj.weight")
    with pytest.raises(InputError, match="none in its config"):
        schema.locate("model.layers.0.mlp.gate.weight")


def test_mtp_style_is_read_from_the_names() -> None:
    config = Glm4MoeConfig.from_hf(small_config())
    for mtp, copies in ((True, True), (True, False), (False, False)):
        names = list(expand(config, mtp=mtp, mtp_copies=copies).tensors)
        schema = schema_for_parsed(config, map(parse, names))
        assert (schema.has_mtp, schema.has_mtp_copies) == (mtp, copies)


def test_table_is_consistent() -> None:
    for spec in TABLE:
        assert spec.tp_dim is None or spec.tp_dim < len(spec.shape), spec.name
        assert (spec.dtype is DtypePolicy.QUANTIZABLE) <= (len(spec.shape) == 2), spec.name
        assert spec.name.rsplit(".", 1)[1] not in COMPANIONS
    groups = {(spec.fuse.group, spec.role): set() for spec in TABLE if spec.fuse}
    for spec in TABLE:
        if spec.fuse:
            groups[spec.fuse.group, spec.role].add(spec.fuse.position)
    assert groups == {
        ("qkv_proj", Role.ATTENTION): {0, 1, 2},
        ("qkv_proj", Role.ATTENTION_BIAS): {0, 1, 2},
        ("gate_up_proj", Role.DENSE_MLP): {0, 1},
        ("gate_up_proj", Role.EXPERT): {0, 1},
        ("gate_up_proj", Role.SHARED_EXPERT): {0, 1},
    }


@st.composite
def random_configs(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from([1, 2]))
    layers = draw(st.integers(1, 12))
    return small_config(
        num_hidden_layers=layers,
        first_k_dense_replace=draw(st.integers(0, layers)),
        hidden_size=draw(st.sampled_from([8, 24])),
        intermediate_size=draw(st.sampled_from([8, 20])),
        moe_intermediate_size=draw(st.sampled_from([4, 12])),
        n_routed_experts=4 * groups,
        n_group=groups,
        topk_group=draw(st.integers(1, groups)),
        n_shared_experts=draw(st.integers(1, 2)),
        num_attention_heads=draw(st.sampled_from([2, 4])),
        head_dim=draw(st.sampled_from([4, 8])),
        use_qk_norm=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
    )


@settings(max_examples=25, deadline=None)
@given(raw=random_configs())
def test_table_equals_what_transformers_saves_plus_the_mtp_layer(raw: dict[str, Any]) -> None:
    import tempfile

    import transformers
    from safetensors import safe_open

    with tempfile.TemporaryDirectory() as folder:
        model = transformers.Glm4MoeForCausalLM(transformers.Glm4MoeConfig(**raw))
        model.save_pretrained(folder)
        with safe_open(f"{folder}/model.safetensors", "pt") as file:
            saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    config = Glm4MoeConfig.from_hf(raw)
    main = {name: tensor.shape for name, tensor in expand(config, mtp=False).tensors.items()}
    assert main == saved
    last = config.num_hidden_layers
    mtp = {n: t for n, t in expand(config).tensors.items() if t.layer == last}
    own = {"eh_proj.weight", "enorm.weight", "hnorm.weight", "norm.weight", "embed_tokens.weight", "head.weight"}
    assert own <= {tensor.spec.part for tensor in mtp.values()}
    assert len(main) + len(mtp) == len(expand(config).tensors)


@pytest.mark.parametrize("companion", sorted(COMPANIONS))
def test_companion_of_every_format_names_its_weight(companion: str) -> None:
    parsed = parse(f"model.layers.46.self_attn.o_proj.{companion}")
    assert (parsed.spec.part, parsed.layer, parsed.expert, parsed.companion) == ("o_proj.weight", 46, None, companion)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("self_attn.k_scale", "k_proj.weight"),
        ("self_attn.v_scale", "v_proj.weight"),
        ("self_attn.k_proj.k_scale", "k_proj.weight"),
        ("self_attn.v_proj.output_scale", "v_proj.weight"),
    ],
)
def test_scale_of_the_kv_cache_belongs_to_its_projection(name: str, part: str) -> None:
    parsed = parse(f"model.layers.4.{name}")
    assert (parsed.spec.part, parsed.layer, parsed.companion) == (part, 4, name.rsplit(".", 1)[1])


def test_routers_without_correction_bias_are_read_from_the_names() -> None:
    config = Glm4MoeConfig.from_hf(small_config())
    full = list(expand(config).tensors)
    bare = [name for name in full if parse(name).spec.role is not Role.ROUTER_BIAS]
    assert list(schema_for_parsed(config, map(parse, bare)).tensors) == bare
    assert schema_for_parsed(config, map(parse, full)).has_router_bias
    dense = Glm4MoeConfig.from_hf(small_config(first_k_dense_replace=3, num_nextn_predict_layers=0))
    assert schema_for_parsed(dense, map(parse, expand(dense).tensors)).has_router_bias
