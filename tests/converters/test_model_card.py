"""Errors measured while writing, and the model card that shows them."""

import json
import math
from pathlib import Path

import pytest
import torch
from builders import read_tensors, small_checkpoint
from huggingface_hub import ModelCard

from converters.job import run
from converters.official import OfficialTensors, read_unit
from converters.pipeline import RunOptions
from converters.quant.quality import SAMPLE_EVERY, TensorQuality, by_role, mean, worst
from converters.quant.scheme import Arithmetic
from converters.quantize import QuantizeOptions, plan_quantize
from converters.source import open_source
from converters.transforms.quantize import QuantizeFp8Channel
from converters.transforms.restore import Sampler

SCHEMES = {
    "fp8": {"scheme": "fp8"},
    "fp8-block": {"scheme": "fp8-block"},
    "int8": {"scheme": "int8"},
    "int8-weight-only": {"scheme": "int8-weight-only"},
    "int8-weight-only-32": {"scheme": "int8-weight-only", "group_size": "32"},
    "nvfp4-weight-only": {"scheme": "nvfp4-weight-only"},
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A checkpoint whose widths are whole blocks of 128, with tensors of more than one sampled row."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128}
    return small_checkpoint(tmp_path / "source", **sizes, num_attention_heads=16, num_key_value_heads=8, head_dim=8)


def quantize(src: Path, dst: Path, options: RunOptions | None = None, **chosen: str) -> Path:
    with open_source(src) as opened:
        run(plan_quantize(opened, QuantizeOptions(**chosen)), dst, options or RunOptions(), lambda n: None)
    return dst


def recorded(folder: Path) -> dict[str, TensorQuality]:
    tensors = json.loads((folder / "glm4moe-manifest.json").read_text())["tensors"]
    return {name: TensorQuality(**tensor["quality"]) for name, tensor in tensors.items() if "quality" in tensor}


def test_of_sums_is_the_definition() -> None:
    found = TensorQuality.of_sums([1.0, 3.0], [100.0, 300.0], clipped=2, count=8)
    assert found == TensorQuality(0.1, 0.25)
    assert found.sqnr_db == pytest.approx(20.0)
    assert TensorQuality.of_sums([0.0], [0.0], 0, 4) == TensorQuality(0.0, 0.0)
    assert TensorQuality(0.0, 0.0).sqnr_db == math.inf


@pytest.mark.parametrize("exponent", [-100, -70, 60, 90])
def test_tiny_and_huge_weights_have_the_errors_of_others(exponent: int) -> None:
    """Their squares were 0 or infinite: an error of 0, or none that is a number."""
    rows_RC = torch.randn(32, 16, generator=torch.Generator().manual_seed(0))
    codes, scale_R1 = rows_RC.to(torch.float8_e4m3fn), torch.ones(32, 1)
    found = []
    for factor in (1.0, 2.0**exponent):
        sampler = Sampler(QuantizeFp8Channel(Arithmetic.FLOAT32))
        sampler.add(0, rows_RC * factor, (codes, scale_R1 * factor), SAMPLE_EVERY)
        found.append(sampler.quality)
    assert found[0] == found[1]
    assert 0.01 < found[0].relative_error < 0.1


def test_summaries() -> None:
    expert, attention = "model.layers.3.mlp.experts.{}.up_proj.weight_packed", "model.layers.0.self_attn.o_proj.weight"
    quality = {
        attention: TensorQuality(0.3, 0.0),
        expert.format(1): TensorQuality(0.1, 0.5),
        expert.format(0): TensorQuality(0.3, 0.1),
    }
    assert by_role(quality) == {
        "attention": [TensorQuality(0.3, 0.0)],
        "expert": [TensorQuality(0.3, 0.1), TensorQuality(0.1, 0.5)],
    }
    assert mean(by_role(quality)["expert"]) == TensorQuality(0.2, 0.3)
    # equal errors in the order of their names
    assert [name for name, _ in worst(quality, 2)] == [attention, expert.format(0)]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_recorded_errors_are_those_of_the_files(source: Path, tmp_path: Path, scheme: str) -> None:
    dst = quantize(source, tmp_path / "dst", **SCHEMES[scheme])
    quality, original = recorded(dst), read_tensors(source)
    assert len(quality) > 20
    with open_source(dst) as opened:
        official = OfficialTensors.of(opened, "F32")
        for name, figures in quality.items():
            module = name.rpartition(".")[0]
            tensor = opened.schema.tensors[f"{module}.weight"]
            units = official.units(tensor)
            restored = read_unit(opened.reader, units[tensor.name]).float()
            scale = units.get(f"{module}.weight_scale")
            if scale is not None and restored.shape == tensor.shape and len(units) > 1:
                restored = restored * read_unit(opened.reader, scale).float()
            rows = slice(None, None, SAMPLE_EVERY)
            weight = original[tensor.name].double()[rows]
            error = (restored.double()[rows] - weight).norm() / weight.norm()
            assert figures.relative_error == pytest.approx(float(error), rel=1e-5), name
            assert 0 < figures.relative_error < 0.12
            assert 0 <= figures.clipped < 0.2


def test_clipped_counts_what_is_beyond_the_largest_code(tmp_path: Path) -> None:
    # 127.5 steps of int8 reach the largest magnitude, so that a row's largest positive weight is clipped, no other
    src = small_checkpoint(tmp_path / "src")
    tensors = read_tensors(src)
    quality = recorded(quantize(src, tmp_path / "dst", scheme="int8"))
    name = "model.layers.0.mlp.up_proj.weight"
    codes, scale = (read_tensors(tmp_path / "dst")[f"{name}{suffix}"] for suffix in ("", "_scale"))
    rows = slice(None, None, SAMPLE_EVERY)
    beyond = (tensors[name].float().abs() > 127 * scale.float())[rows]
    assert codes.dtype is torch.int8
    assert 0 < quality[name].clipped == pytest.approx(float(beyond.double().mean()), rel=1e-5)


def test_errors_and_card_do_not_depend_on_blocks_or_workers(source: Path, tmp_path: Path) -> None:
    one = quantize(source, tmp_path / "one", RunOptions(1, 1 << 30), scheme="nvfp4-weight-only")
    many = quantize(source, tmp_path / "many", RunOptions(3, 100_000), scheme="nvfp4-weight-only")
    for file in ("glm4moe-manifest.json", "README.md"):
        assert (one / file).read_bytes() == (many / file).read_bytes()


def test_card_says_what_it_is_and_takes_over_the_licence(source: Path, tmp_path: Path) -> None:
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [en, zh]\nwidget: [1]\n---\n# The base\n")
    card = ModelCard.load(quantize(source, tmp_path / "dst", scheme="fp8") / "README.md")
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "license": "mit",
        "language": ["en", "zh"],
        "tags": ["glm4_moe", "compressed-tensors", "fp8", "glm4moe"],
        "quantized_by": "glm4moe",
    }
    assert "The base" not in card.text
    assert "| router | 2 | 1,024 | as in the source |" in card.text
    assert "| expert, MTP layer | 12 | 196,608 | fp8 |" in card.text
    assert "vllm serve . --tensor-parallel-size N" in card.text
    assert "- Data-free: no text was used." in card.text
    assert str(tmp_path) not in card.text


