"""One layer at a time: the same as the whole model, whatever the layout and the memory, and never more than planned."""

import errno
from pathlib import Path

import pytest
import torch
from builders import small_checkpoint

from converters.convert import ConvertOptions, plan_convert
from converters.errors import InputError, ResourceError
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quant.policy import is_quantized
from converters.quant.stats import CalibrationStats
from converters.quantize import QuantizeOptions, plan_quantize
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.model.decoder import CausalLM
from runtime.model.loader import ModelLoader, load_model
from runtime.streaming import hidden
from tests.runtime.calibrate.conftest import job_on, random_windows

FP32 = EngineConfig(dtype="float32")
WINDOWS = random_windows(40, 25)


def statistics(folder: Path, windows=WINDOWS, **options: object) -> CalibrationStats:
    with job_on(folder, windows, **options) as job:
        return job.run()


def whole_model_amax(folder: Path, windows) -> dict[str, float]:
    """Run the loaded model as `verify` does, and hook each of its linear layers."""
    loaded = load_model(folder, FP32)
    found: dict[str, float] = {}

    def watch(name: str, inputs: torch.Tensor) -> None:
        found[name] = max(found.get(name, 0.0), float(inputs.abs().max()))

    for name, module in loaded.model.named_modules():
        if type(module).__name__ == "Linear":
            module.register_forward_pre_hook(lambda m, args, name=name: watch(name, args[0]))
    for window in windows:
        ids = torch.tensor([window])
        final = loaded.model(ids)
        loaded.mtp.draft(loaded.model.embed(ids[:, 1:]), final[:, :-1])
    return found


def test_streaming_equals_the_whole_model(small):
    """Sums over experts are taken in another order; until the first of them, every bit is the same."""
    stats, whole = statistics(small), whole_model_amax(small, WINDOWS)
    heard = stats.input_amax.keys() - stats.filled.keys()
    assert heard <= whole.keys()
    for name in heard:
        assert stats.input_amax[name] == pytest.approx(whole[name], rel=1e-5), name
    before_any_expert = [name for name in heard if ".layers.0." in name or ".layers.1.self_attn." in name]
    assert len(before_any_expert) == 4 + 3 + 4
    assert all(stats.input_amax[name] == whole[name] for name in before_any_expert)


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED, Layout.FUSED_SHARED])
def test_statistics_do_not_depend_on_the_layout(small, tmp_path, layout):
    with open_source(small) as source:
        run(plan_convert(source, ConvertOptions(layout=layout)), tmp_path / "other", RunOptions(workers=1), float)
    # provenance included: it speaks of the model, not of its files
    assert statistics(tmp_path / "other").data == statistics(small).data


def test_a_quantized_checkpoint_is_measured_as_it_computes(small, tmp_path):
    with open_source(small) as source:
        run(plan_quantize(source, QuantizeOptions(scheme="fp8")), tmp_path / "fp8", RunOptions(workers=1), float)
    stats, whole = statistics(tmp_path / "fp8"), whole_model_amax(tmp_path / "fp8", WINDOWS)
    for name in stats.input_amax.keys() - stats.filled.keys():
        assert stats.input_amax[name] == pytest.approx(whole[name], rel=1e-5), name


def test_hidden_states_on_disk_change_no_byte(small, tmp_path):
    with job_on(small, WINDOWS) as job:
        in_memory, memory = job.run(), job.memory
    assert memory.scratch_bytes == 0
    with job_on(small, WINDOWS, max_memory=memory.peak_bytes - 1, scratch=tmp_path) as job:
        assert job.memory.scratch_bytes == memory.hidden == 2 * 65 * 48 * 4
        assert job.memory.peak_bytes == memory.peak_bytes - memory.hidden
        assert job.run().data == in_memory.data
    assert [path.name for path in tmp_path.iterdir()] == [small.name]


