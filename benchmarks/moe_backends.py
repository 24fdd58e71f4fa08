"""What each backend does for one MoE layer at real sizes: counted on tensors without memory, for a drawn routing."""

from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from benchmarks.moe_counts import Counts, count
from runtime.kernels.launch import Launch
from runtime.kernels.moe.build_rows import build_rows_launches
from runtime.kernels.moe.combine import combine_launch
from runtime.kernels.moe.configs import choose
from runtime.kernels.moe.down import down_launch
from runtime.kernels.moe.gemv import down_gemv_launch, up_gemv_launch
from runtime.kernels.moe.up import up_launch
from runtime.model.mlp import GatedMlp
from runtime.moe.batched import BatchedExperts, block_rows
from runtime.moe.cost import LayerShape, products
from runtime.moe.dispatcher import Slots, combine, dispatch
from runtime.moe.experts import LocalExperts, vanilla_experts
from runtime.moe.fused import FusedExperts
from runtime.moe.fused_ops import FusedOps
from runtime.moe.grouped import CutlassExperts
from runtime.moe.plan import BATCHED, CUTLASS, TRITON, VANILLA
from runtime.moe.weights import ExpertScheme, ExpertWeights, Packed
from runtime.moe.workspace import Workspace

SLOT, APART = "slot", "apart"
META, BF16 = torch.device("meta"), torch.bfloat16
# rows of a tile of the grouped product on Hopper; which one it takes is not for us to know
CUTLASS_ROWS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """A backend at a number of tokens.

    Args:
        backend: whose.
        shared_expert: a slot of each token, or products of its own behind the routed ones.
        tokens: M.
        distinct_experts: routed ones that the drawn routing touches.
        launches: operations or kernels.
        products: those that multiply.
        waits: times that the host waits.
        num_bytes: moved, by operands and results.
        floor_bytes: that nothing can do without.
        padding: rows computed for each useful one.
    """

    backend: str
    shared_expert: str
    tokens: int
    distinct_experts: int
    launches: int
    products: int
    waits: int
    num_bytes: float
    floor_bytes: float
    padding: float


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer without memory, and a routing that was drawn."""

    shape: LayerShape
    num_tokens: int

    @property
    def ids(self) -> torch.Tensor:
        """Drawn ids (T, K), a shared expert last; the same each time."""
        shape, generator = self.shape, torch.Generator().manual_seed(0)
        chance = torch.ones(self.num_tokens, shape.num_routed)
        ids = torch.multinomial(chance, shape.num_chosen, generator=generator)
        shared = torch.full((self.num_tokens, shape.num_shared), shape.num_routed)
        return torch.cat((ids, shared), 1).to(torch.int32)

    @property
    def num_distinct(self) -> int:
        """Routed experts that are touched."""
        return len(self.ids[:, : self.shape.num_chosen].unique())

    @property
    def routed(self) -> "Layer":
        """The same without its shared expert."""
        return Layer(replace(self.shape, num_shared=0), self.num_tokens)

    @property
    def hidden(self) -> torch.Tensor:
        """Tokens."""
        return torch.empty(self.num_tokens, self.shape.hidden_size, dtype=BF16, device=META)

    @property
    def slots(self) -> Slots:
        """Where they go."""
        size = (self.num_tokens, self.shape.num_slots)
        ids = torch.empty(size, dtype=torch.int32, device=META)
        return Slots(ids, torch.empty(size, device=META), self.shape.num_experts, self.shape.num_shared)

    @property
    def experts(self) -> LocalExperts:
        """Plain weights in grouped layout."""
        shape = self.shape
        up = (shape.num_experts, 2 * shape.intermediate_size, shape.hidden_size)
        down = (shape.num_experts, shape.hidden_size, shape.intermediate_size)
        packed = [Packed(torch.empty(size, dtype=BF16, device=META)) for size in (up, down)]
        sizes = (shape.num_routed, shape.num_shared, shape.hidden_size, shape.intermediate_size)
        return LocalExperts(ExpertWeights(ExpertScheme.BF16, *packed, *sizes))


def count_backend(backend: Any, layer: Layer) -> Counts:
    """Return what a backend that launches operations of torch does for a layer."""
    hidden, slots, experts = layer.hidden, layer.slots, layer.experts
    out, workspace = torch.empty_like(hidden), Workspace(META)
    share = (layer.num_distinct + layer.shape.num_shared) / layer.shape.num_experts
    return count(lambda: backend.run(hidden, slots, experts, workspace, out), share)


@cache
def one_expert(hidden_size: int, intermediate_size: int) -> GatedMlp:
    """Return an expert as a module; all of a layer's are alike here."""
    with torch.device("meta"):
        return GatedMlp(hidden_size, intermediate_size).to(META, BF16)


def count_vanilla(layer: Layer) -> Counts:
    """Return what an expert after the other does for the drawn routing, and then the shared one."""
    shape, hidden = layer.shape, layer.hidden
    expert = one_expert(shape.hidden_size, shape.intermediate_size)
    ids = layer.routed.ids.long()
    weights = torch.empty(layer.num_tokens, shape.num_chosen, device=META)

    def run() -> torch.Tensor:
        dispatched = dispatch(hidden, ids, shape.num_routed)
        rows = vanilla_experts(dispatched.rows_RD, dispatched.rows_per_expert_E, [expert] * shape.num_routed)
        routed = combine(rows, weights, dispatched).to(hidden.dtype)
        return routed + expert(hidden)

    found = count(run)
    # `tolist` is no operation that could be counted
    found.waits += 1
    return found


