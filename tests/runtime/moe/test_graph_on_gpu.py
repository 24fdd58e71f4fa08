"""Blocks in CUDA graphs, in batches, and after their warm-up, on a real GPU; without one, what can be had of it.

On the CPU twins stand for kernels, a call for a replay, and the workspace for the memory that torch has.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from converters.config import Glm4MoeConfig
from converters.formats.inputs import InputCode, InputScheme
from runtime.model.activations import InputQuantizer
from runtime.moe.experts import LocalExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.plan import BATCHED, CUTLASS, TRITON, LayerPlan, MoePlan
from runtime.moe.runner import MoE
from runtime.moe.weights import ExpertScheme
from runtime.moe.workspace import Workspace
from tests.builders import small_config
from tests.runtime.kernels.moe_layers import moved
from tests.runtime.moe.expert_layers import random_experts
from tests.runtime.moe.moe_blocks import coded_moe

BF16, H, I, E, K = torch.bfloat16, 256, 128, 16, 4  # noqa: E741
PER_TOKEN, PER_GROUP = InputScheme(InputCode.FP8), InputScheme(InputCode.FP8, 128)
INT8_TOKEN = InputScheme(InputCode.INT8)
# scheme of the weights, and what inputs are rounded to
KINDS = {
    "bf16": (ExpertScheme.BF16, None),
    "fp8-channel": (ExpertScheme.FP8_CHANNEL, None),
    "fp8-channel, codes": (ExpertScheme.FP8_CHANNEL, PER_TOKEN),
    "fp8-block, codes": (ExpertScheme.FP8_BLOCK, PER_GROUP),
    "int8-channel": (ExpertScheme.INT8_CHANNEL, None),
    "int8-w8a8, codes": (ExpertScheme.INT8_W8A8, INT8_TOKEN),
    "nvfp4": (ExpertScheme.NVFP4, None),
}
BACKENDS = [(TRITON, kind) for kind in KINDS] + [(BATCHED, "bf16"), (CUTLASS, "bf16")]
# two programs, tiles of 16, and of 64
SIZES = (1, 17, 256)


@dataclass(frozen=True)
class Machine:
    """Where blocks run.

    Args:
        device: of everything.
        batches: sizes in which a row is looked at; the last is the whole.
        replays: of a graph.
    """

    device: torch.device
    batches: tuple[int, ...]
    replays: int

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def replay_of(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return what repeats a call: on a GPU, a graph of it, captured behind a call on another stream."""
        if not self.is_cuda:
            return call
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def memory(self, moe: MoE) -> tuple[int, int]:
        """Return bytes that are held now, and how often memory has been taken so far."""
        if not self.is_cuda:
            assert moe.workspace is not None
            return moe.workspace.num_bytes, len(moe.workspace.addresses())
        torch.cuda.synchronize()
        taken = torch.cuda.memory_stats(self.device)["allocation.all.allocated"]
        return torch.cuda.memory_allocated(self.device), taken


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Machine:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        return Machine(torch.device("cuda", 0), (2, 17, 256, 4096), 100)
    monkeypatch.setattr(FusedOps, "of_kernels", FusedOps.of_twins)
    return Machine(torch.device("cpu"), (2, 17, 40), 3)


def block(
    machine: Machine, backend: str, kind: str, *, is_batch_invariant: bool = False, is_shared_fused: bool = True
) -> MoE:
    """Return a whole block on a machine: router, experts, and a shared expert, as a slot or apart."""
    scheme, inputs = KINDS[kind]
    num_shared = int(is_shared_fused)
    rounding = None if inputs is None else InputQuantizer(inputs)
    weights = moved(random_experts(scheme, E, num_shared, H, I), str(machine.device))
    local = LocalExperts(weights, rounding, rounding, multiplies_codes=inputs is not None)
    sizes = {"n_routed_experts": E, "num_experts_per_tok": K, "hidden_size": H, "moe_intermediate_size": I}
    config = replace(Glm4MoeConfig.from_hf(small_config()), **sizes, n_group=1, topk_group=1)
    plan = MoePlan(backend, {5: LayerPlan(scheme, num_shared)}, is_batch_invariant)
    moe = coded_moe(config, plan, local, BF16)
    # the other modules stay empty
    moe.gate.to(machine.device)
    moe.shared_experts.to(machine.device)
    moe.load(local, Workspace(machine.device))
    return moe


