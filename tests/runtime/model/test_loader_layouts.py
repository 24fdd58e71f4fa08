"""Every layout and format gives the same model, bit for bit."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import random_tensors, read_tensors, small_config, write_checkpoint
from quantized import DIALECTS, quantized_checkpoint
from safetensors.torch import save_file

from converters.config import Glm4MoeConfig
from converters.convert import ConvertOptions, plan_convert
from converters.errors import ConfigError, InputError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.schema import Role, expand
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.model.loader import LoadedModel, ModelLoader, load_model

FP32 = EngineConfig(dtype="float32")
OTHERS = [layout for layout in Layout if layout is not Layout.SPLIT]


def convert(src: Path, dst: Path, **changes: Any) -> Path:
    with open_source(src) as source:
        run(plan_convert(source, ConvertOptions(**changes)), dst, RunOptions(workers=1), lambda _: None)
    return dst


def quantize(src: Path, dst: Path) -> Path:
    with open_source(src) as source:
        run(plan_quantize(source, QuantizeOptions(scheme="fp8")), dst, RunOptions(workers=1), lambda _: None)
    return dst


@torch.inference_mode()
def logits(loaded: LoadedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return those of the model and of its MTP layer."""
    ids = torch.arange(48).view(2, 24)
    hidden = loaded.model(ids)
    assert loaded.mtp is not None
    drafted = loaded.mtp.draft(loaded.model.embed(ids[:, 1:]), hidden[:, :-1])
    return loaded.model.logits(hidden), loaded.model.logits(drafted)


def assert_same_model(folder: Path, expected: Path, engine: EngineConfig = FP32) -> None:
    ours, theirs = load_model(folder, engine), load_model(expected, engine)
    assert ours.model.state_dict().keys() == theirs.model.state_dict().keys()
    assert all(map(torch.equal, logits(ours), logits(theirs)))
    assert ours.differing_mtp_copies == theirs.differing_mtp_copies