def test_card_of_a_released_model_names_its_base() -> None:
    from converters.checkpoint.plan import OutputPlan, OutputTensor, Shard, SourceRows, Unit
    from converters.model_card import CardFacts, build_card
    from converters.transforms.rows import Copy

    plan = OutputPlan((Shard("a", (Unit((OutputTensor("x", "BF16", (8,)),), (SourceRows("x", 0, 8),), Copy()),)),))
    facts = CardFacts(
        base="GLM-4.6",
        repository="zai-org/GLM-4.6",
        scheme="experts=nvfp4,attention=fp8",
        format="compressed-tensors",
        options="--scheme experts=nvfp4,attention=fp8",
        version="1",
        source_digest="0" * 64,
        num_parameters=8,
        num_bytes=plan.total_bytes,
        weights=[],
        calibration=["- Calibrated: num tokens 512"],
        notes=["TensorRT-LLM does not."],
        quality={},
        serving=[],
        tensor_parallel="1, 2",
    )
    text = build_card(facts, "").decode()
    metadata = ModelCard(text).data.to_dict()
    assert metadata["base_model"] == "zai-org/GLM-4.6"
    assert metadata["base_model_relation"] == "quantized"
    assert metadata["tags"] == ["glm4_moe", "compressed-tensors", "experts", "nvfp4", "attention", "fp8", "glm4moe"]
    assert "16.00 bits per parameter" in text
    assert "## Errors\n\nNot measured." in text
    assert "- Calibrated: num tokens 512" in text
    assert "- TensorRT-LLM does not." in text