def tokens(machine: Machine, num_tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(1, num_tokens, H, generator=torch.Generator().manual_seed(seed)).to(machine.device, BF16)


@pytest.mark.parametrize("is_shared_fused", [True, False])
@pytest.mark.parametrize(("backend", "kind"), BACKENDS)
def test_replays_of_a_graph_are_what_calls_are(
    machine: Machine, backend: str, kind: str, is_shared_fused: bool
) -> None:
    """Bit for bit, with other tokens and another routing in each than those that it was captured with."""
    moe = block(machine, backend, kind, is_shared_fused=is_shared_fused)
    moe.warm_up(SIZES[-1], BF16)
    assert moe.workspace is not None
    moe.workspace.is_fixed = True
    for size in SIZES:
        given = [tokens(machine, size, seed) for seed in range(3)]
        expected = [moe(hidden, None).clone() for hidden in given]
        assert not torch.equal(expected[1], expected[2])
        hidden, out = given[0].clone(), torch.empty_like(given[0])
        replay = machine.replay_of(lambda hidden=hidden, out=out: moe(hidden, None, out))
        for number in range(machine.replays):
            hidden.copy_(given[number % 3])
            # what no replay writes stays
            out.fill_(float("nan"))
            replay()
            assert torch.equal(out, expected[number % 3]), (size, number)


def test_a_row_of_batched_blocks_is_the_same_in_every_batch(machine: Machine) -> None:
    check_a_row(machine, BATCHED, "bf16")


# on the CPU test_interpreted.py does it, with kernels: twins take other products for other numbers of rows
@pytest.mark.parametrize("machine", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_fused_kernels_is_the_same_in_every_batch(machine: Machine, kind: str) -> None:
    check_a_row(machine, TRITON, kind)


def check_a_row(machine: Machine, backend: str, kind: str) -> None:
    """Hold a row alone against the same in batches, at both ends, and all rows of batches against the largest."""
    moe = block(machine, backend, kind, is_batch_invariant=True)
    hidden = tokens(machine, machine.batches[-1], 0)
    alone = moe(hidden[:, :1], None).clone()
    assert bool(alone.any())
    whole = moe(hidden, None).clone()
    for size in machine.batches:
        assert torch.equal(moe(hidden[:, :size], None), whole[:, :size]), size
        assert torch.equal(moe(hidden[:, :size], None)[:, :1], alone), size
        # and in another place
        assert torch.equal(moe(hidden[:, :size].flip(1).contiguous(), None)[:, -1:], alone), size


@pytest.mark.parametrize("is_shared_fused", [True, False])
@pytest.mark.parametrize(("backend", "kind"), BACKENDS)
def test_memory_stays_as_it_is_after_a_warm_up(
    machine: Machine, backend: str, kind: str, is_shared_fused: bool
) -> None:
    moe, most = block(machine, backend, kind, is_shared_fused=is_shared_fused), SIZES[-1]
    unused = machine.memory(moe)
    moe.warm_up(most, BF16)
    assert machine.memory(moe) > unused
    assert moe.workspace is not None
    moe.workspace.is_fixed = True
    given = [tokens(machine, size, size) for size in range(1, most + 1, 17)]
    # libraries take room for themselves at first
    for hidden in given:
        moe(hidden, None)
    before = machine.memory(moe)
    for hidden in given:
        moe(hidden, None)
        now = machine.memory(moe)
        assert now[0] == before[0], hidden.shape
        # torch's own operators take room inside, and give it back
        assert backend != TRITON or now[1] == before[1], hidden.shape