def test_too_little_memory_is_refused_before_anything_is_read(small):
    with job_on(small, WINDOWS) as job:
        least = job.memory.peak_bytes - job.memory.hidden
    with pytest.raises(ResourceError) as caught, job_on(small, WINDOWS, max_memory=least - 1):
        pass
    assert caught.value.subject == "--max-memory"
    assert f"at least {least} bytes" in caught.value.expected


def test_a_full_disk_is_found_before_the_first_layer(small, tmp_path, monkeypatch):
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(hidden.os, "posix_fallocate", full)
    with job_on(small, WINDOWS) as job:
        least = job.memory.peak_bytes - 1
    with job_on(small, WINDOWS, max_memory=least, scratch=tmp_path) as job, pytest.raises(ResourceError):
        job.run()


def test_weights_in_memory_stay_within_the_plan(tmp_path, monkeypatch):
    """A model of 40 experts in 4 layers: what is filled at any time is a small part of it."""
    folder = small_checkpoint(tmp_path / "big", n_routed_experts=40, num_hidden_layers=4)
    live: dict[str, int] = {}
    peak = 0
    fill, release = ModelLoader.fill, ModelLoader.release

    def counted_fill(self, names, advance=None):
        nonlocal peak
        names = list(names)
        fill(self, names, advance)
        live.update({name: self.model.get_parameter(name).nbytes for name in names})
        peak = max(peak, sum(live.values()))

    def counted_release(self, names):
        names = list(names)
        release(self, names)
        for name in names:
            del live[name]

    monkeypatch.setattr(ModelLoader, "fill", counted_fill)
    monkeypatch.setattr(ModelLoader, "release", counted_release)
    done: list[int] = []

    class Progress:
        def advance(self, num_bytes: int) -> None:
            done.append(num_bytes)

        def describe(self, text: str) -> None:
            pass

    with job_on(folder, WINDOWS) as job:
        job.run(Progress())
        assert all(parameter.device.type == "meta" for parameter in job.loader.model.parameters())
        whole = sum(parameter.numel() * 4 for parameter in job.loader.model.parameters())
        assert 0 < peak <= job.memory.weights < whole / 20
        assert sum(done) == job.read_bytes
    assert live == {}


def test_each_weight_is_read_once(small, monkeypatch):
    read: list[str] = []
    fill = ModelLoader.fill

    def listed(self, names, advance=None):
        read.extend(names)
        fill(self, names, advance)

    monkeypatch.setattr(ModelLoader, "fill", listed)
    with job_on(small, WINDOWS) as job:
        job.run()
        layers = {tensor.name for tensor in job.source.schema.tensors.values() if tensor.layer is not None}
        quantized = {tensor.name for tensor in job.source.schema.tensors.values() if is_quantized(tensor)}
    assert len(read) == len(set(read))
    assert quantized < set(read)
    assert {name for name in layers if name not in read} == {
        "model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight",
    }  # fmt: skip


def test_without_an_mtp_layer_there_are_no_figures_for_it(tmp_path):
    folder = small_checkpoint(tmp_path / "plain", mtp=False, num_nextn_predict_layers=0)
    stats = statistics(folder)
    assert stats.key_amax.keys() == {0, 1, 2}
    assert not [name for name in stats.input_amax if ".layers.3." in name]


def test_a_broken_weight_is_named(small):
    from safetensors.torch import load_file, save_file

    path = next(path for path in sorted(small.glob("*.safetensors")))
    tensors = load_file(path)
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(InputError) as caught:
        statistics(small)
    assert caught.value.found == "nan"
    assert caught.value.subject == "input of model.layers.0.self_attn.o_proj"


def test_the_model_is_never_whole(small):
    """The model of the loader is a skeleton from beginning to end: the head is not read at all."""
    with job_on(small, WINDOWS) as job:
        assert isinstance(job.loader.model, CausalLM)
        job.run()
        assert job.loader.model.lm_head.weight.device.type == "meta"
