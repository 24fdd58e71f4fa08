"""convert --layout: every pair of layouts there and back bit for bit, and what other programs make of the results."""

import json
from hashlib import sha256
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_tensors, random_tensors, read_tensors, small_checkpoint, small_config, write_checkpoint
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quantized import DIALECTS, quantized_checkpoint

from converters.checkpoint.coverage import check_complete
from converters.config import Glm4MoeConfig
from converters.conversion import Conversion
from converters.convert import ConvertOptions, MtpChoice, plan_convert
from converters.errors import ConfigError, InputError, UsageError
from converters.formats.declared import MODELOPT_FILE
from converters.job import run
from converters.layout import Layout, StoredLayout, detect_layout
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.schema import Role, expand
from converters.source import open_source


def convert(src: Path, dst: Path, run_options: RunOptions | None = None, **changes: Any) -> Conversion:
    with open_source(src) as source:
        conversion = plan_convert(source, ConvertOptions(**changes))
        run(conversion, dst, run_options or RunOptions(2, 64 << 20), lambda _: None)
    return conversion


def quantize(src: Path, dst: Path) -> Path:
    with open_source(src) as source:
        run(plan_quantize(source, QuantizeOptions(scheme="fp8")), dst, RunOptions(2), lambda _: None)
    return dst


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@st.composite
def random_models(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 2]))
    return {
        "num_hidden_layers": layers,
        "first_k_dense_replace": draw(st.integers(0, layers)),
        "hidden_size": draw(st.sampled_from([8, 20])),
        "moe_intermediate_size": draw(st.sampled_from([4, 6])),
        "intermediate_size": draw(st.sampled_from([4, 10])),
        "n_routed_experts": 4 * groups,
        "n_group": groups,
        "topk_group": groups,
        "n_shared_experts": draw(st.integers(1, 2)),
        "num_attention_heads": 4,
        "head_dim": 4,
        "vocab_size": 8,
        "use_qk_norm": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "mtp": draw(st.booleans()),
        "mtp_copies": draw(st.booleans()),
    }


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(model=random_models(), quantized=st.booleans(), pair=st.sampled_from(list(permutations(Layout, 2))))
def test_there_and_back_gives_every_tensor_back(
    tmp_path_factory: pytest.TempPathFactory, model: dict[str, Any], quantized: bool, pair: tuple[Layout, Layout]
) -> None:
    folder = tmp_path_factory.mktemp("random")
    src = small_checkpoint(folder / "src", num_shards=1, **model)
    if quantized:
        src = quantize(src, folder / "fp8")
    first, second = pair
    convert(src, folder / "first", layout=first)
    convert(folder / "first", folder / "second", layout=second, run_options=RunOptions(3, 10_000))
    convert(folder / "second", folder / "third", layout=first)
    convert(folder / "third", folder / "back", layout=Layout.SPLIT, max_shard_bytes=3000)
    assert_same_tensors(read_tensors(folder / "first"), read_tensors(folder / "third"))
    assert_same_tensors(read_tensors(folder / "back"), read_tensors(src))
    assert config_of(folder / "first") == config_of(folder / "third")
    assert config_of(folder / "back") == config_of(src)


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED_SHARED, Layout.FUSED])
def test_trained_checkpoint_comes_back_from_every_layout(tiny: Path, tmp_path: Path, layout: Layout) -> None:
    convert(tiny, tmp_path / "there", layout=layout)
    with open_source(tmp_path / "there") as source:
        assert source.layout is layout
    convert(tmp_path / "there", tmp_path / "back", layout=Layout.SPLIT)
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(tiny))
    assert config_of(tmp_path / "back") == config_of(tiny)


def test_packed_is_a_stack_of_gate_above_up(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "dst", layout=Layout.PACKED)
    split, packed = read_tensors(small), read_tensors(tmp_path / "dst")
    for layer in (1, 2, 3):
        prefix = f"model.layers.{layer}.mlp.experts."
        weights = {
            part: [split[f"{prefix}{expert}.{part}_proj.weight"] for expert in range(4)]
            for part in ("gate", "up", "down")
        }
        halves = zip(weights["gate"], weights["up"], strict=True)
        assert torch.equal(packed[prefix + "gate_up_proj"], torch.stack([torch.cat(pair) for pair in halves]))
        assert torch.equal(packed[prefix + "down_proj"], torch.stack(weights["down"]))
        assert f"{prefix}0.gate_proj.weight" not in packed
    assert {n: v.shape for n, v in packed.items() if "shared" in n} == {
        n: v.shape for n, v in split.items() if "shared" in n
    }


