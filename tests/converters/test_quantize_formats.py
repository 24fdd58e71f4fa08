"""Every scheme in every format: names, dtypes, shapes and JSON as on disk, and what other libraries decode."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import assert_same_tensors, read_tensors
from quantized import nvfp4_values
from quantizing import block_of, checkpoint, quantize, statistics

from converters.compare import compare_structure
from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.pipeline import RunOptions
from converters.quant.scheme import SCHEMES_BY_FORMAT, Arithmetic
from converters.schema import DtypePolicy
from converters.source import open_source

Parts = dict[str, torch.Tensor]
REFERENCE = Path(__file__).parent / "formats" / "reference_configs.json"
CASES = [(str(format_), scheme, None) for format_, names in SCHEMES_BY_FORMAT.items() for scheme in names]
CASES += [("compressed-tensors", "int8-weight-only", group) for group in ("32", "64", "128")]
F8, BF16, F32 = torch.float8_e4m3fn, torch.bfloat16, torch.float32
Shape = Callable[[int, int], tuple[int, ...]]


def cells(size: int) -> int:
    return -(-size // 128)


CODES: tuple[torch.dtype, Shape] = (F8, lambda n, k: (n, k))
COLUMN: Shape = lambda n, _: (n, 1)  # noqa: E731
SINGLE: tuple[torch.dtype, Shape] = (F32, lambda *_: (1,))
SCALAR: tuple[torch.dtype, Shape] = (F32, lambda *_: ())
LOCAL: tuple[torch.dtype, Shape] = (F8, lambda n, k: (n, k // 16))
NIBBLES: tuple[torch.dtype, Shape] = (torch.uint8, lambda n, k: (n, k // 2))
WORDS: dict[str, tuple[torch.dtype, Shape]] = {
    "weight_packed": (torch.int32, lambda n, k: (n, k // 4)),
    "weight_shape": (torch.int64, lambda *_: (2,)),
}
# dtype of each part, and its shape for a weight (N, K)
PARTS: dict[tuple[str, str, str | None], dict[str, tuple[torch.dtype, Shape]]] = {
    ("compressed-tensors", "fp8", None): {"weight": CODES, "weight_scale": (BF16, COLUMN)},
    ("compressed-tensors", "fp8-block", None): {
        "weight": CODES,
        "weight_scale": (BF16, lambda n, k: (cells(n), cells(k))),
    },
    ("compressed-tensors", "fp8-static", None): {
        "weight": CODES,
        "weight_scale": (BF16, lambda *_: (1,)),
        "input_scale": (BF16, lambda *_: (1,)),
    },
    ("compressed-tensors", "int8", None): {
        "weight": (torch.int8, lambda n, k: (n, k)),
        "weight_scale": (BF16, COLUMN),
    },
    ("compressed-tensors", "int8-weight-only", None): {**WORDS, "weight_scale": (BF16, COLUMN)},
    ("compressed-tensors", "int8-weight-only", "32"): {**WORDS, "weight_scale": (BF16, lambda n, k: (n, k // 32))},
    ("compressed-tensors", "int8-weight-only", "64"): {**WORDS, "weight_scale": (BF16, lambda n, k: (n, k // 64))},
    ("compressed-tensors", "int8-weight-only", "128"): {**WORDS, "weight_scale": (BF16, lambda n, k: (n, k // 128))},
    ("compressed-tensors", "nvfp4", None): {
        "weight_packed": NIBBLES,
        "weight_scale": LOCAL,
        "weight_global_scale": SINGLE,
        "input_global_scale": SINGLE,
    },
    ("compressed-tensors", "nvfp4-weight-only", None): {
        "weight_packed": NIBBLES,
        "weight_scale": LOCAL,
        "weight_global_scale": SINGLE,
    },
    ("modelopt", "fp8", None): {"weight": CODES, "weight_scale": (F32, lambda n, _: (n,))},
    ("modelopt", "fp8-block", None): {
        "weight": CODES,
        "weight_scale": (F32, lambda n, k: (cells(n), 1, cells(k), 1)),
    },
    ("modelopt", "fp8-static", None): {"weight": CODES, "weight_scale": SCALAR, "input_scale": SCALAR},
    ("modelopt", "nvfp4", None): {
        "weight": NIBBLES,
        "weight_scale": LOCAL,
        "weight_scale_2": SCALAR,
        "input_scale": SCALAR,
    },
    ("modelopt", "nvfp4-weight-only", None): {"weight": NIBBLES, "weight_scale": LOCAL, "weight_scale_2": SCALAR},
    ("deepseek", "fp8-block", None): {
        "weight": CODES,
        "weight_scale_inv": (F32, lambda n, k: (cells(n), cells(k))),
    },
}
# relative error of the worst weight of Gauss, a tenth above what was measured with the libraries
BANDS = {
    "fp8": (0.022, 0.0295),
    "fp8-block": (0.022, 0.0295),
    "fp8-static": (0.022, 0.0295),
    "int8": (0.005, 0.0100),
    "int8-weight-only": (0.004, 0.0100),
    "nvfp4": (0.07, 0.1045),
    "nvfp4-weight-only": (0.07, 0.1045),
}


@pytest.fixture(scope="module")
def src(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("formats") / "src")


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(filter(None, case)))
def result(
    request: pytest.FixtureRequest, src: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[tuple[str, str, str | None], Path]:
    format_, scheme, group = request.param
    dst = tmp_path_factory.mktemp("result") / "dst"
    quantize(src, dst, scheme, format=format_, group_size=group)
    return request.param, dst


def quantized_modules(src: Path, tensors: Parts) -> list[str]:
    with open_source(src) as source:
        modules = [t.module for t in source.schema.tensors.values() if t.spec.dtype is DtypePolicy.QUANTIZABLE]
    return [module for module in modules if tensors.get(f"{module}.weight", torch.empty(0)).dtype != BF16]


def parts_of(tensors: Parts, module: str) -> Parts:
    found = {name.rpartition(".")[2]: value for name, value in tensors.items() if name.rpartition(".")[0] == module}
    return {name: value for name, value in found.items() if name != "bias"}


def test_parts_have_the_names_dtypes_and_shapes_of_the_format(
    src: Path, result: tuple[tuple[str, str, str | None], Path]
) -> None:
    (format_, scheme, group), dst = result
    source, tensors = read_tensors(src), read_tensors(dst)
    modules = quantized_modules(src, tensors)
    with_mtp = format_ != "modelopt" and not scheme.startswith("nvfp4") and scheme != "fp8-static"
    assert any(module.startswith("model.layers.2.") for module in modules) == with_mtp
    expected = PARTS[format_, scheme, group]
    found: set[str] = set()
    for module in modules:
        weight = source[f"{module}.weight"]
        parts = parts_of(tensors, module)
        assert parts.keys() == expected.keys(), module
        for name, part in parts.items():
            dtype, shape = expected[name]
            assert (part.dtype, tuple(part.shape)) == (dtype, shape(*weight.shape)), f"{module}.{name}"
        found |= {f"{module}.{name}" for name in parts}
    rest = {name: value for name, value in source.items() if name.rpartition(".")[0] not in modules or "bias" in name}
    assert_same_tensors(rest, {name: value for name, value in tensors.items() if name not in found})


def decoded(case: tuple[str, str, str | None], block: dict[str, Any], parts: Parts) -> torch.Tensor:
    """Return the weight that other libraries' code, or a formula of the format, makes of the parts."""
    format_, scheme, _ = case
    if format_ == "compressed-tensors":
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        group = block["config_groups"]["group_0"]
        compressor = BaseCompressor.get_value_from_registry(group["format"])
        return compressor.decompress(dict(parts), QuantizationScheme.model_validate(group))["weight"].float()
    if scheme.startswith("nvfp4"):
        scale = parts["weight_scale"].float() * parts["weight_scale_2"]
        return nvfp4_values(parts["weight"]) * scale.repeat_interleave(16, 1)
    codes = parts["weight"].float()
    if scheme == "fp8-block":
        scale = parts.get("weight_scale", parts.get("weight_scale_inv"))
        assert scale is not None
        cells = scale.reshape(-(-codes.shape[0] // 128), -1)
        return codes * cells.repeat_interleave(128, 0)[: codes.shape[0]].repeat_interleave(128, 1)
    scale = parts["weight_scale"]
    return codes * (scale[:, None] if scale.ndim else scale)


def test_others_decode_what_we_decode_within_the_bands_of_the_format(
    src: Path, result: tuple[tuple[str, str, str | None], Path], tmp_path: Path
) -> None:
    case, dst = result
    with open_source(dst) as opened:
        plan = plan_convert(opened, ConvertOptions(dequantize=True, dtype="float32"))
        run(plan, tmp_path / "plain", RunOptions(2), lambda _: None)
    source, tensors, plain = read_tensors(src), read_tensors(dst), read_tensors(tmp_path / "plain")
    errors = []
    for module in quantized_modules(src, tensors):
        theirs = decoded(case, block_of(dst), parts_of(tensors, module))
        ours, weight = plain[f"{module}.weight"], source[f"{module}.weight"].float()
        # the library rounds to bf16 where its scales are
        rounded = ours.to(BF16).float()
        assert torch.equal(theirs, ours) or torch.equal(theirs, rounded), module
        errors.append(float((ours - weight).norm() / weight.norm()))
    low, high = BANDS[case[1]]
    assert low < min(errors) <= max(errors) < high


def test_config_is_the_one_of_the_reference_files(result: tuple[tuple[str, str, str | None], Path]) -> None:
    (format_, scheme, group), dst = result
    block = block_of(dst)
    known = json.loads(REFERENCE.read_text())
    expected = known.get(f"{format_} {scheme}{f' {group}' if group else ''}")
    if expected is not None:
        lists = {"ignore": block.get("ignore"), "modules_to_not_convert": block.get("modules_to_not_convert")}
        assert block == {**expected, **{key: value for key, value in lists.items() if value is not None}}
    if format_ == "compressed-tensors":
        from compressed_tensors.quantization import QuantizationConfig

        parsed = QuantizationConfig.model_validate(block)
        assert parsed.quantization_status == "compressed"
        assert parsed.format == block["format"] == parsed.config_groups["group_0"].format
    file = dst / "hf_quant_config.json"
    assert file.exists() == (format_ == "modelopt")
    manifest = json.loads((dst / "glm4moe-manifest.json").read_text())
    assert ("hf_quant_config.json" in manifest["files"]) == file.exists()
    if file.exists():
        nested = json.loads(file.read_text())
        assert nested["producer"] == {"name": "modelopt", "version": "0.47.0"}
        assert nested["quantization"]["quant_algo"] == block["quant_algo"]
        assert nested["quantization"]["exclude_modules"] == block["ignore"]
        assert nested["quantization"]["kv_cache_quant_algo"] is None
        assert nested["quantization"].get("group_size") == (16 if "nvfp4" in scheme else None)


def test_structure_is_what_the_config_declares(src: Path, result: tuple[tuple[str, str, str | None], Path]) -> None:
    assert compare_structure(src, result[1]).findings == ()


def test_every_scheme_of_every_format_has_its_parts_written_down() -> None:
    assert PARTS.keys() == set(CASES)


@pytest.mark.parametrize("scheme", ["fp8-static", "nvfp4", "nvfp4-weight-only"])
@pytest.mark.parametrize("format_", ["compressed-tensors", "modelopt"])
def test_weights_that_engines_fuse_share_their_tensor_scales(
    src: Path, tmp_path: Path, scheme: str, format_: str
) -> None:
    quantize(src, tmp_path / "dst", scheme, format=format_, mtp="quantize")
    tensors = read_tensors(tmp_path / "dst")
    scalar = {
        ("fp8-static", "compressed-tensors"): ("weight_scale", "input_scale"),
        ("fp8-static", "modelopt"): ("weight_scale", "input_scale"),
        ("nvfp4", "compressed-tensors"): ("weight_global_scale", "input_global_scale"),
        ("nvfp4", "modelopt"): ("weight_scale_2", "input_scale"),
        ("nvfp4-weight-only", "compressed-tensors"): ("weight_global_scale",),
        ("nvfp4-weight-only", "modelopt"): ("weight_scale_2",),
    }[scheme, format_]
    groups = [
        ("model.layers.0.self_attn.{}_proj", "qkv"),
        ("model.layers.2.self_attn.{}_proj", "qkv"),
        ("model.layers.0.mlp.{}_proj", ("gate", "up")),
        ("model.layers.1.mlp.shared_experts.{}_proj", ("gate", "up")),
        *((f"model.layers.{layer}.mlp.experts.{e}.{{}}_proj", ("gate", "up")) for layer in (1, 2) for e in (0, 1)),
    ]
    seen = set()
    for pattern, members in groups:
        for suffix in scalar:
            values = {float(tensors[f"{pattern.format(member)}.{suffix}"]) for member in members}
            assert len(values) == 1, f"{pattern} {suffix}"
            seen |= {(suffix, value) for value in values}
    # and not all the same
    assert len(seen) > len(groups) / 2


def test_input_scales_are_the_largest_of_the_group_and_never_one(src: Path, tmp_path: Path) -> None:
    stats = statistics(src)
    group = [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    largest = max(stats.input_amax[module] for module in group)
    for format_, name, expected in (
        ("compressed-tensors", "input_global_scale", 2688 / largest),
        ("modelopt", "input_scale", largest / 2688),
    ):
        quantize(src, tmp_path / format_, "nvfp4", format=format_)
        tensors = read_tensors(tmp_path / format_)
        assert {float(tensors[f"{module}.{name}"]) for module in group} == {float(torch.tensor(expected))}
        assert all(float(value) != 1.0 for key, value in tensors.items() if key.endswith(name))
    quantize(src, tmp_path / "static", "fp8-static")
    scale = read_tensors(tmp_path / "static")[f"{group[0]}.input_scale"]
    assert torch.equal(scale, torch.tensor([largest / 448]).to(BF16))


@pytest.mark.parametrize(("scheme", "fits"), [("fp8", 448), ("int8", 127.5)])
def test_fp16_and_fp32_weights_have_fp32_scales(src: Path, tmp_path: Path, scheme: str, fits: float) -> None:
    for dtype in ("float16", "float32"):
        with open_source(src) as source:
            run(plan_convert(source, ConvertOptions(dtype=dtype)), tmp_path / dtype, RunOptions(2), lambda _: None)
        quantize(tmp_path / dtype, tmp_path / f"{dtype}-q", scheme)
        weight = read_tensors(tmp_path / dtype)["lm_head.weight"]
        assert weight.dtype == getattr(torch, dtype)
        tensors = read_tensors(tmp_path / f"{dtype}-q")
        name = "model.layers.1.self_attn.o_proj.weight"
        amax = read_tensors(tmp_path / dtype)[name].float().abs().amax(1, keepdim=True)
        assert torch.equal(tensors[f"{name}_scale"], amax / fits)
    quantize(tmp_path / "float16", tmp_path / "library", scheme, arithmetic=Arithmetic.COMPRESSED_TENSORS)
    assert read_tensors(tmp_path / "library")[f"{name}_scale"].dtype == torch.float16


@pytest.mark.parametrize("layout", ["packed", "fused", "fused-shared"])
@pytest.mark.parametrize("scheme", ["fp8-block", "nvfp4"])
def test_source_in_any_layout_gives_the_same_tensors(src: Path, tmp_path: Path, layout: str, scheme: str) -> None:
    from converters.layout import Layout

    with open_source(src) as source:
        plan = plan_convert(source, ConvertOptions(layout=Layout(layout)))
        run(plan, tmp_path / "there", RunOptions(2), lambda _: None)
    assert "glm4moe_layout" in json.loads((tmp_path / "there" / "config.json").read_text())
    quantize(src, tmp_path / "a", scheme)
    quantize(tmp_path / "there", tmp_path / "b", scheme)
    assert_same_tensors(read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b"))
    assert (tmp_path / "a" / "config.json").read_bytes() == (tmp_path / "b" / "config.json").read_bytes()


@pytest.mark.parametrize("group", [None, "64"])
def test_transformers_loads_packed_int8_with_the_weights_that_we_decode(
    src: Path, tmp_path: Path, group: str | None
) -> None:
    from transformers import Glm4MoeForCausalLM

    quantize(src, tmp_path / "dst", "int8-weight-only", group_size=group)
    with open_source(tmp_path / "dst") as opened:
        plan = plan_convert(opened, ConvertOptions(dequantize=True, dtype="float32"))
        run(plan, tmp_path / "plain", RunOptions(2), lambda _: None)
    model, info = Glm4MoeForCausalLM.from_pretrained(tmp_path / "dst", dtype=torch.float32, output_loading_info=True)
    plain = Glm4MoeForCausalLM.from_pretrained(tmp_path / "plain", dtype=torch.float32).state_dict()
    assert not info["missing_keys"]
    assert {key.rpartition(".layers.")[2].partition(".")[0] for key in info["unexpected_keys"]} == {"2"}
    with torch.no_grad():
        # linear layers are decompressed at the first use
        model(torch.arange(4)[None])
    found = model.state_dict()
    assert len(plain) > 20
    for name, ours in plain.items():
        # it keeps experts in the dtype of their scales
        assert torch.equal(found[name], ours.to(found[name].dtype)), name
