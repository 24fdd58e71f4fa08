"""quantize --scheme fp8: what is quantized, what is not, and what other libraries make of the result."""

import json
from pathlib import Path

import pytest
import torch
from builders import assert_same_tensors, read_tensors, small_checkpoint

from converters.convert import ConvertOptions, plan_convert
from converters.errors import InputError, UsageError
from converters.job import run
from converters.numerics.fp8 import dequantize_channel, quantize_channel
from converters.pipeline import RunOptions
from converters.quant.scheme import Arithmetic
from converters.quantize import QuantizeOptions, plan_quantize
from converters.schema import DtypePolicy, Role, expand
from converters.source import open_source


def quantize(src: Path, dst: Path, **options: object) -> Path:
    with open_source(src) as source:
        plan = plan_quantize(source, QuantizeOptions(scheme="fp8", **options))  # type: ignore[arg-type]
        run(plan, dst, RunOptions(2, 1 << 20), lambda _: None)
    return dst


@pytest.fixture
def fp8(small: Path, tmp_path: Path) -> Path:
    return quantize(small, tmp_path / "fp8")


def test_weights_are_quantized_and_all_else_is_copied_bit_for_bit(small: Path, fp8: Path) -> None:
    source, result = read_tensors(small), read_tensors(fp8)
    with open_source(small) as opened:
        tensors = opened.schema.tensors
    quantized = {name for name, value in result.items() if value.dtype == torch.float8_e4m3fn}
    assert quantized == {name for name, t in tensors.items() if t.spec.dtype is DtypePolicy.QUANTIZABLE}
    assert result.keys() == source.keys() | {name + "_scale" for name in quantized}
    for name in quantized:
        codes, scale = quantize_channel(source[name], Arithmetic.FLOAT32)
        assert torch.equal(result[name].view(torch.uint8), codes.view(torch.uint8)), name
        assert torch.equal(result[name + "_scale"], scale), name
    assert_same_tensors(
        {n: v for n, v in result.items() if n in source and n not in quantized},
        {n: v for n, v in source.items() if n not in quantized},
    )


def test_mtp_layer_is_quantized_like_the_body_except_its_own_parts(fp8: Path) -> None:
    result = read_tensors(fp8)
    mtp = {name.removeprefix("model.layers.3."): value.dtype for name, value in result.items() if ".layers.3." in name}
    assert mtp["self_attn.q_proj.weight"] == mtp["mlp.experts.0.up_proj.weight"] == torch.float8_e4m3fn
    assert mtp["mlp.shared_experts.down_proj.weight"] == torch.float8_e4m3fn
    for name in ("eh_proj.weight", "embed_tokens.weight", "shared_head.head.weight", "enorm.weight", "mlp.gate.weight"):
        assert mtp[name] == torch.bfloat16, name
        assert name + "_scale" not in mtp
    assert mtp["mlp.gate.e_score_correction_bias"] == torch.float32


def test_config_names_every_matrix_that_is_not_quantized(fp8: Path) -> None:
    config = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    assert config["format"] == "float-quantized"
    assert config["ignore"] == [
        "model.embed_tokens",
        "model.layers.1.mlp.gate",
        "model.layers.2.mlp.gate",
        "model.layers.3.mlp.gate",
        "model.layers.3.eh_proj",
        "model.layers.3.embed_tokens",
        "model.layers.3.shared_head.head",
        "lm_head",
    ]
    result = read_tensors(fp8)
    bf16_matrices = {
        n.rsplit(".", 1)[0]
        for n, v in result.items()
        if v.ndim == 2 and v.dtype == torch.bfloat16 and not n.endswith("_scale")
    }
    assert bf16_matrices == set(config["ignore"])


def test_config_is_accepted_by_compressed_tensors_and_matches_the_reference_file(fp8: Path) -> None:
    from compressed_tensors.quantization import QuantizationConfig

    config = json.loads((fp8 / "config.json").read_text())["quantization_config"]
    parsed = QuantizationConfig.model_validate(config)
    scheme = parsed.config_groups["group_0"]
    assert (scheme.weights.strategy, scheme.weights.num_bits, scheme.weights.type) == ("channel", 8, "float")
    assert (scheme.input_activations.strategy, scheme.input_activations.dynamic) == ("token", True)


def test_compressed_tensors_arithmetic_equals_its_own_compressor(small: Path, tmp_path: Path) -> None:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    result = read_tensors(quantize(small, tmp_path / "ct", arithmetic=Arithmetic.COMPRESSED_TENSORS))
    config = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"]["config_groups"][
        "group_0"
    ]
    scheme = QuantizationScheme.model_validate(config)
    compressor = BaseCompressor.get_value_from_registry("float-quantized")
    source, compared = read_tensors(small), 0
    for name, weight in source.items():
        if result[name].dtype != torch.float8_e4m3fn:
            continue
        scale, zero = calculate_qparams(weight.amin(1, keepdim=True), weight.amax(1, keepdim=True), scheme.weights)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero}
        theirs = compressor.compress(state, scheme)
        assert theirs.keys() == {"weight", "weight_scale"}
        assert torch.equal(theirs["weight"].view(torch.uint8), result[name].view(torch.uint8)), name
        assert torch.equal(theirs["weight_scale"], result[name + "_scale"]), name
        compared += 1
    assert compared == 64


