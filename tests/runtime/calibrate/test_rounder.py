"""Weights rounded on the way: better than plain rounding on the trained model, and seen by the layers above."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import read_tensors, small_checkpoint

from converters.convert import ConvertOptions, plan_convert
from converters.errors import InputError, ResourceError, UsageError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quant.choice import QuantizeOptions
from converters.quant.rounded import MANIFEST, Rounded
from converters.quant.scheme import Format, Preset
from converters.quantize import plan_quantize
from converters.source import open_source
from runtime.calibrate.gptq import Hessian, gptq
from runtime.calibrate.grid import Grid
from runtime.calibrate.layers import Stream
from runtime.calibrate.options import CalibrateOptions
from runtime.calibrate.run import CalibrationJob, Rounding, planned
from runtime.calibrate.text import CalibrationText
from runtime.config import EngineConfig
from runtime.model.loader import load_model
from tests.in_memory_comparison import LogitsOptions, compare_logits, encode_text
from tests.runtime.calibrate.conftest import job_on, random_windows

WINDOWS = random_windows(60, 50, 40)
INT8 = QuantizeOptions(scheme="int8-weight-only")
NVFP4 = QuantizeOptions(scheme="nvfp4-weight-only")
# sizes that divide into groups of 16
SIZES = {"moe_intermediate_size": 32, "intermediate_size": 80}
ONE = RunOptions(workers=1)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "source", **SIZES)


def rounded(folder: Path, options: QuantizeOptions, to: Path, **how: object):
    """Calibrate with rounding; return the statistics and the folder as it is read."""
    with open_source(folder) as source:
        text = CalibrationText(WINDOWS, ({"sha256": "0" * 64},), sum(map(len, WINDOWS)))
        stats = CalibrationJob(source, text, CalibrateOptions(**how), Rounding(options, to)).run()
    return stats, Rounded.load(to)


def quantized(folder: Path, options: QuantizeOptions, to: Path) -> Path:
    with open_source(folder) as source:
        run(plan_quantize(source, options), to, ONE, float)
    return to


@pytest.mark.parametrize("options", [NVFP4, replace(INT8, group_size="32")], ids=["nvfp4", "int8"])
def test_modules_and_held_out_text_lose_less_than_by_plain_rounding(tiny, held_out, tmp_path, options):
    words = held_out.read_text()
    half = len(words) // 2
    (tmp_path / "text.txt").write_text(words[:half])
    how = CalibrateOptions(num_tokens=2048, context_length=256)
    with planned(tiny, [tmp_path / "text.txt"], how, Rounding(options, tmp_path / "gptq")) as job:
        job.run()
        assert len(job.recipes) > 200
    errors = json.loads((tmp_path / "gptq" / MANIFEST).read_text())["errors"]
    assert len(errors) == len(job.recipes)
    assert [module for module, (plain, ours) in errors.items() if not ours < plain] == []
    ratios = sorted(ours / plain for plain, ours in errors.values())
    assert ratios[len(ratios) // 2] < 0.75
    logits = LogitsOptions(num_tokens=1024)
    text = encode_text(tiny, words[half:], logits)
    ours = replace(options, rounded=Rounded.load(tmp_path / "gptq"))
    kl = [
        compare_logits(tiny, quantized(tiny, one, tmp_path / name), text, logits, lambda _: None).summary.kl_nats
        for name, one in (("plain", options), ("ours", ours))
    ]
    # mean and tail hang on the few tokens that another expert gets, which the last bits of a matrix product decide
    assert kl[1].median < 0.85 * kl[0].median


@pytest.mark.parametrize(
    "options", [NVFP4, INT8, replace(NVFP4, format=Format.MODELOPT)], ids=["nvfp4", "int8", "modelopt"]
)
def test_the_result_differs_from_plain_rounding_in_codes_alone(source, tmp_path, options):
    _, folder = rounded(source, options, tmp_path / "gptq")
    plain = read_tensors(quantized(source, options, tmp_path / "plain"))
    ours = read_tensors(quantized(source, replace(options, rounded=folder), tmp_path / "ours"))
    assert plain.keys() == ours.keys()
    changed = {
        name
        for name, value in ours.items()
        if not torch.equal(value.reshape(-1).view(torch.uint8), plain[name].reshape(-1).view(torch.uint8))
    }
    assert all(ours[name].dtype == plain[name].dtype and ours[name].shape == plain[name].shape for name in ours)
    assert len(changed) > 0.9 * len(folder.recipes)
    codes = "weight" if options.format is Format.MODELOPT else "weight_packed"
    assert {name.rpartition(".")[2] for name in changed} == {codes}
    assert (tmp_path / "ours" / "config.json").read_bytes() == (tmp_path / "plain" / "config.json").read_bytes()


def test_first_weights_are_those_of_gptq_on_the_inputs_that_a_hook_sees(source, tmp_path):
    _, folder = rounded(source, NVFP4, tmp_path / "gptq")
    ours = read_tensors(quantized(source, replace(NVFP4, rounded=folder), tmp_path / "ours"))
    model = load_model(source, EngineConfig(dtype="float32"), with_mtp=False).model
    attention, hessian = model.model.layers[0].self_attn, Hessian(48, "cpu")
    attention.q_proj.register_forward_pre_hook(lambda module, args: hessian.add(args[0]))
    for window in WINDOWS:
        model(torch.tensor([window]))
    weights = {x: getattr(attention, f"{x}_proj").weight.bfloat16() for x in "qkv"}
    largest = max(weight.abs().max() for weight in weights.values()).float().view(1, 1)
    for x, weight in weights.items():
        grid = Grid.of(weight, largest, next(iter(_recipes(source, NVFP4).values())))
        packed, *_ = grid.stored(gptq(weight.float(), hessian.value(), grid))
        assert torch.equal(ours[f"model.layers.0.self_attn.{x}_proj.weight_packed"], packed)


def _recipes(folder: Path, options: QuantizeOptions):
    with job_on(folder, WINDOWS) as job:
        return CalibrationJob(job.source, job.text, job.options, Rounding(options, folder)).recipes


def test_later_layers_and_statistics_see_what_the_codes_stand_for(source, tmp_path):
    """Calibrating the finished result gives the statistics that the rounding run gave."""
    stats, folder = rounded(source, INT8, tmp_path / "gptq", min_expert_tokens=0)
    result = quantized(source, replace(INT8, rounded=folder), tmp_path / "ours")
    with job_on(result, WINDOWS) as job:
        again = job.run()
    assert (again.input_amax, again.percentiles, again.tokens) == (stats.input_amax, stats.percentiles, stats.tokens)
    assert (again.key_amax, again.value_amax) == (stats.key_amax, stats.value_amax)
    with job_on(source, WINDOWS) as job:
        unrounded = job.run()
    assert unrounded.input_amax != stats.input_amax


def test_weights_that_are_not_quantized_stay_as_they_are(source, tmp_path):
    options = replace(NVFP4, preset=Preset.EXPERTS_ONLY)
    stats, folder = rounded(source, options, tmp_path / "gptq")
    assert {name.split(".")[4] for name in folder.recipes} == {"experts"}
    assert {file for file, _ in folder.entries.values()} == {f"gptq-layer-0000{layer}.safetensors" for layer in (1, 2)}
    with job_on(source, WINDOWS) as job:
        plain = job.run()
    before = [name for name in stats.input_amax if ".layers.0." in name or ".layers.1.self_attn." in name]
    assert all(stats.input_amax[name] == plain.input_amax[name] for name in before)


def test_memory_and_layout_change_no_byte(source, tmp_path):
    first, folder = rounded(source, NVFP4, tmp_path / "gptq")
    with open_source(source) as opened:
        run(plan_convert(opened, ConvertOptions(layout=Layout.PACKED)), tmp_path / "packed", ONE, float)
    rounded(tmp_path / "packed", NVFP4, tmp_path / "other")
    for file in {file for file, _ in folder.entries.values()}:
        assert (tmp_path / "gptq" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
    with open_source(source) as opened:
        text = CalibrationText(WINDOWS, ({"sha256": "0" * 64},), sum(map(len, WINDOWS)))
        roomy = CalibrationJob(opened, text, CalibrateOptions(), Rounding(NVFP4, tmp_path / "again"))
        assert roomy.memory.rounding > 0
        tight = CalibrateOptions(max_memory=roomy.memory.peak_bytes - 1, scratch=tmp_path)
        job = CalibrationJob(opened, text, tight, Rounding(NVFP4, tmp_path / "again"))
        assert job.memory.scratch_bytes > 0
        assert job.run().data == first.data
        assert Rounded.load(tmp_path / "again").sha256 == folder.sha256
        least = replace(tight, max_memory=job.memory.peak_bytes - 1)
        with pytest.raises(ResourceError):
            CalibrationJob(opened, text, least, Rounding(NVFP4, tmp_path / "again"))


def test_an_interruption_leaves_no_folder(source, tmp_path, monkeypatch):
    whole, seen = Stream._experts, []

    def interrupted(self, *args):
        seen.append(self)
        if len(seen) == 2:
            raise KeyboardInterrupt
        whole(self, *args)

    monkeypatch.setattr(Stream, "_experts", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rounded(source, NVFP4, tmp_path / "gptq")
    assert len(seen) == 2
    assert not (tmp_path / "gptq").exists()


def test_a_folder_without_its_manifest_is_unfinished(source, tmp_path):
    rounded(source, NVFP4, tmp_path / "gptq")
    (tmp_path / "gptq" / MANIFEST).unlink()
    with pytest.raises(UsageError, match="an unfinished one"):
        Rounded.load(tmp_path / "gptq")
    with pytest.raises(UsageError, match="found none"):
        Rounded.load(tmp_path / "none")


def test_rounded_weights_of_another_job_are_refused(source, tmp_path):
    _, folder = rounded(source, NVFP4, tmp_path / "gptq")
    other = small_checkpoint(tmp_path / "other", **{**SIZES, "num_hidden_layers": 2})
    with open_source(other) as opened, pytest.raises(UsageError, match="those of a model with digest"):
        plan_quantize(opened, replace(NVFP4, rounded=folder))
    with open_source(source) as opened, pytest.raises(UsageError, match="made with other options"):
        plan_quantize(opened, replace(INT8, rounded=folder))
    broken = replace(folder, entries={name: place for name, place in folder.entries.items() if "global" not in name})
    with open_source(source) as opened, pytest.raises(InputError, match="weight_global_scale"):
        plan_quantize(opened, replace(NVFP4, rounded=broken))


@pytest.mark.parametrize("scheme", ["fp8", "fp8-block", "experts=nvfp4,attention=fp8"])
def test_schemes_without_gptq_are_refused(source, tmp_path, scheme):
    with pytest.raises(UsageError, match="--method gptq: expected --scheme int8 or"):
        rounded(source, QuantizeOptions(scheme=scheme), tmp_path / "gptq")


def test_a_quantized_source_is_refused(source, tmp_path):
    with pytest.raises(UsageError, match="an unquantized source"):
        rounded(quantized(source, INT8, tmp_path / "int8"), INT8, tmp_path / "gptq")
