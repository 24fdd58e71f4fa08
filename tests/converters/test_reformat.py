"""NVFP4 from compressed-tensors to ModelOpt and back: codes keep their bytes, scales their meaning."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from builders import assert_same_tensors, read_tensors, small_checkpoint
from quantized import SIZES
from quantized_from import MAKERS, SCHEMA, write_pair

from converters.compare import compare_structure
from converters.convert import ConvertOptions, plan_convert
from converters.errors import InputError, UsageError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quant.certify import CertifyOptions, certify_folders
from converters.quant.scheme import Format
from converters.quantize import QuantizeOptions, plan_quantize
from converters.reformat import ReformatOptions, plan_reformat
from converters.schema import Role
from converters.source import open_source
from converters.transforms.reciprocal import Reciprocal

CT, MODELOPT = Format.COMPRESSED_TENSORS, Format.MODELOPT
UP = SCHEMA.tensor(Role.EXPERT, "up_proj.weight", 1, 2).module
KEY = SCHEMA.tensor(Role.ATTENTION, "k_proj.weight", 1).module


def reformat(source: Path, to: Path, format_: Format) -> Path:
    with open_source(source) as opened:
        run(plan_reformat(opened, ReformatOptions(format=format_)), to, RunOptions(2), lambda _: None)
    return to


def quantize(source: Path, to: Path, **options: Any) -> Path:
    with open_source(source) as opened:
        run(plan_quantize(opened, QuantizeOptions(**options)), to, RunOptions(2), lambda _: None)
    return to


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "plain", **SIZES, num_hidden_layers=2)


@pytest.fixture
def divisors(tmp_path: Path, plain: Path) -> Path:
    return quantize(plain, tmp_path / "divisors", scheme="nvfp4-weight-only")


def test_reciprocal_there_and_back_is_one_unit_off_at_most_and_then_stays() -> None:
    """All significands: exponents only shift the values."""
    ones = np.arange(1 << 23, dtype=np.uint32) | np.uint32(0x3F800000)
    first = torch.from_numpy(ones.view(np.float32)).view(-1, 1)
    (there,) = Reciprocal()(first)
    (back,) = Reciprocal()(there)
    (again,) = Reciprocal()(back)
    distance = (back.view(torch.int32) - first.view(torch.int32)).abs()
    assert int(distance.max()) == 1
    assert 0.8 < float((distance == 0).float().mean()) < 0.85
    assert torch.equal(again, there)


def test_codes_and_local_scales_keep_their_bytes(tmp_path: Path, plain: Path, divisors: Path) -> None:
    there = reformat(divisors, tmp_path / "there", MODELOPT)
    before, after = read_tensors(divisors), read_tensors(there)
    assert torch.equal(after[f"{UP}.weight"], before[f"{UP}.weight_packed"])
    assert torch.equal(after[f"{UP}.weight_scale"].view(torch.uint8), before[f"{UP}.weight_scale"].view(torch.uint8))
    assert after[f"{UP}.weight_scale_2"].shape == ()
    assert float(after[f"{UP}.weight_scale_2"]) == float(1 / before[f"{UP}.weight_global_scale"])
    assert len(after) == len(before)
    certificate = certify_folders(plain, there, CertifyOptions(), lambda total: lambda done: None)
    assert certificate.findings == ()
    assert compare_structure(plain, there).findings == ()


def test_there_and_back_and_there_gives_the_same_bytes(tmp_path: Path, divisors: Path) -> None:
    there = reformat(divisors, tmp_path / "there", MODELOPT)
    back = reformat(there, tmp_path / "back", CT)
    again = reformat(back, tmp_path / "again", MODELOPT)
    assert_same_tensors(read_tensors(again), read_tensors(there))
    assert (again / "config.json").read_bytes() == (there / "config.json").read_bytes()
    before, after = read_tensors(divisors), read_tensors(back)
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith("weight_global_scale"):
            assert int((value.view(torch.int32) - after[name].view(torch.int32)).abs()) <= 1
        else:
            assert torch.equal(value.reshape(-1).view(torch.uint8), after[name].reshape(-1).view(torch.uint8)), name
    assert not (back / "hf_quant_config.json").exists()
    assert compare_structure(there, back).findings == ()


@pytest.mark.parametrize("preset", [None, "experts-only"])
def test_config_is_what_quantize_writes(tmp_path: Path, plain: Path, preset: str | None) -> None:
    options: dict[str, Any] = {"scheme": "nvfp4-weight-only", "preset": preset}
    divisors = quantize(plain, tmp_path / "ct", **options)
    factors = quantize(plain, tmp_path / "mo", **options, format=MODELOPT)
    there = reformat(divisors, tmp_path / "there", MODELOPT)
    back = reformat(factors, tmp_path / "back", CT)
    for ours, theirs, name in (
        (there, factors, "config.json"),
        (there, factors, "hf_quant_config.json"),
        (back, divisors, "config.json"),
    ):
        assert json.loads((ours / name).read_bytes()) == json.loads((theirs / name).read_bytes())


def test_card_of_the_old_format_is_left_out(tmp_path: Path, divisors: Path) -> None:
    assert "compressed-tensors" in (divisors / "README.md").read_text()
    with open_source(divisors) as opened:
        for plan in (
            plan_reformat(opened, ReformatOptions(format=MODELOPT)),
            plan_convert(opened, ConvertOptions(dequantize=True)),
        ):
            assert plan.notes == ("README.md of the source is left out: it describes the format that it has there.",)
            run(plan, tmp_path / "dst", RunOptions(2), lambda _: None)
            assert not (tmp_path / "dst" / "README.md").exists()
            assert (tmp_path / "dst" / "LICENSE").exists()
            shutil.rmtree(tmp_path / "dst")
        assert "README.md" in plan_convert(opened, ConvertOptions(max_shard_bytes=1 << 20)).passthrough


def test_scales_of_inputs_and_of_the_cache_go_along(tmp_path: Path) -> None:
    def change(stored: dict[str, torch.Tensor]) -> None:
        for name in [name for name in stored if name.endswith("weight_global_scale")]:
            stored[name.replace("weight_global", "input_global")] = torch.tensor([20.0])
        stored[f"{KEY.rpartition('.')[0]}.k_scale"] = torch.tensor([0.5], dtype=torch.bfloat16)

    _, copy = write_pair(tmp_path, MAKERS["ct-nvfp4"], change)
    there = reformat(copy, tmp_path / "there", MODELOPT)
    tensors = read_tensors(there)
    assert float(tensors[f"{UP}.input_scale"]) == float(torch.tensor(20.0).reciprocal())
    assert (tensors[f"{KEY}.k_scale"].shape, float(tensors[f"{KEY}.k_scale"])) == ((), 0.5)
    block = json.loads((there / "config.json").read_bytes())["quantization_config"]
    assert (block["quant_algo"], block["kv_cache_scheme"]["num_bits"]) == ("NVFP4", 8)
    assert compare_structure(copy, there).findings == ()
    back = read_tensors(reformat(there, tmp_path / "back", CT))
    assert back.keys() == read_tensors(copy).keys()


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-39])
@pytest.mark.parametrize("suffix", ["weight_global_scale", "input_global_scale"])
def test_a_global_scale_without_reciprocal_is_refused(tmp_path: Path, suffix: str, value: float) -> None:
    def change(stored: dict[str, torch.Tensor]) -> None:
        for name in [name for name in stored if name.endswith("weight_global_scale")]:
            stored[name.replace("weight_global", "input_global")] = torch.tensor([20.0])
        stored[f"{UP}.{suffix}"] = torch.tensor([value])

    _, copy = write_pair(tmp_path, MAKERS["ct-nvfp4"], change)
    with open_source(copy) as opened, pytest.raises(InputError, match=rf"{UP}\.{suffix}: expected a positive, finite"):
        plan_reformat(opened, ReformatOptions(format=MODELOPT))


def test_an_input_scale_that_some_weights_lack_is_refused(tmp_path: Path) -> None:
    _, copy = write_pair(
        tmp_path, MAKERS["ct-nvfp4"], lambda stored: stored.update({f"{UP}.input_global_scale": torch.tensor([9.0])})
    )
    with open_source(copy) as opened, pytest.raises(InputError, match="a scale of its inputs, as other weights have"):
        plan_reformat(opened, ReformatOptions(format=MODELOPT))


@pytest.mark.parametrize(
    ("name", "to", "message"),
    [
        ("ct-fp8-channel", MODELOPT, "expected NVFP4 weights of the other dialect"),
        ("ct-nvfp4", CT, "expected NVFP4 weights of the other dialect"),
        ("modelopt-nvfp4", MODELOPT, "expected NVFP4 weights of the other dialect"),
    ],
)
def test_other_sources_are_refused(tmp_path: Path, name: str, to: Format, message: str) -> None:
    source, copy = write_pair(tmp_path, MAKERS[name])
    with open_source(copy) as opened, pytest.raises(UsageError, match=message):
        plan_reformat(opened, ReformatOptions(format=to))
    with open_source(source) as opened, pytest.raises(UsageError, match="no quantized weight in it"):
        plan_reformat(opened, ReformatOptions(format=to))


def test_another_layout_is_refused(tmp_path: Path, divisors: Path) -> None:
    with open_source(divisors) as opened:
        run(plan_convert(opened, ConvertOptions(layout=Layout.PACKED)), tmp_path / "p", RunOptions(2), lambda _: None)
    with open_source(tmp_path / "p") as opened, pytest.raises(UsageError, match="split layout, found packed"):
        plan_reformat(opened, ReformatOptions(format=MODELOPT))
