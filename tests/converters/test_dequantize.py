"""convert --dequantize, and quantized tensors in every layout: exact values; what cannot be represented is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_tensors, read_tensors, write_checkpoint
from quantized import DIALECTS, SIZES, quantized_checkpoint

from converters.convert import ConvertOptions, MtpChoice, plan_convert
from converters.errors import ConfigError, InputError, UsageError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.source import open_source

LAYOUTS = [Layout.PACKED, Layout.FUSED_SHARED, Layout.FUSED]


def convert(src: Path, dst: Path, run_options: RunOptions | None = None, **changes: Any) -> Path:
    with open_source(src) as source:
        run(
            plan_convert(source, ConvertOptions(**changes)),
            dst,
            run_options or RunOptions(2, 64 << 20),
            lambda _: None,
        )
    return dst


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dequantized_weights_are_what_the_format_says(tmp_path: Path, dialect: str) -> None:
    """Blocks of a few rows, so that scales of several rows are looked up across their borders."""
    src, expected = quantized_checkpoint(tmp_path / "src", DIALECTS[dialect])
    dst = convert(src, tmp_path / "dst", RunOptions(2, 30_000), dequantize=True)
    assert_same_tensors(read_tensors(dst), expected)
    assert "quantization_config" not in config_of(dst)
    assert not (dst / "hf_quant_config.json").exists()
    with open_source(dst) as source:
        assert not source.is_quantized


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_and_scales_come_back_from_every_layout(tmp_path: Path, dialect: str, layout: Layout) -> None:
    src, expected = quantized_checkpoint(tmp_path / "src", DIALECTS[dialect], intermediate_size=96)
    there = convert(src, tmp_path / "there", layout=layout)
    back = convert(there, tmp_path / "back", layout=Layout.SPLIT)
    assert_same_tensors(read_tensors(back), read_tensors(src))
    # the values are the same whether the weights are restored before or after the layout is changed
    plain = convert(there, tmp_path / "plain", RunOptions(1, 50_000), dequantize=True)
    assert_same_tensors(read_tensors(convert(plain, tmp_path / "split", layout=Layout.SPLIT)), expected)
    direct = convert(src, tmp_path / "direct", layout=layout, dequantize=True)
    assert_same_tensors(read_tensors(direct), read_tensors(plain))


@pytest.mark.parametrize(
    "dialect", ["ct-fp8-channel", "ct-fp8-block", "ct-nvfp4", "ct-int4-packed-group", "modelopt-fp8"]
)
def test_two_shared_experts_become_two_slots_with_their_scales(tmp_path: Path, dialect: str) -> None:
    sizes = {"n_shared_experts": 2, "moe_intermediate_size": 96}
    src, expected = quantized_checkpoint(tmp_path / "src", DIALECTS[dialect], **sizes)
    there = convert(src, tmp_path / "there", layout=Layout.FUSED_SHARED)
    assert_same_tensors(read_tensors(convert(there, tmp_path / "back", layout=Layout.SPLIT)), read_tensors(src))
    plain = convert(there, tmp_path / "plain", layout=Layout.SPLIT, dequantize=True)
    assert_same_tensors(read_tensors(plain), expected)


def test_shapes_of_packed_scales(tmp_path: Path) -> None:
    shapes = {}
    for dialect in ("ct-fp8-channel", "ct-fp8-block", "ct-nvfp4", "modelopt-nvfp4", "ct-int4-packed-group"):
        src, _ = quantized_checkpoint(tmp_path / dialect, DIALECTS[dialect])
        tensors = read_tensors(convert(src, tmp_path / f"{dialect}-packed", layout=Layout.PACKED))
        prefix = "model.layers.2.mlp.experts.gate_up_proj"
        shapes[dialect] = {
            name.removeprefix(prefix): list(value.shape) for name, value in tensors.items() if name.startswith(prefix)
        }
    assert shapes == {
        "ct-fp8-channel": {"": [4, 64, 64], "_scale": [4, 64, 1]},
        "ct-fp8-block": {"": [4, 64, 64], "_scale": [4, 2, 2]},
        "ct-nvfp4": {
            "_packed": [4, 64, 32],
            "_scale": [4, 64, 4],
            "_global_scale": [4, 1],
            "_input_global_scale": [4, 1],
        },
        "modelopt-nvfp4": {"": [4, 64, 32], "_scale": [4, 64, 4], "_scale_2": [4], "_input_scale": [4]},
        "ct-int4-packed-group": {"_packed": [4, 64, 8], "_scale": [4, 64, 4], "_shape": [3]},
    }
    assert tensors[f"{prefix}_shape"].tolist() == [4, 64, 64]


def rewritten(src: Path, dst: Path, change: dict[str, torch.Tensor | None], **config: Any) -> Path:
    tensors: dict[str, torch.Tensor] = read_tensors(src)
    for name, value in change.items():
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return write_checkpoint(dst, tensors, {**config_of(src), **config}, 2)


UP = "model.layers.2.mlp.experts.1.up_proj"


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED])
def test_scales_that_differ_cannot_be_fused(tmp_path: Path, layout: Layout) -> None:
    src, _ = quantized_checkpoint(tmp_path / "nvfp4", DIALECTS["ct-nvfp4"])
    src = rewritten(src, tmp_path / "src", {f"{UP}.weight_global_scale": torch.tensor([12.0])})
    with open_source(src) as source, pytest.raises(UsageError) as caught:
        plan_convert(source, ConvertOptions(layout=layout))
    gate = UP.replace("up_proj", "gate_proj")
    assert str(caught.value) == (
        f"tensor {UP}.weight_global_scale: expected the values of {gate}.weight_global_scale, with which it would be "
        "fused, found other values. They cannot share one scale. Add --dequantize, or keep the layout."
    )
    convert(src, tmp_path / "slots", layout=Layout.FUSED_SHARED)
    plain = convert(src, tmp_path / "plain", layout=layout, dequantize=True)
    assert_same_tensors(
        read_tensors(convert(plain, tmp_path / "back", layout=Layout.SPLIT)),
        read_tensors(convert(src, tmp_path / "direct", dequantize=True)),
    )


@pytest.mark.parametrize("dialect", ["ct-fp8-block", "deepseek-fp8-block"])
def test_blocks_that_would_straddle_two_weights_cannot_be_fused(tmp_path: Path, dialect: str) -> None:
    src, expected = quantized_checkpoint(tmp_path / "src", DIALECTS[dialect], moe_intermediate_size=40)
    with (
        open_source(src) as source,
        pytest.raises(UsageError, match=r"rows are multiples of 32.*found 40 rows. Add --d"),
    ):
        plan_convert(source, ConvertOptions(layout=Layout.PACKED))
    plain = convert(src, tmp_path / "plain", layout=Layout.PACKED, dequantize=True)
    assert_same_tensors(read_tensors(convert(plain, tmp_path / "back", layout=Layout.SPLIT)), expected)


def test_official_fp8_style_with_a_quantized_mtp_head_and_a_long_ignore_list(tmp_path: Path) -> None:
    dialect = DIALECTS["ct-fp8-channel-fp32-scales"]
    src, expected = quantized_checkpoint(tmp_path / "fp8", dialect)
    plain = [name for name, value in read_tensors(src).items() if value.dtype == torch.bfloat16]
    block = dialect.config | {"ignore": [name.removesuffix(".weight") for name in plain]}
    assert "model.layers.2.self_attn.q_proj.bias" in block["ignore"]
    assert read_tensors(src)["model.layers.3.shared_head.head.weight"].dtype == torch.float8_e4m3fn
    src = rewritten(src, tmp_path / "src", {}, quantization_config=block)
    assert_same_tensors(read_tensors(convert(src, tmp_path / "dst", dequantize=True)), expected)
    fused = convert(src, tmp_path / "fused", layout=Layout.FUSED)
    ignore = config_of(fused)["quantization_config"]["ignore"]
    assert "model.layers.2.self_attn.qkv_proj.bias" in ignore
    assert "model.layers.2.self_attn.q_proj.bias" not in ignore
    back = config_of(convert(fused, tmp_path / "back", layout=Layout.SPLIT))["quantization_config"]["ignore"]
    assert sorted(back) == sorted(block["ignore"])


@pytest.mark.parametrize(("dtype", "kind"), [("float32", torch.float32), ("float16", torch.float16)])
def test_dtype_rounds_once_from_the_exact_product(tmp_path: Path, dtype: str, kind: torch.dtype) -> None:
    src, _ = quantized_checkpoint(tmp_path / "src", DIALECTS["ct-fp8-channel-fp32-scales"])
    dst = read_tensors(convert(src, tmp_path / "dst", dequantize=True, dtype=dtype))
    tensors = read_tensors(src)
    exact = tensors[f"{UP}.weight"].double() * tensors[f"{UP}.weight_scale"].double()
    assert torch.equal(dst[f"{UP}.weight"], exact.float().to(kind))
    assert dst["model.norm.weight"].dtype == kind


def test_result_does_not_depend_on_workers_or_memory(tmp_path: Path) -> None:
    src, _ = quantized_checkpoint(tmp_path / "src", DIALECTS["deepseek-fp8-block"])
    files = []
    for name, options in (("a", RunOptions(1, 1 << 30)), ("b", RunOptions(5, 20_000))):
        dst = convert(src, tmp_path / name, options, dequantize=True, layout=Layout.FUSED, max_shard_bytes=60_000)
        files.append({path.name: path.read_bytes() for path in dst.iterdir()})
    assert files[0] == files[1]


def test_interrupted_run_is_resumed_and_a_changed_scale_is_noticed(tmp_path: Path) -> None:
    """A finished shard proves the scales that it was made of, not only the codes."""
    src, _ = quantized_checkpoint(tmp_path / "src", DIALECTS["deepseek-fp8-block"])
    options = {"dequantize": True, "layout": Layout.PACKED, "max_shard_bytes": 60_000}
    whole = convert(src, tmp_path / "whole", **options)

    class Interrupt(Exception):
        pass

    def interrupt(done: list[int]) -> Any:
        def advance(num_bytes: int) -> None:
            done.append(num_bytes)
            if sum(done) > 200_000:
                raise Interrupt

        return advance

    with open_source(src) as source:
        plan = plan_convert(source, ConvertOptions(**options))
        with pytest.raises(Interrupt):
            run(plan, tmp_path / "dst", RunOptions(1, 1 << 20), interrupt([]))
    assert list((tmp_path / "dst").glob("model-*.safetensors"))
    scale = "model.layers.0.mlp.down_proj.weight_scale_inv"
    original = read_tensors(src)[scale]
    rewritten(src, src, {scale: original * 2})
    with pytest.raises(InputError, match="expected the bytes that the unfinished run read"):
        convert(src, tmp_path / "dst", **options)
    rewritten(src, src, {scale: original})
    convert(src, tmp_path / "dst", RunOptions(3, 100_000), **options)
    assert_same_tensors(read_tensors(tmp_path / "dst"), read_tensors(whole))


def test_kv_cache_scales_are_carried_by_name_and_dropped_with_the_quantization(tmp_path: Path) -> None:
    src, expected = quantized_checkpoint(tmp_path / "fp8", DIALECTS["ct-fp8-channel"])
    cache = {
        "model.layers.1.self_attn.k_scale": torch.tensor([0.5]),
        "model.layers.2.self_attn.k_proj.k_scale": torch.tensor(0.25),
        "model.layers.2.self_attn.v_proj.output_scale": torch.tensor([0.75]),
    }
    src = rewritten(src, tmp_path / "src", dict(cache))
    for layout in LAYOUTS:
        tensors = read_tensors(convert(src, tmp_path / layout, layout=layout))
        assert_same_tensors({name: tensors[name] for name in cache}, cache)
    with open_source(src) as source:
        plan = plan_convert(source, ConvertOptions(dequantize=True, mtp=MtpChoice.DROP)).plan
        assert {name: plan.dropped[name] for name in cache} == dict.fromkeys(cache, "--dequantize")
    assert_same_tensors(read_tensors(convert(src, tmp_path / "plain", dequantize=True)), expected)


def test_modelopt_export_whose_config_is_only_in_its_own_file(tmp_path: Path) -> None:
    src, expected = quantized_checkpoint(tmp_path / "src", DIALECTS["modelopt-nvfp4"])
    config = config_of(src)
    del config["quantization_config"]
    (src / "config.json").write_text(json.dumps(config))
    assert_same_tensors(read_tensors(convert(src, tmp_path / "dst", dequantize=True)), expected)


@pytest.mark.parametrize(
    ("dialect", "change", "message"),
    [
        ("ct-fp8-channel", {f"{UP}.weight_scale": None}, f"{UP}.weight: expected a scale beside its codes, found none"),
        (
            "ct-fp8-channel",
            {f"{UP}.weight_scale": torch.ones(1, 64, dtype=torch.bfloat16)},
            r"a declared scheme \(fp8 per channel\), found .*weight_scale BF16 \[1, 64\]",
        ),
        ("ct-nvfp4", {f"{UP}.weight_global_scale": None}, r"declared scheme \(nvfp4\)"),
        ("ct-nvfp4", {f"{UP}.weight_packed": None}, r"declared scheme \(nvfp4\), found .*weight_scale F8"),
        (
            "ct-int4-packed-group",
            {f"{UP}.weight_zero_point": torch.zeros(4, 4, dtype=torch.int32)},
            "weight_zero_point I32",
        ),
        ("ct-int4-packed-group", {f"{UP}.weight_g_idx": torch.zeros(64, dtype=torch.int32)}, "weight_g_idx I32"),
        ("modelopt-fp8", {"model.layers.2.self_attn.k_scale": torch.zeros(3)}, "expected one float, or one for each"),
        (
            "deepseek-fp8-block",
            {f"{UP}.weight_scale_inv": torch.ones(1, 1)},
            r"fp8 per block\), found .*weight_scale_inv F32 \[1, 1\]",
        ),
    ],
)
def test_parts_that_no_declared_scheme_has_are_refused(
    tmp_path: Path, dialect: str, change: dict[str, torch.Tensor | None], message: str
) -> None:
    src, _ = quantized_checkpoint(tmp_path / "good", DIALECTS[dialect])
    with pytest.raises(InputError, match=message):
        open_source(rewritten(src, tmp_path / "bad", change))


GROUP = DIALECTS["ct-int4-packed-group"].config["config_groups"]["group_0"]


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"quant_method": "awq"}, "quant_method: expected compressed-tensors, fp8 or modelopt, found 'awq'"),
        ({"quant_method": "fp8"}, r"weight_block_size: expected two sizes such as \[128, 128\], found None"),
        (
            {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"},
            "quant_algo: expected one of FP8, .* found 'W4A8_AWQ'",
        ),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "at least one group"),
        ([], "expected an object"),
    ],
)
def test_method_that_is_not_implemented_is_refused_by_name(tmp_path: Path, block: Any, message: str) -> None:
    src, _ = quantized_checkpoint(tmp_path / "good", DIALECTS["ct-fp8-channel"])
    with pytest.raises(ConfigError, match=message):
        open_source(rewritten(src, tmp_path / "bad", {}, quantization_config=block))


@pytest.mark.parametrize(
    "change",
    [
        {"symmetric": False},
        {"actorder": "group"},
        {"num_bits": 3},
        {"type": "float", "num_bits": 4, "group_size": 32, "scale_dtype": "torch.uint8"},
        {"strategy": "token"},
        {"group_size": None},
        {"dynamic": True},
    ],
)
def test_scheme_that_is_not_implemented_is_refused_by_name(tmp_path: Path, change: dict[str, Any]) -> None:
    src, _ = quantized_checkpoint(tmp_path / "good", DIALECTS["ct-int4-packed-group"])
    weights = {**GROUP["weights"], **change}
    block = {"quant_method": "compressed-tensors", "config_groups": {"g": {**GROUP, "weights": weights}}}
    with pytest.raises(ConfigError, match="config_groups.g.weights: expected static symmetric weights"):
        open_source(rewritten(src, tmp_path / "bad", {}, quantization_config=block))


def test_shape_that_a_packed_weight_states_must_be_its_own(tmp_path: Path) -> None:
    src, _ = quantized_checkpoint(tmp_path / "good", DIALECTS["ct-int4-packed-group"])
    src = rewritten(src, tmp_path / "bad", {f"{UP}.weight_shape": torch.tensor([32, 63])})
    for options in (ConvertOptions(dequantize=True), ConvertOptions(layout=Layout.PACKED)):
        with open_source(src) as source, pytest.raises(UsageError, match=r"expected \[32, 64\].*found \[32, 63\]"):
            plan_convert(source, options)


def test_zero_global_scale_is_refused_when_the_weight_overflows(tmp_path: Path) -> None:
    src, _ = quantized_checkpoint(tmp_path / "good", DIALECTS["ct-nvfp4"])
    src = rewritten(src, tmp_path / "bad", {f"{UP}.weight_global_scale": torch.tensor([0.0])})
    with pytest.raises(InputError, match=rf"{UP}.weight_packed, rows from 0, cast to BF16: expected values that fit"):
        convert(src, tmp_path / "dst", dequantize=True)


def test_dequantize_needs_a_quantized_source(small: Path) -> None:
    with open_source(small) as source, pytest.raises(UsageError, match="--dequantize: expected a quantized source"):
        plan_convert(source, ConvertOptions(dequantize=True))


def test_memory_of_dequantizing_stays_within_what_is_planned(tmp_path: Path) -> None:
    """A child restores a wide model in bounded memory; its memory stays near what it was before.

    What the child owns is judged, not the pages of libraries that it touches; and the allocator gives back at once
    what is freed. Beside the planned blocks there are stacks of threads, records and digests; a stack of experts or a
    whole tensor kept in memory would be 32 MiB or more.
    """
    import os
    import subprocess
    import sys

    sizes = {**SIZES, "hidden_size": 2048, "intermediate_size": 4096, "num_hidden_layers": 1}
    src, _ = quantized_checkpoint(tmp_path / "src", DIALECTS["ct-nvfp4"], **sizes)
    code = f"""
from pathlib import Path
from converters.convert import *; from converters.job import run; from converters.pipeline import RunOptions
from converters.source import open_source
import torch
torch.zeros(8).to(torch.bfloat16)
own = lambda: int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024
options, samples = RunOptions(2, 8 << 20), []
with open_source(Path({str(src)!r})) as source:
    plan = plan_convert(source, ConvertOptions(dequantize=True, layout=Layout.FUSED))
    assert plan.summary(options)["peak_block_bytes"] <= 8 << 20
    before = own()
    # called by the workers while they hold their blocks
    run(plan, Path({str(tmp_path / "dst")!r}), options, lambda n: samples.append(own()))
print(len(samples), max(samples) - before)
"""
    allocator = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    environment = {**os.environ, **allocator}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    count, grown = map(int, done.stdout.split())
    assert count > 50
    assert grown < 24 << 20
