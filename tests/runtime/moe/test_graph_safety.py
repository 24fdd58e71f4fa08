"""What a CUDA graph asks for, seen on the CPU: nothing waits for a value, and after a warm-up nothing large is made."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from converters.config import Glm4MoeConfig
from converters.formats.inputs import InputCode, InputScheme
from runtime.kernels.launch import Launch
from runtime.model.activations import InputQuantizer
from runtime.moe.batched import warm_up_tokens
from runtime.moe.experts import CalibratedInputs, LocalExperts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.plan import BATCHED, CUTLASS, TRITON, VANILLA_PLAN, LayerPlan, MoePlan
from runtime.moe.router import Routing
from runtime.moe.runner import MoE
from runtime.moe.weights import ExpertScheme
from runtime.moe.workspace import Workspace
from tests.runtime.moe.expert_layers import random_experts, random_slots
from tests.runtime.moe.moe_blocks import filled_moe

# operators whose result's shape, or the host's next step, depends on values
_WAITING = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::bincount", "aten::_unique2",
    "aten::unique_consecutive", "aten::repeat_interleave.Tensor", "aten::equal", "aten::split_with_sizes",
}  # fmt: skip


class Watch(TorchDispatchMode):
    """Notes operators that wait, and bytes of new memory by operator."""

    def __init__(self) -> None:
        super().__init__()
        self.waiting: set[str] = set()
        self.new_bytes: list[tuple[str, int]] = []
        self._kept: list[torch.Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, given = func.name(), tree_leaves((args, kwargs or {}))
        before = {one.untyped_storage().data_ptr() for one in given if isinstance(one, torch.Tensor)}
        if name in _WAITING:
            self.waiting.add(name)
        if name.startswith("aten::index.") and any(
            isinstance(one, torch.Tensor) and one.dtype is torch.bool for one in given
        ):
            self.waiting.add(name)
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and one.untyped_storage().data_ptr() not in before:
                self.new_bytes.append((name, one.untyped_storage().nbytes()))
                # a freed address would look like an old one
                self._kept.append(one)
        return out


@pytest.fixture
def config(make_checkpoint: Callable[..., Any]) -> Glm4MoeConfig:
    return Glm4MoeConfig.from_folder(make_checkpoint().folder)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Kernels are prepared and noted, but not run: what is left is what the host does."""
    found: list[Launch] = []

    def note(launch: Launch) -> tuple[torch.Tensor, ...]:
        found.append(launch)
        return launch.outputs

    monkeypatch.setattr(Launch, "run", note)
    return found


def grouped(config: Glm4MoeConfig, backend: str, num_shared: int = 1) -> MoE:
    plan = MoePlan(backend, {5: LayerPlan(ExpertScheme.FP32, num_shared)})
    return filled_moe(config, plan)


@pytest.mark.parametrize("backend", [BATCHED, CUTLASS])
@pytest.mark.parametrize("num_shared", [0, 1])
def test_grouped_experts_wait_for_nothing(config, backend, num_shared):
    moe = grouped(config, backend, num_shared)
    with Watch() as watch:
        moe(torch.randn(2, 9, config.hidden_size), None)
    assert watch.waiting == set()
    assert watch.new_bytes


def test_the_loop_over_experts_is_seen_to_wait(config):
    moe = filled_moe(config, VANILLA_PLAN)
    with Watch() as watch:
        moe(torch.randn(2, 9, config.hidden_size), None)
    assert "aten::bincount" in watch.waiting


@pytest.mark.parametrize("backend", [BATCHED, CUTLASS])
def test_after_warm_up_no_buffer_grows_or_moves_and_no_rows_are_allocated(config, backend):
    """Torch allocates the two results of its grouped products; all else are indices and router logits."""
    moe, num_tokens = grouped(config, backend), 60
    moe.warm_up(num_tokens, torch.float32)
    assert moe.workspace is not None
    moe.workspace.is_fixed = True
    addresses, out = moe.workspace.addresses(), torch.empty(1, num_tokens, config.hidden_size)
    for size in range(1, num_tokens + 1):
        hidden = torch.randn(1, size, config.hidden_size)
        with Watch() as watch:
            moe(hidden, None, out[:, :size])
        row_bytes = size * (config.num_experts_per_tok + 1) * config.moe_intermediate_size * 4
        large = [name for name, num_bytes in watch.new_bytes if num_bytes >= row_bytes]
        assert large == (["aten::_grouped_mm"] * 2 if backend == CUTLASS else [])
    assert moe.workspace.addresses() == addresses


