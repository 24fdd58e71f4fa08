"""A model on kernels, in triton's interpreter, which takes a process of its own; and on their twins, in this one."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantizing import quantize

from converters.config import Glm4MoeConfig, read_json
from converters.errors import UsageError
from converters.schema import expand
from runtime.config import EngineConfig
from runtime.engine.request import SamplingParams
from runtime.engine.sampler import Sampler
from runtime.kernels.launch import Launch
from runtime.model.decoder import DecoderLayer, new_cache
from runtime.model.loader import load_model
from runtime.model.ops import MAX_VOCAB, LayerOps, plan_ops
from runtime.moe.runner import MoE
from tests.builders import random_tensors, small_config, write_checkpoint
from tests.runtime.model.kernel_models import NEXT, PROMPT, compare, excess, outputs, with_twins, write_model
from tests.runtime.moe.moe_blocks import PoisonedWorkspace
from tests.runtime.moe.test_graph_safety import Watch

ROOT = Path(__file__).parents[3]
FP32 = EngineConfig(dtype="float32")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program says."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    environment |= {"TRITON_INTERPRET": "1", "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.runtime.model.interpreted"]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("kernels") / "model")


@pytest.fixture(scope="module")
def config(folder: Path) -> Glm4MoeConfig:
    return Glm4MoeConfig.from_folder(folder)


def check(found: dict[str, Any]) -> None:
    """Hold what `compare` found against what is allowed."""
    shares = ("fp32", "fp32 batch, split", "fp32 without cache", "fp8 cache", "experts too")
    assert {name: found[name] for name in shares if not 0 < found[name] <= 1} == {}
    # or codes would be allowed to differ
    assert found["fp8 cache is seen"] > 100
    for name in ("greedy", "greedy fp8 cache", "bf16 greedy", "drawn"):
        assert all(tokens == found[name][0] for tokens in found[name]), (name, found[name])
    assert found["drawn"][0][0] != found["drawn"][0][1]


def test_logits_and_tokens_of_kernels_are_those_of_torch(found):
    """In chunks, one by one, a batch, no cache, FP8 codes in the cache, drafts; the same seed, the same tokens."""
    check(found)


def test_bf16_costs_with_kernels_what_it_costs_with_torch(found):
    """Both round what a layer hands on; kernels also the shares of attention, torch also what a norm turns."""
    cost = found["bf16"]
    assert 0.5 * cost["torch"] < min(cost["triton"], cost["experts too"])
    assert max(cost["triton"], cost["experts too"]) < 1.5 * cost["torch"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_logits_and_tokens_of_kernels_are_those_of_torch_on_a_gpu():
    check(compare("cuda"))


@pytest.mark.parametrize(("batch_size", "capacity_tokens"), [(1, 12), (2, 600)])
def test_twins_are_the_model(folder, batch_size, capacity_tokens):
    sizes = {"batch_size": batch_size, "capacity_tokens": capacity_tokens}
    exact = outputs(load_model(folder, FP32), **sizes)
    assert excess(outputs(with_twins(load_model(folder, FP32)), **sizes), exact) <= 1


@pytest.mark.parametrize("changes", [{"use_qk_norm": False}, {"attention_bias": False, "partial_rotary_factor": 1.0}])
def test_twins_are_the_model_of_other_configs(tmp_path, changes):
    folder = write_model(tmp_path / "model", **changes)
    exact = outputs(load_model(folder, FP32))
    assert excess(outputs(with_twins(load_model(folder, FP32))), exact) <= 1


def test_tokens_after_a_truncated_cache_are_those_of_one_pass(folder):
    model = with_twins(load_model(folder, FP32)).model
    cache, ids = new_cache(model, 12), torch.tensor([PROMPT + NEXT])
    model(ids[:, :8], cache=cache)
    model(torch.tensor([[5, 6, 7]]), cache=cache)
    cache.truncate(8)
    torch.testing.assert_close(model(ids[:, 8:], cache=cache), model(ids)[:, 8:], rtol=0, atol=1e-5)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def pretend(*capability: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")

    return pretend


@pytest.mark.parametrize(
    ("capability", "engine", "note"),
    [
        ((9, 0), {}, "triton: kernels for this GPU."),
        ((9, 0), {"kv_cache_dtype": "fp8"}, "triton: kernels for this GPU."),
        ((9, 0), {"dtype": "float32"}, "torch: the kernels are not made for float32."),
        ((8, 0), {}, "torch: the kernels are not made for this GPU."),
    ],
)
def test_auto_takes_what_suits_gpu_and_dtype(gpu, config, capability, engine, note):
    gpu(*capability)
    plan = plan_ops(config, EngineConfig(device="cuda", kernels="auto", **engine))
    assert plan.notes == (f"Norms, attention and sampling run in {note}",)
    assert plan.ops == (LayerOps.of_kernels() if "triton" in note else None)


def test_auto_on_the_cpu_is_torch(config):
    plan = plan_ops(config, EngineConfig(kernels="auto"))
    assert plan.ops is None
    assert plan.notes == ("Norms, attention and sampling run in torch: on the CPU kernels are only interpreted.",)
    assert plan_ops(config, EngineConfig(kernels="auto", kv_cache_dtype="fp8")).ops == LayerOps.of_twins()
    assert plan_ops(config, EngineConfig()).notes == ()


def test_a_vocabulary_that_kernels_cannot_hold_is_refused_and_not_chosen(gpu, config):
    gpu(9, 0)
    large = replace(config, vocab_size=MAX_VOCAB + 1)
    with pytest.raises(UsageError) as error:
        plan_ops(large, EngineConfig(device="cuda", kernels="triton"))
    assert str(error.value) == (
        "kernels 'triton': expected a vocabulary of at most 262143 tokens, found 262144. Use --kernels torch."
    )
    assert plan_ops(large, EngineConfig(device="cuda", kernels="auto")).ops is None
    assert plan_ops(replace(config, vocab_size=MAX_VOCAB), EngineConfig(device="cuda", kernels="triton")).ops


def test_the_vocabularies_of_the_models_are_held():
    sizes = [read_json(path)["vocab_size"] for path in (ROOT / "fixtures" / "configs").glob("*.json")]
    assert max(sizes) <= MAX_VOCAB


class StrictWatch(Watch):
    """Notes as well what is made from values of the host, which a GPU has to be handed."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().startswith("aten::lift_fresh"):
            self.waiting.add(func.name())
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels are prepared and noted, but not run: what is left is what the host does."""
    names: list[str] = []

    def note(launch: Launch) -> tuple[torch.Tensor, ...]:
        names.append(launch.kernel.__name__)
        return launch.outputs

    monkeypatch.setattr(Launch, "run", note)
    return names


@pytest.mark.parametrize(("capacity_tokens", "attend"), [(16, ["attend_pages"]), (600, ["attend_pages", "add_runs"])])
def test_a_step_waits_for_nothing_and_runs_on_kernels(folder, launched, capacity_tokens, attend):
    """From ids to ids: so a graph of it can be captured, and replayed as often as there is room."""
    model = load_model(folder, replace(FP32, moe_backend="batched")).model
    model.use(LayerOps.of_kernels())
    cache = new_cache(model, capacity_tokens)
    sampler = Sampler(SamplingParams(temperature=1.0), LayerOps.of_kernels())
    held = [cache.table.lengths_B.data_ptr(), *(part.data_ptr() for part in (cache.layer(1).keys_NSGP,))]
    model(torch.tensor([PROMPT]), cache=cache)
    ids_11 = torch.tensor([[3]])
    launched.clear()
    with StrictWatch() as watch:
        sampler.draw(model.logits(model(ids_11, cache=cache)[:, -1]))
    assert watch.waiting == set()
    layer = ["norm_rows", "turn_heads", "copy_rows", *attend, "norm_rows"]
    assert launched == [*layer, *layer, "norm_rows", "draw", "choose_tokens"]
    assert cache.table.lengths_B.tolist() == [len(PROMPT) + 1]
    assert held == [cache.table.lengths_B.data_ptr(), *(part.data_ptr() for part in (cache.layer(1).keys_NSGP,))]


@pytest.mark.parametrize("scheme", ["", "fp8"])
@pytest.mark.parametrize("capacity_tokens", [16, 600])
@pytest.mark.parametrize("backend", ["batched", "triton"])
def test_layers_make_nothing_once_they_have_run(
    folder, launched, monkeypatch, tmp_path, backend, capacity_tokens, scheme
):
    """A dense one and one of experts, decoding; what a pass makes besides is its positions, embeddings and result."""
    if scheme:
        quantize(folder, tmp_path / "quantized", scheme)
    monkeypatch.setattr("runtime.config.supports_triton", lambda device: True)
    engine = EngineConfig(dtype="bfloat16", moe_backend=backend, activations="as-served" if scheme else "full")
    found = load_model(tmp_path / "quantized" if scheme else folder, engine)
    model, run, made, passes = found.model, DecoderLayer.forward_normed, list[str](), 0
    model.use(LayerOps.of_kernels(), workspace=model.decoder_layers[-1].mlp.workspace)
    cache = new_cache(model, capacity_tokens)
    model(torch.tensor([PROMPT]), cache=cache)
    model(torch.tensor([[3]]), cache=cache)

    def watched(*args: Any) -> Any:
        nonlocal passes
        passes += 1
        with Watch() as watch:
            out = run(*args)
        made.extend(name for name, _ in watch.new_bytes)
        return out

    monkeypatch.setattr(DecoderLayer, "forward_normed", watched)
    model.workspace.is_fixed = True
    model(torch.tensor([[5]]), cache=cache)
    assert passes == len(model.decoder_layers) == 2
    assert made == []


@pytest.mark.parametrize("backend", ["vanilla", "batched", "cutlass"])
def test_layers_use_nothing_behind_its_buffer(tmp_path, backend):
    """With four layers that share a workspace, whose buffers are spoilt whenever they are taken again."""
    config = small_config(num_hidden_layers=4, n_routed_experts=2, num_experts_per_tok=2)
    tensors = random_tensors(expand(Glm4MoeConfig.from_hf(config)))
    folder = write_checkpoint(tmp_path / "model", tensors, config, num_shards=1)
    exact = outputs(load_model(folder, replace(FP32, moe_backend=backend)))
    loaded = load_model(folder, replace(FP32, moe_backend=backend))
    workspace = PoisonedWorkspace(torch.device("cpu"))
    loaded.model.use(LayerOps.of_twins(), workspace=workspace)
    for module in loaded.model.modules():
        if isinstance(module, MoE) and module.local is not None:
            module.workspace = workspace
    assert excess(outputs(loaded), exact) <= 1


def test_what_a_pass_returns_outlasts_the_next(folder):
    model = with_twins(load_model(folder, FP32)).model
    first = model(torch.tensor([PROMPT]))
    kept = first.clone()
    model(torch.tensor([PROMPT[::-1]]))
    assert torch.equal(first, kept)


def test_attention_has_one_tile_where_a_token_may_not_notice_its_batch(config, monkeypatch):
    monkeypatch.setattr("runtime.config.supports_triton", lambda device: True)
    engine = EngineConfig(kernels="triton", moe_backend="triton")
    invariant = LayerOps.of_kernels(is_batch_invariant=True)
    assert plan_ops(config, replace(engine, moe_deterministic=True)).ops == invariant != LayerOps.of_kernels()
    assert plan_ops(config, engine).ops == LayerOps.of_kernels()


def test_twins_are_seen_to_wait(folder):
    model = with_twins(load_model(folder, FP32)).model
    with StrictWatch() as watch:
        model(torch.tensor([PROMPT]))
    assert "aten::_local_scalar_dense" in watch.waiting or "aten::lift_fresh" in watch.waiting
