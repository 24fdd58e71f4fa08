"""What a CUDA graph asks for, seen on the CPU: nothing waits for a value, and after a warm-up nothing is made."""

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
from runtime.kernels.moe import configs
from runtime.model.activations import InputQuantizer
from runtime.moe.batched import warm_up_tokens
from runtime.moe.expert_map import ExpertMap, ExpertShare
from runtime.moe.experts import CalibratedInputs, LocalExperts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.plan import BATCHED, CUTLASS, TRITON, VANILLA, VANILLA_PLAN, LayerPlan, MoePlan
from runtime.moe.router import Routing
from runtime.moe.runner import MoE
from runtime.moe.weights import ExpertScheme
from runtime.moe.workspace import Workspace
from tests.runtime.moe.expert_layers import random_experts, random_slots
from tests.runtime.moe.moe_blocks import PoisonedWorkspace, coded_moe, filled_moe

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


FEW, PER_TOKEN, PER_GROUP = (1, 2, 3, 16, 17, 40), InputScheme(InputCode.FP8), InputScheme(InputCode.FP8, 128)
INT8_TOKEN, CALIBRATED = InputScheme(InputCode.INT8), InputScheme(InputCode.NVFP4, 16, is_static=True)
BY_A_SCALE = InputScheme(InputCode.FP8, None, is_static=True)
E4M3, BF16 = torch.float8_e4m3fn, torch.bfloat16
# what torch's own operators make, and take no room for
MADE = {BATCHED: [], CUTLASS: ["aten::_grouped_mm"] * 2, TRITON: []}


def check_nothing_is_made(
    moe: MoE, num_tokens: int, dtype: torch.dtype, sizes: tuple[int, ...], made: list[str]
) -> None:
    """Hold what a block makes behind its warm-up against what it may, its result in the workspace or elsewhere.

    Seen are results of operators; what these need inside, and give back, is torch's.
    """
    hidden_size = moe.gate.config.hidden_size
    moe.warm_up(num_tokens, dtype)
    assert moe.workspace is not None
    moe.workspace.is_fixed = True
    addresses, out = moe.workspace.addresses(), torch.empty(1, num_tokens, hidden_size, dtype=dtype)
    for size in sizes:
        hidden = torch.randn(1, size, hidden_size).to(dtype)
        for where in (None, out[:, :size]):
            with Watch() as watch:
                moe(hidden, None, where)
            assert watch.waiting == set()
            assert [name for name, _ in watch.new_bytes] == made, size
    assert moe.workspace.addresses() == addresses


@pytest.mark.parametrize("shared", ["fused", "apart", "apart, coded", "apart, codes of inputs"])
@pytest.mark.parametrize("scheme", ExpertScheme)
@pytest.mark.parametrize("backend", [BATCHED, CUTLASS, TRITON])
def test_after_warm_up_a_block_makes_nothing(config, launched, backend, scheme, shared):
    """In any scheme, with a shared expert among the experts or apart, in values or in codes."""
    dtype = scheme.code_dtype if scheme.is_plain else BF16
    config = replace(config, n_routed_experts=8, num_experts_per_tok=2, hidden_size=256, moe_intermediate_size=144)
    num_shared, weight = int(shared == "fused"), dtype if shared == "apart" else E4M3
    rounding = InputQuantizer(INT8_TOKEN) if shared == "apart, codes of inputs" else None
    local = LocalExperts(random_experts(scheme, 8, num_shared, 256, 144), rounding, rounding)
    plan = MoePlan(backend, {5: LayerPlan(scheme, num_shared)})
    check_nothing_is_made(coded_moe(config, plan, local, weight, rounding), 40, dtype, FEW, MADE[backend])


@pytest.mark.parametrize("inputs", [None, PER_TOKEN, PER_GROUP, INT8_TOKEN, CALIBRATED, BY_A_SCALE])
@pytest.mark.parametrize("weight", [torch.float32, BF16, E4M3])
def test_a_shared_expert_apart_is_computed_in_the_workspace(config, weight, inputs):
    """In all that linear layers know; and the bits are those of its module."""
    config = replace(config, hidden_size=256, moe_intermediate_size=128, routed_scaling_factor=0.0)
    rounding = None if inputs is None else InputQuantizer(inputs, 0.25 if inputs is BY_A_SCALE else 1.0)
    experts = LocalExperts(random_experts(ExpertScheme.BF16, config.n_routed_experts, 0, 256, 128))
    plan = MoePlan(BATCHED, {5: LayerPlan(ExpertScheme.BF16)})
    moe, hidden = coded_moe(config, plan, experts, weight, rounding), torch.randn(1, 9, 256).to(BF16)
    assert torch.equal(moe(hidden, None), moe.shared_experts(hidden))
    check_nothing_is_made(moe, 40, BF16, (1, 9, 40), [])


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("num_groups", [1, 4])
def test_limited_groups_and_fixed_blocks_make_nothing(config, num_groups, is_batch_invariant):
    config = replace(config, n_routed_experts=16, n_group=num_groups, topk_group=min(2, num_groups))
    plan = MoePlan(BATCHED, {5: LayerPlan(ExpertScheme.FP32, 1)}, is_batch_invariant)
    check_nothing_is_made(filled_moe(config, plan), 60, torch.float32, tuple(range(1, 61)), [])