def test_a_workspace_that_is_fixed_refuses_to_grow(config):
    moe = grouped(config, BATCHED)
    moe.warm_up(4, torch.float32)
    assert moe.workspace is not None
    moe.workspace.is_fixed = True
    with pytest.raises(AssertionError, match="after warm-up"):
        moe(torch.randn(1, 5, config.hidden_size), None)


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("num_shared", [0, 1])
def test_between_kernels_nothing_waits_and_nothing_is_made(config, launched, num_shared, is_batch_invariant):
    """But for what a shared expert of its own takes; from one token on, where two programs suffice."""
    plan = MoePlan(TRITON, {5: LayerPlan(ExpertScheme.FP32, num_shared)}, is_batch_invariant)
    moe, num_tokens = filled_moe(replace(config, n_routed_experts=16), plan), 120
    moe.warm_up(num_tokens, torch.float32)
    assert moe.workspace is not None
    moe.workspace.is_fixed = True
    addresses, out = moe.workspace.addresses(), torch.empty(1, num_tokens, config.hidden_size)
    names = set()
    for size in range(1, num_tokens + 1):
        hidden = torch.randn(1, size, config.hidden_size)
        with Watch() as apart:
            if not num_shared:
                moe.shared_experts(hidden)
        launched.clear()
        with Watch() as watch:
            moe(hidden, None, out[:, :size])
        assert watch.waiting == set()
        assert watch.new_bytes == apart.new_bytes, size
        names.add(tuple(launch.kernel.__name__ for launch in launched))
    assert moe.workspace.addresses() == addresses
    # of a few tokens router logits are a launch too
    assert sorted(map(len, names)) == ([5] if is_batch_invariant else [4, 5, 6]), names


CALIBRATED = InputScheme(InputCode.NVFP4, 16, is_static=True)
PER_TOKEN, PER_GROUP = InputScheme(InputCode.FP8), InputScheme(InputCode.FP8, 128)
INT8_TOKEN = InputScheme(InputCode.INT8)


@pytest.mark.parametrize(
    ("scheme", "inputs", "multiplies_codes", "kernels"),
    [
        (ExpertScheme.FP8_CHANNEL, PER_TOKEN, True, ["quantize_rows_kernel", "up_kernel", "quantize_rows_kernel"]),
        (ExpertScheme.FP8_BLOCK, PER_GROUP, True, ["quantize_rows_kernel", "up_kernel"]),
        (ExpertScheme.INT8_W8A8, INT8_TOKEN, True, ["quantize_rows_kernel", "up_kernel", "quantize_rows_kernel"]),
        (ExpertScheme.NVFP4, CALIBRATED, True, ["quantize_fp4_kernel", "up_kernel", "quantize_fp4_kernel"]),
        (ExpertScheme.FP8_CHANNEL, PER_GROUP, False, ["up_kernel"]),
        (ExpertScheme.FP8_BLOCK, PER_TOKEN, False, ["up_kernel"]),
        (ExpertScheme.INT8_CHANNEL, INT8_TOKEN, False, ["up_kernel"]),
        (ExpertScheme.BF16, INT8_TOKEN, False, ["up_kernel"]),
    ],
)
def test_rounding_inputs_makes_nothing_new(launched, scheme, inputs, multiplies_codes, kernels):
    """As codes that kernels multiply, or as the values of codes, which torch makes in the workspace."""
    weights, workspace = random_experts(scheme, 8, 1, 256, 128), Workspace(torch.device("cpu"))
    experts = LocalExperts(weights, InputQuantizer(inputs), InputQuantizer(inputs), multiplies_codes)
    if inputs is CALIBRATED:
        scales = CalibratedInputs.of([100.0] * 9, torch.device("cpu"))
        experts = LocalExperts(weights, multiplies_codes=True, calibrated=(scales, scales))
    backend, hidden = FusedExperts(FusedOps.of_kernels()), torch.randn(200, 256).bfloat16()
    for size in (*warm_up_tokens(200, 9, 3), 1, 2, 7, 100, 199):
        is_fixed, slots, out = workspace.is_fixed, random_slots(size, 8, 2), torch.empty(size, 256).bfloat16()
        workspace.is_fixed = size == 1 or is_fixed
        launched.clear()
        with Watch() as watch:
            backend.run(hidden[:size], slots, experts, workspace, out)
        assert watch.waiting == set()
        assert watch.new_bytes == [] or not workspace.is_fixed
    assert [launch.kernel.__name__ for launch in launched] == [
        "place_in_blocks", *kernels, "down_kernel", "add_slots",
    ]  # fmt: skip


def test_rounding_without_a_workspace_is_seen_to_make_something():
    with Watch() as watch:
        InputQuantizer(INT8_TOKEN)(torch.randn(3, 8))
    assert watch.new_bytes


def test_memory_of_blocks_and_of_counts_is_taken_for_all_numbers_of_tokens(config, launched):
    """As many slots as are counted in runs, and then fewer, in smaller and more blocks."""
    moe = grouped(replace(config, n_routed_experts=64), TRITON)
    moe.warm_up(1700, torch.float32)
    assert moe.workspace is not None
    moe.workspace.is_fixed = True
    addresses = moe.workspace.addresses()
    assert any(name.startswith("run_counts") for name in addresses)
    for size in (1, 5, 6, 7, 100, 226, 227, 228, 454, 455, 456, 1023, 1024, 1025, 1366, 1700):
        moe(torch.randn(1, size, config.hidden_size), None)
    assert moe.workspace.addresses() == addresses


def test_what_an_observer_keeps_of_a_routing_is_its_own(config, monkeypatch):
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)
    moe, seen = grouped(config, TRITON), list[Routing]()
    moe(torch.randn(1, 5, config.hidden_size), seen.append)
    ids, weights = seen[0].topk_ids_TK.clone(), seen[0].topk_weights_TK.clone()
    moe(torch.randn(1, 5, config.hidden_size), seen.append)
    assert not torch.equal(seen[1].topk_weights_TK, weights)
    assert torch.equal(seen[0].topk_ids_TK, ids)
    assert torch.equal(seen[0].topk_weights_TK, weights)