def test_fused_joins_q_k_v_and_gate_up_with_their_biases(small: Path, tmp_path: Path) -> None:
    convert(small, tmp_path / "dst", layout=Layout.FUSED)
    split, fused = read_tensors(small), read_tensors(tmp_path / "dst")
    for kind in ("weight", "bias"):
        parts = [split[f"model.layers.2.self_attn.{x}_proj.{kind}"] for x in "qkv"]
        assert torch.equal(fused[f"model.layers.2.self_attn.qkv_proj.{kind}"], torch.cat(parts))
    for module in ("0.mlp", "2.mlp.experts.3", "2.mlp.shared_experts", "3.mlp.experts.0"):
        parts = [split[f"model.layers.{module}.{x}_proj.weight"] for x in ("gate", "up")]
        assert torch.equal(fused[f"model.layers.{module}.gate_up_proj.weight"], torch.cat(parts))
    assert not any(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj") for name in fused)


@pytest.mark.parametrize("n_shared", [1, 2])
def test_fused_shared_cuts_the_shared_expert_along_its_intermediate_dim(tmp_path: Path, n_shared: int) -> None:
    src = small_checkpoint(tmp_path / "src", n_shared_experts=n_shared)
    convert(src, tmp_path / "dst", layout=Layout.FUSED_SHARED)
    split, fused = read_tensors(src), read_tensors(tmp_path / "dst")
    for layer in (1, 2, 3):
        shared = f"model.layers.{layer}.mlp.shared_experts."
        slots = [f"model.layers.{layer}.mlp.experts.{4 + slot}." for slot in range(n_shared)]
        for part, dim in (("gate", 0), ("up", 0), ("down", 1)):
            cut = [fused[f"{slot}{part}_proj.weight"] for slot in slots]
            assert all(value.shape == fused[f"model.layers.2.mlp.experts.0.{part}_proj.weight"].shape for value in cut)
            assert torch.equal(torch.cat(cut, dim), split[f"{shared}{part}_proj.weight"])
    assert not any("shared_experts" in name for name in fused)
    assert fused["model.layers.2.mlp.gate.weight"].shape == (4, 48)
    config = config_of(tmp_path / "dst")
    assert config["n_routed_experts"] == 4
    assert config["glm4moe_layout"] == {
        "name": "fused-shared",
        "shared_expert_slots": list(range(4, 4 + n_shared)),
        "shared_slot_weight": {"routed_weights_scaled": 1.0, "output_scaled": 0.4},
    }


def swiglu(prefix: str, tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (tensors[f"{prefix}{part}_proj.weight"].double() for part in ("gate", "up", "down"))
    return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("n_shared", [1, 2])
def test_slots_with_their_stated_weight_compute_what_the_shared_expert_does(tmp_path: Path, n_shared: int) -> None:
    src = small_checkpoint(tmp_path / "src", n_shared_experts=n_shared)
    convert(src, tmp_path / "dst", layout=Layout.FUSED_SHARED)
    split, fused, config = read_tensors(src), read_tensors(tmp_path / "dst"), config_of(tmp_path / "dst")
    factor, block = config["routed_scaling_factor"], config["glm4moe_layout"]
    x = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mlp = "model.layers.2.mlp."
    routed = {0: 0.7, 3: 0.3}
    expected = swiglu(f"{mlp}shared_experts.", split, x)
    expected += factor * sum(w * swiglu(f"{mlp}experts.{e}.", split, x) for e, w in routed.items())

    def combine(slot_weight: float, scale: float) -> torch.Tensor:
        slots = dict.fromkeys(block["shared_expert_slots"], slot_weight)
        weights = {expert: weight * scale for expert, weight in routed.items()} | slots
        return sum((w * swiglu(f"{mlp}experts.{e}.", fused, x) for e, w in weights.items()), torch.zeros_like(x))

    weights = block["shared_slot_weight"]
    assert torch.allclose(combine(weights["routed_weights_scaled"], factor), expected, rtol=1e-12)
    assert torch.allclose(factor * combine(weights["output_scaled"], 1.0), expected, rtol=1e-12)
    assert not torch.allclose(combine(factor, factor), expected, rtol=1e-3)


def test_packed_loads_in_transformers_with_the_same_logits(tiny: Path, tmp_path: Path) -> None:
    from transformers import Glm4MoeForCausalLM

    convert(tiny, tmp_path / "dst", layout=Layout.PACKED)
    ids = torch.arange(24).view(2, 12)
    logits = []
    for folder in (tiny, tmp_path / "dst"):
        model, info = Glm4MoeForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["mismatched_keys"]
        # transformers packs split experts itself, and has no MTP layer: all of it, and nothing else, is left over
        names, mtp = read_tensors(tmp_path / "dst"), f"model.layers.{model.config.num_hidden_layers}."
        left_over = {name for name in names if name.startswith(mtp)}
        assert left_over
        assert set(info["unexpected_keys"]) == left_over
        logits.append(model(ids).logits)
    assert torch.equal(*logits)


def test_outputs_are_the_source_no_row_lost_or_doubled(small: Path) -> None:
    with open_source(small) as source:
        for layout in Layout:
            plan = plan_convert(source, ConvertOptions(layout=layout)).plan
            entries = [source.reader.entry(name) for name in source.reader.names]
            assert plan.total_bytes == sum(entry.nbytes for entry in entries)
            assert plan.weight_map.keys() == StoredLayout(source.schema, layout).stored.keys()
            check_complete(plan, entries)


def test_options_compose_in_one_pass(small: Path, tmp_path: Path) -> None:
    fp8 = quantize(small, tmp_path / "fp8")
    convert(
        fp8,
        tmp_path / "dst",
        layout=Layout.PACKED,
        dequantize=True,
        dtype="float32",
        mtp=MtpChoice.SEPARATE,
        max_shard_bytes=100_000,
    )
    convert(fp8, tmp_path / "a", dequantize=True, dtype="float32")
    convert(tmp_path / "a", tmp_path / "b", layout=Layout.PACKED)
    assert_same_tensors(read_tensors(tmp_path / "dst"), read_tensors(tmp_path / "b"))
    names = {path.name for path in (tmp_path / "dst").glob("*.safetensors")}
    assert "mtp.safetensors" in names
    assert len(names) > 2


@pytest.mark.parametrize("layout", list(Layout))
def test_mtp_can_be_dropped_and_moved_in_every_layout(small: Path, tmp_path: Path, layout: Layout) -> None:
    convert(small, tmp_path / "there", layout=layout)
    convert(tmp_path / "there", tmp_path / "without", mtp=MtpChoice.DROP)
    convert(tmp_path / "there", tmp_path / "apart", mtp=MtpChoice.SEPARATE)
    whole = read_tensors(tmp_path / "there")
    body = {name: value for name, value in whole.items() if not name.startswith("model.layers.3.")}
    assert len(body) < len(whole)
    assert_same_tensors(read_tensors(tmp_path / "without"), body)
    assert_same_tensors(read_tensors(tmp_path / "apart"), whole)
    with open_source(tmp_path / "without") as source:
        assert (source.layout, source.schema.mtp_layer) == (layout, None)


@pytest.mark.parametrize("layout", list(Layout))
def test_layout_of_official_models_is_detected_from_names(fixtures_dir: Path, layout: Layout) -> None:
    raw = json.loads((fixtures_dir / "configs" / "GLM-4.5-Air.json").read_text())
    config = Glm4MoeConfig.from_hf(raw)
    stored = StoredLayout(expand(config), layout)
    found = detect_layout(config, stored.stored)
    assert found.layout is layout
    assert found.stored == stored.stored
    assert sum(len(pieces) for tensor in stored.stored.values() for pieces in tensor.elements) == 18_329


def test_parts_of_quantized_tensors_resolve_in_every_layout() -> None:
    from converters.schema import COMPANIONS

    schema = expand(Glm4MoeConfig.from_hf(small_config()))
    for layout in Layout:
        stored = StoredLayout(schema, layout)
        for tensor in stored.stored.values():
            if len(tensor.shape) > 1:
                assert {stored.resolve(tensor.part(suffix)) for suffix in COMPANIONS} == {
                    (tensor, suffix) for suffix in COMPANIONS
                }


def changed(small: Path, dst: Path, layout: Layout, change: dict[str, torch.Tensor | None], **config: Any) -> Path:
    convert(small, dst / "there", layout=layout)
    tensors: dict[str, torch.Tensor] = read_tensors(dst / "there")
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return write_checkpoint(dst / "changed", tensors, {**config_of(dst / "there"), **config}, 2)


EXPERT = torch.zeros(24, 48, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        (
            Layout.PACKED,
            {"model.layers.2.mlp.experts.1.gate_proj.weight": EXPERT},
            r"expected layout packed, as .*experts.*_proj shows, found split or fused-shared: half of",
        ),
        (
            Layout.FUSED,
            {"model.layers.2.self_attn.q_proj.bias": torch.zeros(96)},
            r"expected layout fused, as .* shows, found split or packed or fused-shared",
        ),
        (
            Layout.FUSED_SHARED,
            {"model.layers.2.mlp.shared_experts.gate_proj.weight": EXPERT},
            r"found split or packed|expected layout split or packed",
        ),
        (Layout.PACKED, {"model.layers.2.mlp.experts.down_proj": None}, r"experts.down_proj: expected in the checkpo"),
        (Layout.FUSED_SHARED, {"model.layers.3.mlp.experts.4.up_proj.weight": None}, r"experts.4.up_proj.weight: exp"),
        (
            Layout.PACKED,
            {"model.layers.2.mlp.experts.gate_up_proj": torch.zeros(4, 24, 48, dtype=torch.bfloat16)},
            r"shape \[4, 48, 48\], from config.json, found \[4, 24, 48\]",
        ),
    ],
)
def test_mixed_and_half_layouts_are_refused(
    small: Path, tmp_path: Path, layout: Layout, change: dict[str, torch.Tensor | None], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        open_source(changed(small, tmp_path, layout, change))


def test_config_that_announces_another_layout_is_refused(small: Path, tmp_path: Path) -> None:
    folder = changed(small, tmp_path, Layout.PACKED, {}, glm4moe_layout={"name": "fused"})
    with pytest.raises(ConfigError, match=r"glm4moe_layout: expected packed, as the tensors' names show, found 'fused"):
        open_source(folder)


def test_dtypes_that_differ_cannot_be_packed_without_dtype(small: Path, tmp_path: Path) -> None:
    tensors = read_tensors(small)
    name = "model.layers.2.mlp.experts.1.up_proj.weight"
    tensors[name] = tensors[name].float()
    src = write_checkpoint(tmp_path / "src", tensors, small_config(), 2)
    with open_source(src) as source, pytest.raises(UsageError) as caught:
        plan_convert(source, ConvertOptions(layout=Layout.PACKED))
    assert str(caught.value) == (
        "tensor model.layers.2.mlp.experts.gate_up_proj: expected everything that is stored together in one format, "
        "found plain (BF16) and plain (F32). Add --dtype, or choose --layout split."
    )
    convert(src, tmp_path / "dst", layout=Layout.PACKED, dtype="bfloat16")
    convert(tmp_path / "dst", tmp_path / "back", layout=Layout.SPLIT)
    assert_same_tensors(read_tensors(tmp_path / "back"), read_tensors(small))


def test_slot_of_another_format_than_the_routed_experts_is_refused(small: Path, tmp_path: Path) -> None:
    """Engines assume that all slots are stored alike; a bf16 slot among quantized ones gave wrong logits or crashed."""
    fp8, plain = read_tensors(quantize(small, tmp_path / "fp8")), read_tensors(small)
    for name in [name for name in fp8 if ".shared_experts." in name]:
        del fp8[name]
    tensors = fp8 | {name: value for name, value in plain.items() if ".shared_experts." in name}
    src = write_checkpoint(tmp_path / "src", tensors, config_of(tmp_path / "fp8"), 2)
    with open_source(src) as source, pytest.raises(UsageError, match="fp8 per channel .* and plain"):
        plan_convert(source, ConvertOptions(layout=Layout.FUSED_SHARED))
    convert(src, tmp_path / "dst", layout=Layout.FUSED_SHARED, dequantize=True)


def test_quantize_refuses_a_weight_that_the_layout_has_cut_up(tmp_path: Path) -> None:
    """Each slot would get scales of its own; one slot for the whole shared expert is as good as the split layout."""
    src = small_checkpoint(tmp_path / "src", n_shared_experts=2)
    convert(src, tmp_path / "there", layout=Layout.FUSED_SHARED)
    with open_source(tmp_path / "there") as source, pytest.raises(UsageError, match="--layout split' first"):
        plan_quantize(source, QuantizeOptions(scheme="fp8"))


def test_ignored_modules_are_named_as_they_are_called_in_the_layout(small: Path, tmp_path: Path) -> None:
    fp8 = quantize(small, tmp_path / "fp8")
    config = config_of(fp8)
    extra = ["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj", r"re:.*vision.*"]
    config["quantization_config"]["ignore"] += extra
    tensors = read_tensors(fp8)
    for module in extra[:2]:
        del tensors[f"{module}.weight_scale"]
        tensors[f"{module}.weight"] = read_tensors(small)[f"{module}.weight"]
    src = write_checkpoint(tmp_path / "src", tensors, config, 2)
    convert(src, tmp_path / "fused", layout=Layout.FUSED)
    ignore = config_of(tmp_path / "fused")["quantization_config"]["ignore"]
    assert ignore[-3:] == ["lm_head", "model.layers.0.mlp.gate_up_proj", r"re:.*vision.*"]
    convert(tmp_path / "fused", tmp_path / "back", layout=Layout.SPLIT)
    assert config_of(tmp_path / "back") == config


def test_pruned_checkpoint_without_correction_bias_is_accepted_and_said_so(small: Path, tmp_path: Path) -> None:
    tensors = read_tensors(small)
    biases = [name for name in tensors if name.endswith("e_score_correction_bias")]
    src = write_checkpoint(tmp_path / "src", {n: v for n, v in tensors.items() if n not in biases}, small_config(), 2)
    with open_source(src) as source:
        assert source.notes == ("No router has a correction bias; engines that ask for one need zeros.",)
        assert not any(tensor.spec.role is Role.ROUTER_BIAS for tensor in source.schema.tensors.values())
        conversion = plan_convert(source, ConvertOptions(layout=Layout.PACKED))
        assert conversion.summary(RunOptions(1))["notes"] == list(source.notes)
    half = write_checkpoint(tmp_path / "half", {n: v for n, v in tensors.items() if n != biases[1]}, small_config(), 2)
    with pytest.raises(InputError, match=rf"tensor {biases[1]}: expected in the checkpoint"):
        open_source(half)


def test_checkpoint_without_the_mtp_layer_it_announces_is_accepted_and_said_so(tmp_path: Path) -> None:
    src = small_checkpoint(tmp_path / "src", mtp=False)
    with open_source(src) as source:
        assert source.notes == ("config.json announces an MTP layer, but the checkpoint has no tensor of it.",)
    with open_source(small_checkpoint(tmp_path / "quiet", mtp=False, num_nextn_predict_layers=0)) as source:
        assert source.notes == ()


def test_every_tensor_has_its_random_values_only_once() -> None:
    """A piece that lands at another's place would go unnoticed if the values were alike."""
    tensors = random_tensors(expand(Glm4MoeConfig.from_hf(small_config())))
    assert len({value.float().sum().item() for value in tensors.values()}) == len(tensors)


def test_modelopts_own_file_names_modules_as_the_config_does(tmp_path: Path) -> None:
    """ModelOpt keeps the list twice; readers take either. Only the names change, and a way back restores the file."""
    src, _ = quantized_checkpoint(tmp_path / "src", DIALECTS["modelopt-fp8"])
    experts = [f"model.layers.1.mlp.experts.{number}" for number in range(config_of(src)["n_routed_experts"])]
    before = ["lm_head", "model.layers.0.self_attn*", *(f"{e}.{x}_proj" for e in experts for x in ("gate", "up"))]
    own = json.loads((src / MODELOPT_FILE).read_text())
    own["quantization"]["exclude_modules"] = before
    (src / MODELOPT_FILE).write_text(json.dumps(own))
    config = config_of(src)
    config["quantization_config"]["exclude_modules"] = before
    (src / "config.json").write_text(json.dumps(config))
    convert(src, tmp_path / "packed", layout=Layout.PACKED)
    after = json.loads((tmp_path / "packed" / MODELOPT_FILE).read_text())
    assert after["quantization"]["exclude_modules"] == [*before[:2], "model.layers.1.mlp.experts.gate_up_proj"]
    assert after == {**own, "quantization": {**own["quantization"], **after["quantization"]}}
    assert config_of(tmp_path / "packed")["quantization_config"]["exclude_modules"] == [
        *before[:2],
        "model.layers.1.mlp.experts.gate_up_proj",
    ]
    manifest = json.loads((tmp_path / "packed" / "glm4moe-manifest.json").read_text())
    assert manifest["files"][MODELOPT_FILE] == sha256((tmp_path / "packed" / MODELOPT_FILE).read_bytes()).hexdigest()
    convert(tmp_path / "packed", tmp_path / "back", layout=Layout.SPLIT)
    assert sorted(json.loads((tmp_path / "back" / MODELOPT_FILE).read_text())["quantization"]["exclude_modules"]) == (
        sorted(before)
    )
    convert(src, tmp_path / "copy")
    assert (tmp_path / "copy" / MODELOPT_FILE).read_bytes() == (src / MODELOPT_FILE).read_bytes()