@pytest.mark.parametrize("num_shared", [0, 1])
@pytest.mark.parametrize("backend", [BATCHED, CUTLASS])
def test_a_rank_of_several_makes_nothing(config, backend, num_shared):
    num_routed = config.n_routed_experts
    held = [[*range(rank, num_routed, 2), *range(num_routed, num_routed + num_shared)] for rank in range(2)]
    share = ExpertShare(ExpertMap.of(held, num_routed + num_shared), 1)
    moe = filled_moe(config, MoePlan(backend, {5: LayerPlan(ExpertScheme.FP32, num_shared)}), share)
    check_nothing_is_made(moe, 40, torch.float32, FEW, MADE[backend])


ALL = [(backend, num_shared) for backend in (BATCHED, CUTLASS, TRITON) for num_shared in (0, 1)]


@pytest.mark.parametrize(("backend", "num_shared"), ALL)
def test_nothing_is_used_behind_its_buffer(config, monkeypatch, backend, num_shared):
    """Neither within a block, nor when the next block with the same workspace runs; see `PoisonedWorkspace`."""
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)
    moe, hidden = grouped(config, backend, num_shared), torch.randn(2, 9, config.hidden_size)
    expected = moe(hidden, None).clone()
    moe.workspace = PoisonedWorkspace(hidden.device)
    first, own = moe(hidden, None), moe(hidden, None, torch.empty_like(hidden))
    assert torch.equal(first, expected)
    moe(hidden + 1, None)
    assert torch.equal(own, expected)
    # the result of another block lies where this one's did
    assert not torch.equal(first, expected)


@pytest.mark.parametrize("scheme", [ExpertScheme.FP8_CHANNEL, ExpertScheme.FP8_BLOCK, ExpertScheme.NVFP4])
@pytest.mark.parametrize(("backend", "num_shared"), ALL)
def test_weights_and_inputs_in_codes_use_nothing_behind_its_buffer(config, monkeypatch, backend, num_shared, scheme):
    """The shared expert is multiplied out, and its inputs are rounded, in what routed experts use as well."""
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)
    config = replace(config, n_routed_experts=8, num_experts_per_tok=2, hidden_size=256, moe_intermediate_size=144)
    rounding = InputQuantizer(INT8_TOKEN)
    local = LocalExperts(random_experts(scheme, 8, num_shared, 256, 144), rounding, rounding)
    moe = coded_moe(config, MoePlan(backend, {5: LayerPlan(scheme, num_shared)}), local, E4M3, rounding)
    hidden = torch.randn(1, 9, 256).to(BF16)
    expected = moe(hidden, None).clone()
    moe.workspace = PoisonedWorkspace(hidden.device)
    assert torch.equal(moe(hidden, None), expected)
    assert expected.isfinite().all()


@pytest.mark.parametrize(("backend", "num_shared"), [*ALL, (VANILLA, 0)])
def test_a_result_may_go_where_the_tokens_are(config, monkeypatch, backend, num_shared):
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)
    moe = filled_moe(config, VANILLA_PLAN) if backend == VANILLA else grouped(config, backend, num_shared)
    hidden = torch.randn(2, 9, config.hidden_size)
    expected = moe(hidden, None).clone()
    assert moe(hidden, None, hidden) is hidden
    assert torch.equal(hidden, expected)


@pytest.mark.parametrize("num_tokens", [1, 50])
def test_tiles_are_chosen_once_for_a_call(config, launched, monkeypatch, num_tokens):
    moe, chosen = grouped(config, TRITON), list[Any]()
    choose = configs.choose

    def count(*args: Any, **kwargs: Any) -> Any:
        chosen.append(args)
        return choose(*args, **kwargs)

    monkeypatch.setattr(configs, "choose", count)
    hidden = torch.randn(1, num_tokens, config.hidden_size)
    moe(hidden, None)
    assert len(chosen) == 1


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
    """From one token on, where two programs suffice."""
    plan = MoePlan(TRITON, {5: LayerPlan(ExpertScheme.FP32, num_shared)}, is_batch_invariant)
    moe, num_tokens = filled_moe(replace(config, n_routed_experts=16), plan), 120
    moe.warm_up(num_tokens, torch.float32)
    assert moe.workspace is not None
    moe.workspace.is_fixed = True
    addresses, out = moe.workspace.addresses(), torch.empty(1, num_tokens, config.hidden_size)
    names = set()
    for size in range(1, num_tokens + 1):
        hidden = torch.randn(1, size, config.hidden_size)
        launched.clear()
        with Watch() as watch:
            moe(hidden, None, out[:, :size])
        assert watch.waiting == set()
        assert watch.new_bytes == [], size
        names.add(tuple(launch.kernel.__name__ for launch in launched))
    assert moe.workspace.addresses() == addresses
    # of a few tokens router logits are a launch too
    assert sorted(map(len, names)) == ([5] if is_batch_invariant else [4, 5, 6]), names


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
