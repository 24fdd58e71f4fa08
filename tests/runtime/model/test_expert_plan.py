"""Which backend is taken, in which scheme experts are held, and what is said about it."""

from dataclasses import replace

import pytest
import torch

from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from converters.formats.inputs import InputCode, InputScheme
from runtime.config import EngineConfig
from runtime.model.activations import InputQuantizer
from runtime.model.expert_plan import StoredExperts, plan_experts
from runtime.moe.grouped import quantize_tokens
from runtime.moe.plan import LayerPlan
from runtime.moe.weights import ExpertScheme
from tests.builders import small_config

BF16, FP8, NVFP4 = ExpertScheme.BF16, ExpertScheme.FP8_CHANNEL, ExpertScheme.NVFP4
PLAIN, CODED = StoredExperts(BF16, BF16), StoredExperts(FP8, FP8)
STATIC = StoredExperts(FP8, FP8, frozenset({InputScheme(InputCode.FP8, None, is_static=True)}))


FP4 = StoredExperts(NVFP4, NVFP4, frozenset({InputScheme(InputCode.NVFP4, 16, is_static=True)}))


@pytest.fixture
def config() -> Glm4MoeConfig:
    return replace(Glm4MoeConfig.from_hf(small_config()), hidden_size=64, moe_intermediate_size=32)


@pytest.fixture
def gpu(monkeypatch):
    """Pretend to have a GPU of a compute capability."""

    def pretend(*capability: int) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda: capability)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "Some GPU")

    return pretend


@pytest.mark.parametrize(
    ("capability", "stored", "engine", "backend", "note"),
    [
        ((9, 0), PLAIN, {}, "triton", "kernels for this GPU, which take few rows and many (256 rows for each expert"),
        ((9, 0), StoredExperts(NVFP4, NVFP4), {}, "triton", "kernels for this GPU"),
        ((9, 0), CODED, {"moe_deterministic": True}, "triton", "kernels for this GPU"),
        ((9, 0), PLAIN, {"dtype": "float32"}, "batched", "the kernels are not made for this GPU or dtype"),
        ((8, 0), PLAIN, {}, "cutlass", "plain weights, a GPU that the kernels are not made for, 256 rows"),
        ((8, 0), PLAIN, {"prefill_chunk_tokens": 1}, "batched", "not made for this GPU or dtype (0.5 rows for each"),
        ((8, 0), CODED, {}, "batched", "the kernels are not made for this GPU or dtype"),
        ((8, 0), PLAIN, {"moe_deterministic": True}, "batched", "the kernels are not made for this GPU or dtype"),
        ((7, 5), PLAIN, {}, "batched", "the kernels are not made for this GPU or dtype"),
        ((9, 0), FP4, {}, "vanilla", "inputs are rounded by scales that each expert has its own of"),
        ((10, 0), FP4, {}, "triton", "kernels for this GPU"),
        ((10, 0), FP4, {"dtype": "float32"}, "vanilla", "inputs are rounded by scales that each expert has its own of"),
        ((10, 0), STATIC, {}, "vanilla", "inputs are rounded by scales that each expert has its own of"),
        ((9, 0), STATIC, {}, "vanilla", "inputs are rounded by scales that each expert has its own of"),
    ],
)
def test_auto_takes_what_suits_gpu_scheme_and_rows(gpu, config, capability, stored, engine, backend, note):
    gpu(*capability)
    plan = plan_experts({1: stored}, config, EngineConfig(device="cuda", moe_backend="auto", **engine))
    assert plan.backend == backend
    assert plan.notes[0].startswith(f"Experts run in the backend {backend}: ")
    assert note in plan.notes[0]


@pytest.mark.parametrize(
    ("engine", "backend", "note"),
    [
        ({}, "vanilla", "on the CPU it copies no weights (256 rows for each expert"),
        ({"fused_shared_experts": "on"}, "batched", "on the CPU it is the one that does what is asked for"),
        ({"moe_deterministic": True}, "batched", "on the CPU it is the one that does what is asked for"),
    ],
)
def test_auto_on_the_cpu(config, engine, backend, note):
    plan = plan_experts({1: PLAIN}, config, EngineConfig(moe_backend="auto", **engine))
    assert plan.backend == backend
    assert len(plan.notes) == 1
    assert note in plan.notes[0]


