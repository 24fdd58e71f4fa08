"""Who computes the experts: our backends, and public implementations that can run beside them on one GPU.

Everyone gets the same slots, the shared expert as one of them, so that nobody computes less. What is not installed is
reported as absent. Wheels that were brought along are found through PYTHONPATH.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.moe_layers import Batch
from benchmarks.moe_timing import FAILURES, reason
from runtime.moe.batched import BatchedExperts
from runtime.moe.dispatcher import Slots
from runtime.moe.experts import LocalExperts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.grouped import CutlassExperts
from runtime.moe.weights import ExpertScheme, ExpertWeights
from runtime.moe.workspace import Workspace

# copies the weights of every slot: 24 GB at 64 tokens of GLM-4.6
BATCHED_MM_TOKENS = 64
# copies those of every block; beyond it takes longer than all else together
BATCHED_TOKENS = 256
# an expert after the other is for the host to launch
LOOP_TOKENS = 4096
LIGER, SGLANG = "Liger-Kernel", "SGLang's fused_moe_kernel"
# its own tuning takes minutes, once for all numbers of tokens, by the first that comes; read when it is imported
_LIGER_PINNED = ("LIGER_FUSED_MOE_AUTOTUNE", "0")


@dataclass(frozen=True, slots=True)
class Candidate:
    """Somebody who computes the experts of a batch.

    Args:
        name: as reported.
        run: returns (T, H).
        is_ours: one of our backends.
        is_graphable: never makes the host wait, so that a CUDA graph can hold it.
        max_tokens: beyond, it is not run.
        version: of the package, and how it was set up.
        others: the same on copies of the layer.
        is_compiled: as a whole, so that there are no operations to count.
    """

    name: str
    run: Callable[[Batch], torch.Tensor]
    is_ours: bool = False
    is_graphable: bool = True
    max_tokens: int | None = None
    version: str = ""
    others: tuple[Callable[[Batch], torch.Tensor], ...] = ()
    is_compiled: bool = False

    def on(self, batches: Sequence[Batch]) -> Callable[[int], torch.Tensor]:
        """Return what runs the input of a number: batches in turn, copies of the layer in turn."""
        runs = (self.run, *self.others)
        return lambda number: runs[number % len(runs)](batches[number % len(batches)])

    def num_inputs(self, batches: Sequence[Batch]) -> int:
        """Return how many inputs there are until each batch and each copy has had its turn."""
        return max(len(batches), 1 + len(self.others))


def in_turn(copies: Sequence[Sequence[Candidate]]) -> list[Candidate]:
    """Return candidates for copies of one layer as candidates that take one copy after the other."""
    return [replace(first, others=tuple(one.run for one in rest)) for first, *rest in zip(*copies, strict=True)]


def ours(experts: LocalExperts, device: torch.device) -> Iterator[Candidate]:
    """Yield our backends for a layer's scheme; on the CPU, the twins stand for the kernels."""
    is_cuda = device.type == "cuda"
    ops = FusedOps.of_kernels() if is_cuda else FusedOps.of_twins()
    note = "kernels" if is_cuda else "torch twins of the kernels"
    yield of_backend("triton", FusedExperts(ops), experts, device, note=note)
    yield of_backend("triton, batch-invariant", FusedExperts(ops, is_batch_invariant=True), experts, device, note=note)
    scheme = experts.weights.scheme
    if scheme is ExpertScheme.BF16 or (scheme is ExpertScheme.FP8_CHANNEL and experts.multiplies_codes):
        name = "torch.nn.functional.grouped_mm" if hasattr(F, "grouped_mm") else "torch._grouped_mm"
        yield of_backend("cutlass", CutlassExperts(), experts, device, note=name)
    if scheme is ExpertScheme.BF16:
        yield of_backend("batched", BatchedExperts(), experts, device, max_tokens=BATCHED_TOKENS)


def of_backend(
    name: str,
    backend: Any,
    experts: LocalExperts,
    device: torch.device,
    *,
    note: str = "",
    max_tokens: int | None = None,
) -> Candidate:
    """Return one of our backends, with a workspace of its own."""
    workspace = Workspace(device)

    def run(batch: Batch) -> torch.Tensor:
        out_TH = torch.empty_like(batch.hidden_TH)
        backend.run(batch.hidden_TH, batch.slots, experts, workspace, out_TH)
        return out_TH

    return Candidate(name, run, is_ours=True, max_tokens=max_tokens, version=note)


@dataclass(frozen=True, slots=True)
class Halves:
    """Plain weights as everyone else has them: gate above up (E, 2I, H), and down (E, H, I)."""

    gate_up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def of(cls, weights: ExpertWeights) -> "Halves":
        """Return a copy of interleaved weights."""
        codes = weights.up.codes
        return cls(codes.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2).contiguous(), weights.down.codes)