def test_transformers_loads_it_and_its_logits_equal_our_dequantized_ones(small: Path, fp8: Path) -> None:
    from compressed_tensors.quantization import disable_quantization
    from transformers import Glm4MoeForCausalLM

    model, info = Glm4MoeForCausalLM.from_pretrained(fp8, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert {key.rpartition(".layers.")[2].partition(".")[0] for key in info["unexpected_keys"]} == {"3"}
    tensors = read_tensors(fp8)
    plain = Glm4MoeForCausalLM.from_pretrained(small, dtype=torch.float32)
    restored = {
        n: dequantize_channel(v, tensors[n + "_scale"]) if v.dtype == torch.float8_e4m3fn else v.float()
        for n, v in tensors.items()
        if not n.endswith("_scale")
    }
    state = packed(restored, plain.state_dict())
    plain.load_state_dict(state)
    # their forward also quantizes activations per token; the weights are what is compared here
    model.apply(disable_quantization)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, model(ids).logits)


def packed(split: dict[str, torch.Tensor], like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return transformers' in-memory layout: experts stacked, gate above up."""
    state = {}
    for name in like:
        base, _, last = name.rpartition(".")
        if not base.endswith(".experts"):
            state[name] = split[name]
            continue
        count = like[name].shape[0]
        parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else ("down_proj",)
        state[name] = torch.stack(
            [torch.cat([split[f"{base}.{expert}.{part}.weight"] for part in parts]) for expert in range(count)]
        )
    return state


def test_bytes_do_not_depend_on_workers_or_block_size(small: Path, tmp_path: Path) -> None:
    files = []
    for name, options in (("a", RunOptions(1, 1 << 30)), ("b", RunOptions(4, 20_000))):
        with open_source(small) as source:
            run(plan_quantize(source, QuantizeOptions(scheme="fp8")), tmp_path / name, options, lambda _: None)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert files[0] == files[1]


def test_quantized_checkpoint_can_be_resharded_with_its_scales(fp8: Path, tmp_path: Path) -> None:
    with open_source(fp8) as source:
        assert source.is_quantized
        run(
            plan_convert(source, ConvertOptions(max_shard_bytes=40_000)),
            tmp_path / "dst",
            RunOptions(2),
            lambda _: None,
        )
        with pytest.raises(UsageError, match="--dtype: expected a source that is not quantized"):
            plan_convert(source, ConvertOptions(dtype="float32"))
        with pytest.raises(UsageError, match="expected an unquantized source"):
            plan_quantize(source, QuantizeOptions(scheme="fp8"))
    assert_same_tensors(read_tensors(fp8), read_tensors(tmp_path / "dst"))
    assert (tmp_path / "dst" / "config.json").read_bytes() == (fp8 / "config.json").read_bytes()


def test_codes_without_their_scale_are_refused(fp8: Path, tmp_path: Path) -> None:
    from builders import write_checkpoint

    tensors = read_tensors(fp8)
    del tensors["model.layers.2.mlp.experts.1.up_proj.weight_scale"]
    folder = write_checkpoint(tmp_path / "bad", tensors, json.loads((fp8 / "config.json").read_text()), 2)
    with pytest.raises(InputError, match="experts.1.up_proj.weight: expected a scale beside its codes"):
        open_source(folder)


def test_fp32_source_has_fp32_scales(tmp_path: Path) -> None:
    src = small_checkpoint(tmp_path / "src", num_shards=1)
    with open_source(src) as source:
        run(plan_convert(source, ConvertOptions(dtype="float32")), tmp_path / "wide", RunOptions(2), lambda _: None)
    result = read_tensors(quantize(tmp_path / "wide", tmp_path / "fp8"))
    assert {value.dtype for name, value in result.items() if name.endswith("_scale")} == {torch.float32}


def test_unknown_scheme_is_refused_with_the_known_ones(small: Path) -> None:
    with open_source(small) as source, pytest.raises(UsageError, match="--scheme: expected one of fp8, .*, found fp9"):
        plan_quantize(source, QuantizeOptions(scheme="fp9"))


def test_plan_of_a_real_model_has_the_bytes_of_its_format(fixtures_dir: Path) -> None:
    """The official GLM-4.5-Air-FP8, with fp32 scales and a quantized MTP head, has 112,558,098,944 bytes."""
    from converters.config import Glm4MoeConfig
    from converters.quant.policy import is_quantized

    config = Glm4MoeConfig.from_hf(json.loads((fixtures_dir / "configs" / "GLM-4.5-Air.json").read_text()))
    tensors = expand(config).tensors.values()
    official = 0
    for tensor in tensors:
        if is_quantized(tensor) or tensor.spec.role is Role.MTP_HEAD:
            official += tensor.numel + 4 * tensor.shape[0]
        else:
            official += tensor.numel * (4 if tensor.spec.dtype is DtypePolicy.KEEP_FP32 else 2)
    assert official == 112_558_098_944