@pytest.fixture(scope="module")
def fp8(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(tiny, tmp_path_factory.mktemp("layouts") / "fp8")


@pytest.mark.parametrize("layout", OTHERS)
def test_trained_model_is_the_same_in_every_layout(tiny: Path, tmp_path: Path, layout: Layout) -> None:
    assert_same_model(convert(tiny, tmp_path / "other", layout=layout), tiny)


@pytest.mark.parametrize("layout", OTHERS)
def test_fp8_model_is_the_same_in_every_layout_and_stays_fp8(fp8: Path, tmp_path: Path, layout: Layout) -> None:
    folder = convert(fp8, tmp_path / "other", layout=layout)
    assert_same_model(folder, fp8)
    codes = [value for value in load_model(folder, FP32).model.parameters() if value.dtype is torch.float8_e4m3fn]
    assert len(codes) == sum(name.endswith("weight_scale") for name in read_tensors(fp8))


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("is_quantized", [False, True])
def test_two_shared_experts_without_their_own_mtp_copies(tmp_path: Path, layout: Layout, is_quantized: bool) -> None:
    config = small_config(n_shared_experts=2)
    schema = expand(Glm4MoeConfig.from_hf(config), mtp_copies=False)
    folder = write_checkpoint(tmp_path / "split", random_tensors(schema), config)
    if is_quantized:
        folder = quantize(folder, tmp_path / "fp8")
    other = convert(folder, tmp_path / "other", layout=layout)
    for dtype in ("float32", "bfloat16"):
        engine = EngineConfig(dtype=dtype)
        expected, found = logits(load_model(folder, engine)), logits(load_model(other, engine))
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", DIALECTS)
def test_quantized_weights_of_every_dialect_are_decoded_on_load(tmp_path: Path, name: str) -> None:
    """In bf16, the dtype in which the expected weights come from the dialect's own decoder; MTP head included."""
    folder, expected = quantized_checkpoint(tmp_path / "src", DIALECTS[name])
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    values = {name: value.contiguous() for name, value in expected.items()}
    plain = write_checkpoint(tmp_path / "plain", values, config)
    engine = EngineConfig(dtype="bfloat16")
    ours, theirs = load_model(folder, engine), load_model(plain, engine)
    assert all(map(torch.equal, logits(ours), logits(theirs)))
    head = expand(Glm4MoeConfig.from_hf(config)).tensor(Role.MTP_HEAD, "head.weight", 3).name
    assert head in ours.differing_mtp_copies


@pytest.mark.parametrize("layout", OTHERS)
@pytest.mark.parametrize("name", ["ct-int4-packed-group", "ct-int8-channel", "deepseek-fp8-block"])
def test_quantized_weights_are_decoded_from_every_layout(tmp_path: Path, name: str, layout: Layout) -> None:
    folder, _ = quantized_checkpoint(tmp_path / "src", DIALECTS[name], head_dim=32, intermediate_size=96)
    assert_same_model(convert(folder, tmp_path / "other", layout=layout), folder)


@pytest.mark.parametrize("layout", Layout)
def test_model_without_correction_bias_has_zeros_and_says_so(tmp_path: Path, layout: Layout) -> None:
    config = small_config()
    tensors = random_tensors(expand(Glm4MoeConfig.from_hf(config)))
    biases = [name for name in tensors if "correction_bias" in name]
    with_zeros = {name: torch.zeros_like(value) if name in biases else value for name, value in tensors.items()}
    zeros = write_checkpoint(tmp_path / "zeros", with_zeros, config)
    for name in biases:
        del tensors[name]
    without = write_checkpoint(tmp_path / "without", tensors, config)
    if layout is not Layout.SPLIT:
        without = convert(without, tmp_path / "other", layout=layout)
    assert_same_model(without, zeros)
    assert load_model(without, FP32).notes == ("No router has a correction bias; engines that ask for one need zeros.",)
    assert load_model(zeros, FP32).notes == ()


@pytest.mark.parametrize("layout", OTHERS)
def test_every_stored_byte_is_read_once(tiny: Path, tmp_path: Path, layout: Layout) -> None:
    """Without MTP copies and with one shared expert no value stands for two weights."""
    with open_source(convert(tiny, tmp_path / "other", layout=layout)) as source:
        loader, read = ModelLoader(source, FP32), []
        loader.fill(loader.parameter_names, read.append)
        copies = {"mtp_embedding", "mtp_head"}
        entries = [
            source.reader.entry(name)
            for name, stored in source.weights.items()
            if stored.stored.elements[0][0].tensor.spec.role not in copies
        ]
        assert sum(read) == loader.total_bytes == sum(entry.nbytes for entry in entries)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a folder with one file."""
    tensors = read_tensors(folder)
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


PACKED = "model.layers.1.mlp.experts.gate_up_proj"
BROKEN: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda tensors: tensors.pop(PACKED), f"tensor {PACKED}: expected in the checkpoint"),
    "expert_missing": (
        lambda tensors: tensors.update({PACKED: tensors[PACKED][:3].clone()}),
        f"tensor {PACKED}: expected shape [4, 48, 48], from config.json, found [3, 48, 48]",
    ),
    "mixed": (
        lambda tensors: tensors.update({"model.layers.1.mlp.experts.0.up_proj.weight": torch.ones(24, 48)}),
        "half of the checkpoint is stored in another layout",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_packed_checkpoint_is_refused_with_the_tensors_name(small: Path, tmp_path: Path, fault: str) -> None:
    folder = convert(small, tmp_path / "packed", layout=Layout.PACKED)
    change, message = BROKEN[fault]
    rewrite(folder, change)
    with pytest.raises(InputError) as caught:
        load_model(folder, FP32)
    assert message in str(caught.value)


def test_layout_that_config_denies_is_refused(small: Path, tmp_path: Path) -> None:
    folder = convert(small, tmp_path / "packed", layout=Layout.PACKED)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "glm4moe_layout": {"name": "fused"}}))
    with pytest.raises(ConfigError, match="expected packed, as the tensors' names show, found 'fused'"):
        load_model(folder, FP32)