def peers(weights: ExpertWeights) -> tuple[list[Candidate], dict[str, str]]:
    """Return who else is here for plain weights, and who is absent, with the reason."""
    halves, found, absent = Halves.of(weights), [loop(weights)], {}
    makers = {"transformers": transformers_peers, LIGER: liger, SGLANG: sglang}
    for name, make in makers.items():
        try:
            found += make(halves, weights)
        except (ImportError, PackageNotFoundError, AttributeError, *FAILURES) as error:
            absent[name] = reason(error)
    if weights.device.type != "cuda":
        absent |= {peer.name: "needs a GPU" for peer in found if peer.name in (LIGER, SGLANG)}
        found = [peer for peer in found if peer.name not in absent]
    absent["vLLM, FlashInfer, DeepGEMM, SonicMoE"] = "too large to bring along, or built longer than this runs"
    return found, absent


def loop(weights: ExpertWeights) -> Candidate:
    """Return an expert after the other, as reference implementations do it."""

    def run(batch: Batch) -> torch.Tensor:
        ids_TK, weights_TK = batch.slots.ids_TK, batch.slots.weights_TK
        out_TH = torch.zeros(batch.hidden_TH.shape, dtype=torch.float32, device=batch.hidden_TH.device)
        for expert in ids_TK.unique().tolist():
            row, choice = torch.where(ids_TK == expert)
            gate_up = F.linear(batch.hidden_TH[row], weights.up.codes[expert])
            down = F.linear(F.silu(gate_up[:, 0::2]) * gate_up[:, 1::2], weights.down.codes[expert])
            out_TH.index_add_(0, row, down * weights_TK[row, choice, None])
        return out_TH.to(batch.hidden_TH.dtype)

    return Candidate("an expert after the other", run, is_graphable=False, max_tokens=LOOP_TOKENS, version="F.linear")


def transformers_peers(halves: Halves, weights: ExpertWeights) -> list[Candidate]:
    """Return the three implementations of transformers' experts of this model."""
    from transformers import Glm4MoeConfig
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeExperts

    found = []
    for kind in ("eager", "batched_mm", "grouped_mm"):
        config = Glm4MoeConfig(
            hidden_size=weights.hidden_size,
            moe_intermediate_size=weights.intermediate_size,
            n_routed_experts=weights.num_experts,
        )
        config._experts_implementation = kind
        with torch.device("meta"):
            module = Glm4MoeExperts(config)
        module.gate_up_proj = torch.nn.Parameter(halves.gate_up, requires_grad=False)
        module.down_proj = torch.nn.Parameter(halves.down, requires_grad=False)
        limit = {"batched_mm": BATCHED_MM_TOKENS, "eager": LOOP_TOKENS}.get(kind)
        run = partial(_run_transformers, module)
        # by its documentation, no graph can hold them
        found.append(Candidate(f"transformers {kind}", run, False, False, limit, version("transformers")))
    return found


def _run_transformers(module: torch.nn.Module, batch: Batch) -> torch.Tensor:
    slots = batch.slots
    with torch.no_grad():
        return module(batch.hidden_TH, slots.ids_TK.long(), slots.weights_TK.to(batch.hidden_TH.dtype))


def liger(halves: Halves, _: ExpertWeights) -> list[Candidate]:
    """Return the fused forward of Liger-Kernel."""
    if importlib.util.find_spec("liger_kernel") is None:
        raise ImportError("no liger_kernel on PYTHONPATH")
    os.environ.setdefault(*_LIGER_PINNED)
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def run(batch: Batch) -> torch.Tensor:
        slots: Slots = batch.slots
        weights_TK = slots.weights_TK.to(batch.hidden_TH.dtype)
        with torch.no_grad():
            return LigerFusedMoEFunction.apply(batch.hidden_TH, halves.gate_up, halves.down, slots.ids_TK, weights_TK)

    is_tuned = os.environ[_LIGER_PINNED[0]] != _LIGER_PINNED[1]
    note = f"{version('liger-kernel')}, {'tuned by itself' if is_tuned else 'the tiles it has without tuning'}"
    # its metadata is made with counts that the host waits for
    return [Candidate(LIGER, run, is_graphable=False, version=note)]


def sglang(halves: Halves, _: ExpertWeights) -> list[Candidate]:
    """Return SGLang's grouped kernel, of which vLLM's is the ancestor."""
    from benchmarks.moe_sglang import kernels, run_sglang
    from runtime.kernels.moe.build_rows import build_rows

    kernels()

    def run(batch: Batch) -> torch.Tensor:
        slots = batch.slots
        gate_up, down = halves.gate_up, halves.down
        return run_sglang(batch.hidden_TH, gate_up, down, slots.ids_TK, slots.weights_TK, build_rows)

    return [Candidate(SGLANG, run, version=f"{version('sglang')}, tiles of public tables, not tuned here")]