def test_auto_does_not_take_what_would_be_refused(gpu, config):
    gpu(8, 0)
    engine = EngineConfig(device="cuda", moe_backend="auto")
    assert plan_experts({1: PLAIN}, replace(config, hidden_size=60), engine).backend == "batched"


def test_auto_does_not_drop_what_was_asked_for(config):
    engine = EngineConfig(moe_backend="auto", moe_deterministic=True)
    with pytest.raises(UsageError) as error:
        plan_experts({1: STATIC}, config, engine)
    assert str(error.value) == (
        "moe_backend 'auto': expected a checkpoint whose experts can be grouped, for moe_deterministic or "
        "fused_shared_experts 'on', found inputs are rounded by scales that each expert has its own of. Take "
        "activations as they are."
    )


def test_what_was_asked_for_by_name_needs_no_note(config):
    assert plan_experts({1: PLAIN}, config, EngineConfig(moe_backend="batched")).notes == ()


def test_inputs_that_differ_within_a_layer_are_refused(config):
    stored = StoredExperts(FP8, FP8, frozenset({None, InputScheme(InputCode.FP8)}))
    with pytest.raises(UsageError, match=r"found as they are and fp8 per token\. Use --moe-backend vanilla"):
        plan_experts({1: stored}, config, EngineConfig(moe_backend="batched"))


def test_nvfp4_inputs_are_multiplied_as_codes_on_blackwell_and_refused_elsewhere(gpu, config):
    gpu(10, 0)
    engine = EngineConfig(device="cuda", moe_backend="triton")
    assert plan_experts({1: FP4}, config, engine).layers == {1: LayerPlan(NVFP4, 1, multiplies_codes=True)}
    gpu(9, 0)
    with pytest.raises(UsageError) as error:
        plan_experts({1: FP4}, config, engine)
    assert str(error.value) == (
        "moe_backend 'triton': expected a GPU of compute capability 10.0 or later, for inputs in NVFP4, found Some "
        "GPU. Use --moe-backend vanilla, or take activations as they are."
    )


@pytest.mark.parametrize("backend", ["batched", "cutlass"])
def test_nvfp4_inputs_are_refused_by_backends_that_have_one_rounding_for_all_experts(gpu, config, backend):
    gpu(10, 0)
    with pytest.raises(
        UsageError, match=r"found nvfp4 per 16 columns, below a calibrated scale\. Use --moe-backend vanilla"
    ):
        plan_experts({1: FP4}, config, EngineConfig(device="cuda", moe_backend=backend))


def test_shared_expert_whose_inputs_are_rounded_otherwise_is_not_fused(config):
    """Fused, its inputs would be rounded as those of the routed ones."""
    per_token = frozenset({InputScheme(InputCode.FP8)})
    alike, apart = (StoredExperts(FP8, FP8, per_token, inputs) for inputs in (per_token, frozenset({None})))
    plan = plan_experts({1: alike, 2: apart}, config, EngineConfig(moe_backend="batched"))
    assert plan.layers == {1: LayerPlan(FP8, 1), 2: LayerPlan(FP8, 0)}
    with pytest.raises(UsageError, match=r"in layer 2, found inputs of the shared expert that are rounded otherwise\."):
        plan_experts({2: apart}, config, EngineConfig(moe_backend="batched", fused_shared_experts="on"))


def test_layers_are_planned_one_by_one(config):
    stored = {1: CODED, 2: StoredExperts(FP8, BF16), 3: StoredExperts(None, None)}
    plan = plan_experts(stored, config, EngineConfig(moe_backend="batched"))
    assert plan.layers == {1: LayerPlan(FP8, 1), 2: LayerPlan(FP8, 0), 3: LayerPlan(BF16, 0)}
    assert plan.notes == (
        "Experts of layer 3 are multiplied out to bfloat16 for the backend batched.",
        "The shared expert of 2 layers is computed apart: its scheme or number differs.",
    )


def test_fused_shared_experts_may_be_declined(config):
    plan = plan_experts({1: CODED}, config, EngineConfig(moe_backend="batched", fused_shared_experts="off"))
    assert plan.layers == {1: LayerPlan(FP8, 0)}
    assert plan.notes == ()


def test_tokens_become_the_codes_of_the_rounding_that_is_simulated():
    rows = torch.randn(9, 40) * torch.logspace(-3, 3, 9)[:, None]
    rows[4] = 0
    codes, scales = quantize_tokens(rows)
    assert torch.equal(codes.float() * scales[:, None], InputQuantizer(InputScheme(InputCode.FP8))(rows))