def count_shared(layer: Layer) -> Counts:
    """Return what a shared expert by itself does, and its sum with the routed ones."""
    expert, hidden = one_expert(layer.shape.hidden_size, layer.shape.intermediate_size), layer.hidden
    workspace, out, total = Workspace(META), torch.empty_like(hidden), torch.empty_like(hidden)

    def run() -> None:
        expert.forward_into(hidden, workspace, out)
        total.add_(out)

    return count(run)


def fused_launches(layer: Layer) -> list[Launch]:
    """Return the kernels that the triton backend launches for a layer."""
    found: list[Launch] = []

    def build_rows(*args: Any, **kwargs: Any) -> Any:
        launches, rows = build_rows_launches(*args, **kwargs)
        found.extend(launches)
        return rows

    def one(make: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(make(*args, **kwargs))
        return found[-1].outputs[0]

    def add(values: torch.Tensor, ids: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return one(combine_launch, values, ids, out=(out,))

    ops = FusedOps(
        route=_never, build_rows=build_rows, build_masked_rows=_never, quantize_rows=_never,
        quantize_fp4_rows=_never, up=partial(one, up_launch), down=partial(one, down_launch),
        up_gemv=partial(one, up_gemv_launch), down_gemv=partial(one, down_gemv_launch), combine=add,
        combine_norm=_never, rms_norm=_never, router_logits=_never,
    )  # fmt: skip
    hidden = layer.hidden
    FusedExperts(ops).run(hidden, layer.slots, layer.experts, Workspace(META), torch.empty_like(hidden))
    return found


def _never(*args: Any, **kwargs: Any) -> Any:
    raise AssertionError("this step is not counted here")


def count_fused(layer: Layer) -> tuple[Counts, float]:
    """Return the triton backend, bytes by what each kernel reads and writes once, and the rows that it computes."""
    shape, num_tokens = layer.shape, layer.num_tokens
    num_launches = len(fused_launches(layer))
    is_gemv = num_launches == 2
    num_slots = num_tokens * shape.num_slots
    # the results of slots, written and read again, where they do not stay in registers
    results = 0 if is_gemv else 2 * num_slots * shape.hidden_size * 2
    tiles = choose(
        ExpertScheme.BF16, 90, num_tokens * shape.num_chosen / shape.num_routed,
        hidden_size=shape.hidden_size, intermediate_size=shape.intermediate_size,
    )  # fmt: skip
    found = Counts(num_launches, 2, 0, drawn_floor(layer) + results)
    return found, num_slots if is_gemv else padded_rows(layer, tiles.block_m)


def drawn_floor(layer: Layer) -> float:
    """Return the bytes of the floor, of the experts that were drawn."""
    shape = layer.shape
    rows = 2 * layer.num_tokens * (shape.hidden_size + shape.num_slots * shape.intermediate_size)
    return (layer.num_distinct + shape.num_shared) * shape.expert_weights * 2 + rows * 2


def padded_rows(layer: Layer, block_m: int) -> int:
    """Return rows in whole blocks of each expert."""
    counts = torch.bincount(layer.ids.flatten().long(), minlength=layer.shape.num_experts)
    return int(((counts + block_m - 1) // block_m).sum()) * block_m


def rows(shape: LayerShape, num_tokens: int) -> list[Row]:
    """Return all backends at a number of tokens, with the shared expert as a slot, where they can, and apart."""
    layer = Layer(shape, num_tokens)
    found = [_row(VANILLA, APART, layer, count_vanilla(layer), num_tokens * shape.num_slots)]
    shared = count_shared(layer)
    for backend, counted in (BATCHED, _batched), (CUTLASS, _cutlass), (TRITON, count_fused):
        found.append(_row(backend, SLOT, layer, *counted(layer)))
        counts, num_rows = counted(layer.routed)
        both = Counts(
            counts.launches + shared.launches, counts.products + shared.products,
            counts.waits + shared.waits, counts.num_bytes + shared.num_bytes,
        )  # fmt: skip
        found.append(_row(backend, APART, layer, both, num_rows + num_tokens))
    return found


def _batched(layer: Layer) -> tuple[Counts, float]:
    computed = products(BATCHED, layer.shape, ExpertScheme.BF16, layer.num_tokens, block_rows(layer.slots))
    return count_backend(BatchedExperts(), layer), computed.rows


def _cutlass(layer: Layer) -> tuple[Counts, float]:
    return count_backend(CutlassExperts(), layer), padded_rows(layer, CUTLASS_ROWS)


def _row(backend: str, shared_expert: str, layer: Layer, counts: Counts, num_rows: float) -> Row:
    return Row(
        backend, shared_expert, layer.num_tokens, layer.num_distinct, counts.launches, counts.products, counts.waits,
        counts.num_bytes, drawn_floor(layer), num_rows / (layer.num_tokens * layer.shape.num_slots),
    )  # fmt: skip
