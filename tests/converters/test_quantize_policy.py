"""Which weights are quantized: MTP layer, presets, roles, patterns; what is refused before a byte is written."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_tensors, read_tensors, small_config
from quantizing import block_of, checkpoint, options_for, quantize, statistics

from converters.compare import compare_structure
from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from converters.job import JobOptions, run
from converters.pipeline import RunOptions
from converters.quant.limits import check_columns, parallel_table, row_notes
from converters.quant.policy import Policy, assign, parse_schemes
from converters.quant.scheme import MtpPolicy, Preset, Recipe
from converters.quantize import plan_quantize
from converters.schema import DtypePolicy, Role, expand
from converters.source import open_source

MTP = "model.layers.2."


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("policy") / "src")


def refused(src: Path, scheme: str, **options: Any) -> str:
    """Return the message of the refusal; nothing else may happen."""
    with open_source(src) as source, pytest.raises(UsageError) as caught:
        plan_quantize(source, options_for(src, scheme, **options))
    return str(caught.value)


def codes(tensors: dict[str, torch.Tensor]) -> set[str]:
    plain = (torch.bfloat16, torch.float32)
    return {
        name.rpartition(".")[0]
        for name, value in tensors.items()
        if name.endswith((".weight", ".weight_packed")) and value.dtype not in plain
    }


def modules_of(src: Path, *roles: Role) -> set[str]:
    with open_source(src) as source:
        return {t.module for t in source.schema.tensors.values() if t.spec.role in roles and len(t.shape) == 2}


ALL = (Role.ATTENTION, Role.DENSE_MLP, Role.SHARED_EXPERT, Role.EXPERT)


@pytest.mark.parametrize(
    ("mtp", "expected"),
    [("keep", ()), ("quantize-experts", (Role.EXPERT,)), ("quantize", ALL), ("drop", None)],
)
def test_mtp_layer_is_what_was_asked_for(
    src: Path, tmp_path: Path, mtp: str, expected: tuple[Role, ...] | None
) -> None:
    quantize(src, tmp_path / "dst", "int8", mtp=mtp)
    tensors, source = read_tensors(tmp_path / "dst"), read_tensors(src)
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    in_mtp = {module for module in codes(tensors) if module.startswith(MTP)}
    assert in_mtp == {module for module in modules_of(src, *(expected or ())) if module.startswith(MTP)}
    assert codes(tensors) - in_mtp == {m for m in modules_of(src, *ALL) if not m.startswith(MTP)}
    if expected is None:
        assert not any(name.startswith(MTP) for name in tensors)
        assert config["num_nextn_predict_layers"] == 0
        assert not any("layers.2" in entry for entry in config["quantization_config"]["ignore"])
        manifest = json.loads((tmp_path / "dst" / "glm4moe-manifest.json").read_text())
        assert manifest["dropped"].keys() == {name for name in source if name.startswith(MTP)}
        return
    assert config["num_nextn_predict_layers"] == 1
    kept = {name: value for name, value in source.items() if name.startswith(MTP) and name[:-7] not in in_mtp}
    assert_same_tensors({name: tensors[name] for name in kept}, kept)
    assert f"{MTP}eh_proj.weight" in kept
    assert f"{MTP}shared_head.head.weight" in kept


@pytest.mark.parametrize(
    ("scheme", "options", "is_quantized"),
    [
        ("fp8", {}, True),
        ("fp8-block", {}, True),
        ("fp8-block", {"format": "deepseek"}, True),
        ("int8", {}, True),
        ("int8-weight-only", {}, True),
        ("fp8", {"format": "modelopt"}, False),
        ("fp8-static", {}, False),
        ("nvfp4", {}, False),
        ("nvfp4-weight-only", {}, False),
        ("experts=int8,attention=fp8", {}, False),
    ],
)
def test_mtp_layer_is_quantized_by_default_where_that_is_safe(
    src: Path, scheme: str, options: dict[str, Any], is_quantized: bool
) -> None:
    with open_source(src) as source:
        plan = plan_quantize(source, options_for(src, scheme, **options))
    assert plan.options["mtp"] == ("quantize" if is_quantized else "keep")


@pytest.mark.parametrize(
    ("preset", "roles"),
    [
        ("all-linear", ALL),
        ("mlp-only", (Role.DENSE_MLP, Role.SHARED_EXPERT, Role.EXPERT)),
        ("experts-only", (Role.EXPERT,)),
    ],
)
def test_preset_chooses_roles(src: Path, tmp_path: Path, preset: str, roles: tuple[Role, ...]) -> None:
    quantize(src, tmp_path / "dst", "fp8", preset=preset)
    assert codes(read_tensors(tmp_path / "dst")) == modules_of(src, *roles)


def test_roles_have_schemes_of_their_own(src: Path, tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    scheme = "experts=nvfp4,attention=fp8,dense=int8-weight-only"
    quantize(src, tmp_path / "dst", scheme, group_size="64")
    assert compare_structure(src, tmp_path / "dst").findings == ()
    tensors, block = read_tensors(tmp_path / "dst"), block_of(tmp_path / "dst")
    QuantizationConfig.model_validate(block)
    assert tensors["model.layers.1.mlp.experts.1.up_proj.weight_packed"].dtype == torch.uint8
    assert tensors["model.layers.1.self_attn.o_proj.weight"].dtype == torch.float8_e4m3fn
    assert tensors["model.layers.0.mlp.down_proj.weight_scale"].shape == (128, 4)
    assert tensors["model.layers.1.mlp.shared_experts.up_proj.weight"].dtype == torch.bfloat16
    assert block["format"] == "mixed-precision"
    formats = [group["format"] for group in block["config_groups"].values()]
    assert formats == ["float-quantized", "pack-quantized", "nvfp4-pack-quantized"]
    assert block["config_groups"]["group_0"]["targets"] == [rf"re:.*\.self_attn\.{x}_proj$" for x in "qkvo"]
    with open_source(tmp_path / "dst") as result:
        assert result.weights["model.layers.1.mlp.experts.0.up_proj.weight"].format.name == "nvfp4"


def test_groups_whose_parts_have_equal_names_are_told_apart_by_their_targets(src: Path, tmp_path: Path) -> None:
    quantize(src, tmp_path / "dst", "attention=fp8-block,dense=int8,experts=fp8")
    assert compare_structure(src, tmp_path / "dst").findings == ()
    config = json.loads((tmp_path / "dst" / "config.json").read_text())
    groups = config["quantization_config"]["config_groups"]
    groups["group_0"]["targets"], groups["group_1"]["targets"] = (
        groups["group_1"]["targets"],
        groups["group_0"]["targets"],
    )
    (tmp_path / "dst" / "config.json").write_text(json.dumps(config))
    findings = [str(finding) for finding in compare_structure(src, tmp_path / "dst").findings]
    assert any("layers.0.mlp.gate_proj.weight: expected F8_E4M3" in finding for finding in findings)


def test_one_scheme_for_some_roles_needs_no_groups(src: Path, tmp_path: Path) -> None:
    quantize(src, tmp_path / "a", "experts=fp8,shared-experts=fp8,dense=fp8")
    quantize(src, tmp_path / "b", "fp8", preset="mlp-only")
    assert_same_tensors(read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b"))
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


def test_ignored_modules_stay_as_they_are(src: Path, tmp_path: Path) -> None:
    patterns = (r"model\.layers\.0\..*", r".*\.o_proj", "lm_head")
    quantize(src, tmp_path / "dst", "fp8", ignore=patterns)
    everything = modules_of(src, *ALL)
    left = {module for module in everything if ".layers.0." in module or module.endswith("o_proj")}
    assert codes(read_tensors(tmp_path / "dst")) == everything - left
    # SGLang's name for the MTP layer's own
    assert f"{MTP}self_attn.o_proj" in block_of(tmp_path / "dst")["ignore"]
    assert "model.decoder.self_attn.o_proj" in block_of(tmp_path / "dst")["ignore"]


@pytest.mark.parametrize("format_", ["compressed-tensors", "modelopt"])
def test_cache_scales_are_written_for_all_layers_but_the_mtp_layer(src: Path, tmp_path: Path, format_: str) -> None:
    quantize(src, tmp_path / "dst", "fp8-block", format=format_, kv_cache="fp8", mtp="quantize")
    tensors, block = read_tensors(tmp_path / "dst"), block_of(tmp_path / "dst")
    scales = {name: value for name, value in tensors.items() if name.endswith(("k_scale", "v_scale"))}
    is_ct = format_ == "compressed-tensors"
    k, v = ("k_scale", "v_scale") if is_ct else ("k_proj.k_scale", "v_proj.v_scale")
    expected = {}
    for layer in (0, 1):
        for name, amax in ((k, 20.0 + layer), (v, 7.0 + layer)):
            value = torch.tensor([amax / 448]).to(torch.bfloat16) if is_ct else torch.tensor(amax / 448)
            expected[f"model.layers.{layer}.self_attn.{name}"] = value
    assert_same_tensors(scales, expected)
    known = {"num_bits": 8, "type": "float", "dynamic": False}
    if is_ct:
        known |= {"strategy": "tensor", "symmetric": True, "group_size": None}
    else:
        nested = json.loads((tmp_path / "dst" / "hf_quant_config.json").read_text())["quantization"]
        assert nested["kv_cache_quant_algo"] == "FP8"
    assert block["kv_cache_scheme"] == known
    with open_source(tmp_path / "dst") as result:
        assert result.cache_scales.keys() == expected.keys()


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("fp9", {}, "--scheme: expected one of fp8, fp8-block, fp8-static, int8, int8-weight-only, nvfp4, "),
        ("experts=fp9", {}, "--scheme experts: expected one of fp8,"),
        ("expert=fp8", {}, "--scheme expert=fp8: expected role=scheme, each role once: experts, shared-experts, dense"),
        ("experts=fp8,experts=int8", {}, "each role once"),
        ("experts=fp8", {"preset": "mlp-only"}, "--preset: expected one scheme for all roles"),
        ("int8", {"format": "modelopt"}, "--format modelopt: expected one of its schemes: fp8, fp8-block, fp8-static"),
        ("int8", {"format": "deepseek"}, "int8 exists as --format compressed-tensors."),
        ("fp8-static", {"format": "deepseek"}, "fp8-static exists as --format compressed-tensors or modelopt."),
        ("experts=nvfp4,attention=fp8", {"format": "modelopt"}, "--format modelopt: expected one scheme for all roles"),
        ("fp8", {"arithmetic": "modelopt"}, "--arithmetic modelopt: expected float32 or compressed-tensors for"),
        ("fp8", {"format": "modelopt", "arithmetic": "float32"}, "expected modelopt for --format modelopt"),
        ("fp8", {"group_size": "64"}, "--group-size 64: expected --scheme int8-weight-only, found fp8"),
        ("int8-weight-only", {"group_size": "48"}, "--group-size: expected one of channel, 32, 64, 128, found 48"),
        ("fp8", {"search": "mse"}, "--scale-search mse: expected a scheme with local scales"),
        ("fp8-block", {"format": "deepseek", "kv_cache": "fp8"}, "--kv-cache fp8: expected fp8, with --format"),
        ("fp8", {"kv_cache": "int8"}, "--kv-cache int8: expected fp8"),
        ("attention=fp8", {"mtp": "quantize-experts"}, "--mtp quantize-experts: expected a scheme for experts"),
        ("fp8", {"ignore": (".*mlp.gate_up",)}, "--ignore .*mlp.gate_up: expected a regular expression that matches"),
        ("fp8", {"ignore": ("(",)}, "--ignore (: expected a regular expression, found missing )"),
        ("fp8", {"ignore": (".*_proj",)}, "--ignore: expected something left to quantize, found nothing"),
        (
            "fp8",
            {"ignore": (r".*\.q_proj",)},
            "--ignore: model.layers.0.self_attn.qkv_proj: expected a whole that gets one scheme, found "
            "model.layers.0.self_attn.q_proj left out and model.layers.0.self_attn.k_proj not. vLLM and SGLang refuse "
            "to load such a checkpoint, TensorRT-LLM would leave all of them out. Leave out all of it or nothing.",
        ),
        ("fp8", {"ignore": (r".*\.0\.mlp\.up_proj",)}, "--ignore: model.layers.0.mlp.gate_up_proj: expected a whole"),
        ("fp8", {"ignore": (r".*\.shared_experts\.gate_proj",)}, "mlp.shared_experts.gate_up_proj: expected a whole"),
        ("fp8", {"ignore": (r".*\.experts\.1\..*",)}, "--ignore: model.layers.1.mlp.experts: expected a whole that"),
        ("fp8", {"ignore": (r".*\.experts\.\d+\.down_proj",)}, "choose one scheme for all experts of a layer"),
        ("nvfp4", {"stats": None}, "--scheme nvfp4: expected statistics of calibration, found none. Run 'glm4moe"),
        ("fp8-static", {"stats": None}, "--scheme fp8-static: expected statistics of calibration, found none"),
        ("fp8", {"kv_cache": "fp8", "stats": None}, "--kv-cache: expected statistics of calibration, found none"),
    ],
)
def test_request_that_cannot_work_is_refused_by_name(
    src: Path, scheme: str, options: dict[str, Any], message: str
) -> None:
    assert message in refused(src, scheme, **options)


def test_statistics_must_be_of_this_checkpoint_and_cover_it(src: Path, tmp_path: Path) -> None:
    other = checkpoint(tmp_path / "other", vocab_size=48)
    assert "--stats: expected statistics of" in refused(src, "nvfp4", stats=statistics(other))
    assert "--stats: expected a scheme with calibrated scales" in refused(src, "fp8", stats=statistics(src))
    stats = statistics(src)
    del stats.input_amax["model.layers.1.mlp.experts.1.down_proj"]
    message = refused(src, "nvfp4", stats=stats)
    assert "--stats: model.layers.1.mlp.experts.1.down_proj: expected the largest magnitude" in message
    stats.input_amax["model.layers.1.mlp.experts.1.down_proj"] = 0.0
    assert "above zero, found 0.0" in refused(src, "nvfp4", stats=stats)


def test_source_without_mtp_layer_takes_no_order_for_it(tmp_path: Path) -> None:
    src = checkpoint(tmp_path / "src", num_nextn_predict_layers=0)
    assert "--mtp drop: expected a source with an MTP layer" in refused(src, "fp8", mtp="drop")
    quantize(src, tmp_path / "dst", "fp8", mtp="keep")


@pytest.mark.parametrize(
    ("scheme", "group", "changes", "found"),
    [
        ("fp8-block", None, {"intermediate_size": 320}, "columns in multiples of 128, found 320, which is 2.5 of them"),
        ("nvfp4-weight-only", None, {"moe_intermediate_size": 24}, "multiples of 16, found 24"),
        ("int8-weight-only", None, {"moe_intermediate_size": 34}, "multiples of 4, found 34"),
        ("int8-weight-only", "64", {"intermediate_size": 96}, "Choose --group-size channel, 32; leave dense out"),
    ],
)
def test_widths_that_a_scheme_cannot_take_are_refused(
    tmp_path: Path, scheme: str, group: str | None, changes: dict[str, int], found: str
) -> None:
    src = checkpoint(tmp_path / "src", **changes)
    assert found in refused(src, scheme, group_size=group)


def real(fixtures_dir: Path, name: str) -> Any:
    return expand(Glm4MoeConfig.from_hf(json.loads((fixtures_dir / "configs" / f"{name}.json").read_text())))


def test_blocks_of_fused_weights_that_engines_refuse_are_told(fixtures_dir: Path) -> None:
    air = real(fixtures_dir, "GLM-4.5-Air")
    recipes = recipes_for(air, Recipe("fp8-block"))
    assert row_notes(air, recipes) == [
        "fp8-block: gate_proj of dense has 10944 rows, 85.5 blocks; vLLM refuses that in weights that it multiplies as "
        "one. Leave dense out with --scheme attention=fp8-block,experts=fp8-block,shared-experts=fp8-block, or choose "
        "a scheme without blocks."
    ]
    with pytest.raises(UsageError, match="Leave dense out with --scheme attention=fp8-block,experts=fp8-block,"):
        check_columns(air, recipes)
    large = real(fixtures_dir, "GLM-4.6")
    assert row_notes(large, recipes_for(large, Recipe("fp8-block"))) == []


def recipes_for(schema: Any, recipe: Recipe, preset: Preset = Preset.ALL_LINEAR) -> dict[str, Recipe]:
    policy = Policy(parse_schemes(recipe.scheme, preset), MtpPolicy.QUANTIZE)
    return dict.fromkeys(assign(schema, policy), recipe)


def test_dense_layer_of_air_is_refused_with_what_would_work(fixtures_dir: Path) -> None:
    schema = real(fixtures_dir, "GLM-4.5-Air")
    with pytest.raises(UsageError) as caught:
        check_columns(schema, recipes_for(schema, Recipe("int8-weight-only", group=128)))
    assert str(caught.value) == (
        "--scheme int8-weight-only in groups of 128: model.layers.0.mlp.down_proj: expected columns in multiples of "
        "128, found 10944, which is 85.5 of them. Choose --group-size channel, 32, 64; leave dense out with --preset "
        r"experts-only; leave it out with --ignore 'model\.layers\.\d+\.mlp\.down_proj'; or use a scheme that fits "
        "every weight: fp8, fp8-static, int8, nvfp4, nvfp4-weight-only."
    )
    check_columns(schema, recipes_for(schema, Recipe("int8-weight-only", group=64)))
    check_columns(schema, recipes_for(schema, Recipe("fp8-block"), Preset.EXPERTS_ONLY))


@pytest.mark.parametrize(
    ("model", "scheme", "group", "preset", "dense", "experts", "whole", "with_ep"),
    [
        # the table of the format reference, as far as heads allow the sizes
        ("GLM-4.6", "fp8-block", 0, Preset.ALL_LINEAR, 32, 4, "1, 2, 4", "1, 2, 4"),
        ("GLM-4.6", "nvfp4-weight-only", 0, Preset.ALL_LINEAR, 128, 32, "1, 2, 4, 8, 16, 24, 32, 48", None),
        ("GLM-4.5-Air", "nvfp4-weight-only", 0, Preset.ALL_LINEAR, 4, 8, "1, 2, 4", "1, 2, 4"),
        ("GLM-4.5-Air", "int8-weight-only", 32, Preset.ALL_LINEAR, 2, 4, "1, 2", "1, 2"),
        ("GLM-4.5-Air", "int8-weight-only", 64, Preset.ALL_LINEAR, 1, 2, "1", "1"),
        ("GLM-4.5-Air", "fp8-block", 0, Preset.EXPERTS_ONLY, None, 1, "1", "1, 2, 4, 8, 16, 32"),
    ],
)
def test_parallel_sizes_are_those_of_the_reference(
    fixtures_dir: Path,
    model: str,
    scheme: str,
    group: int,
    preset: Preset,
    dense: int | None,
    experts: int,
    whole: str,
    with_ep: str | None,
) -> None:
    schema = real(fixtures_dir, model)
    table = parallel_table(schema.config, schema, recipes_for(schema, Recipe(scheme, group=group), preset))

    def largest(line: str) -> int:
        sizes = map(int, line.partition(" of ")[0].split(", "))
        return max(size for size in sizes if size.bit_count() == 1)

    assert ("dense" in table) == (dense is not None)
    if dense is not None:
        assert largest(table["dense"]) == dense
    assert largest(table["experts"]) == experts
    assert table["tensor parallel"] == whole
    if with_ep is not None:
        assert table["with expert parallel"] == with_ep


def test_plan_says_what_engines_make_of_it(src: Path) -> None:
    with open_source(src) as source:
        plan = plan_quantize(source, options_for(src, "int8", preset="experts-only"))
        summary = plan.summary(RunOptions(1))
    assert plan.engines == ("vLLM", "SGLang")
    assert any("SGLang reads it on CUDA with --quantization w8a8_int8 only" in note for note in summary["notes"])
    assert any("TensorRT-LLM takes the codes for FP8" in note for note in summary["notes"])
    assert any("--disable-shared-experts-fusion" in note for note in summary["notes"])
    assert summary["limits"]["tensor parallel"] == "1, 2, 4, 8, 16"


@pytest.mark.parametrize(
    ("scheme", "mtp", "engines", "has_mtp"),
    [
        ("int8", MtpPolicy.QUANTIZE, ("vLLM", "SGLang"), True),
        ("int8", MtpPolicy.KEEP, ("vLLM", "SGLang"), False),
        # its loader of int8 has no plain experts, and takes all that is not ignored for int8
        ("attention=int8", MtpPolicy.KEEP, ("vLLM",), None),
        ("attention=int8,experts=fp8", MtpPolicy.KEEP, ("vLLM",), None),
        ("fp8", MtpPolicy.KEEP, ("vLLM", "SGLang", "TensorRT-LLM", "transformers"), True),
    ],
)
def test_card_has_what_sglang_must_be_told(
    src: Path, tmp_path: Path, scheme: str, mtp: MtpPolicy, engines: tuple[str, ...], has_mtp: bool | None
) -> None:
    """The card said that SGLang does not read int8, and offered speculation with MTP layers that it does not load."""
    with open_source(src) as source:
        plan = plan_quantize(source, options_for(src, scheme, mtp=mtp))
        run(plan, tmp_path / "dst", RunOptions(1), lambda _: None)
    assert plan.engines == engines
    card = (tmp_path / "dst" / "README.md").read_text()
    command = card.partition("**SGLang**\n\n")[2].partition("\n**")[0]
    if has_mtp is None:
        assert command.startswith("Not supported.")
        return
    assert ("--quantization w8a8_int8" in command) is (scheme == "int8")
    assert ("--speculative-algorithm EAGLE" in command) is has_mtp
    has_note = any("SGLang does not load the MTP layer" in note for note in plan.notes)
    assert has_note is not has_mtp


@pytest.mark.parametrize("scheme", ["fp8-block", "fp8-static", "int8-weight-only", "nvfp4"])
def test_bytes_do_not_depend_on_workers_or_block_size(src: Path, tmp_path: Path, scheme: str) -> None:
    files = []
    for name, options in (("a", RunOptions(1, 1 << 30)), ("b", RunOptions(4, 4_000_000))):
        with open_source(src) as source:
            plan = plan_quantize(source, options_for(src, scheme, max_shard_bytes=200_000))
            run(plan, tmp_path / name, options, lambda _: None)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]
    assert len(files[0]) > 5


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_update_makes_only_what_the_change_touches(src: Path, tmp_path: Path) -> None:
    dst = tmp_path / "dst"
    quantize(src, dst, "fp8", max_shard_bytes=150_000)
    ignore = (r"model\.layers\.2\.self_attn\.o_proj",)
    outcome = quantize(src, dst, "fp8", JobOptions(update=True), max_shard_bytes=150_000, ignore=ignore)
    assert outcome.written
    assert outcome.kept
    quantize(src, tmp_path / "anew", "fp8", max_shard_bytes=150_000, ignore=ignore)
    assert files_of(dst) == files_of(tmp_path / "anew")


@pytest.mark.parametrize("then", [{"scheme": "nvfp4"}, {"scheme": "nvfp4", "format": "modelopt"}])
def test_update_to_another_scheme_gives_the_bytes_of_a_new_run(src: Path, tmp_path: Path, then: dict[str, str]) -> None:
    dst = tmp_path / "dst"
    quantize(src, dst, "fp8")
    quantize(src, dst, how=JobOptions(update=True), **then)
    quantize(src, tmp_path / "anew", **then)
    assert files_of(dst) == files_of(tmp_path / "anew")
    # and back: the file of the other format goes
    quantize(src, dst, "fp8", JobOptions(update=True))
    assert not (dst / "hf_quant_config.json").exists()


def test_new_statistics_change_the_job_and_only_the_scales(src: Path, tmp_path: Path) -> None:
    quantize(src, tmp_path / "dst", "nvfp4")
    before = read_tensors(tmp_path / "dst")
    stats = statistics(src)
    for module in stats.input_amax:
        stats.input_amax[module] *= 2
    with open_source(src) as source:
        plan = plan_quantize(source, options_for(src, "nvfp4", stats=stats))
        with pytest.raises(UsageError, match="another job"):
            run(plan, tmp_path / "dst", RunOptions(1), lambda _: None)
        run(plan, tmp_path / "dst", RunOptions(1), lambda _: None, JobOptions(update=True))
    after = read_tensors(tmp_path / "dst")
    different = {name for name in before if not torch.equal(before[name], after[name])}
    assert different == {name for name in before if name.endswith("input_global_scale")}


def test_every_quantizable_weight_has_a_role_that_can_be_named() -> None:
    tensors = expand(Glm4MoeConfig.from_hf(small_config())).tensors.values()
    roles = {tensor.spec.role for tensor in tensors if tensor.spec.dtype is DtypePolicy.QUANTIZABLE}
    assert roles == set(parse_schemes("fp8", None))
