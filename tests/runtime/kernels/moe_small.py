"""Router, routing, index, GEMV and combine held against their twins; run as a program, it says what differs as JSON.

The interpreter has to be chosen before triton is imported: TRITON_INTERPRET=1 python -m tests.runtime.kernels.moe_small
"""

import json
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.moe.weights import BLOCK, ExpertScheme, ExpertWeights, Packed
from tests.runtime.kernels.budgets import UNIT, beyond, gamma, narrowed, unequal

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
POISON = 0x7A
# that hypothesis makes
LAYOUTS = 30


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def config(chosen: int, *, groups: int = 1, kept: int = 1, is_normalized: bool = True, scaling: float = 2.5) -> Any:
    return SimpleNamespace(
        num_experts_per_tok=chosen,
        n_group=groups,
        topk_group=kept,
        norm_topk_prob=is_normalized,
        routed_scaling_factor=scaling,
    )


def choices(seed: int, num_tokens: int, num_slots: int, num_experts: int, *, filtered: float = 0.0) -> torch.Tensor:
    """Return different experts for each token, int32; some slots filtered."""
    ids = normal(seed, num_tokens, num_experts).argsort(1)[:, :num_slots].to(torch.int32)
    is_filtered = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < filtered
    return ids.masked_fill(is_filtered, -1)


# --- router


@dataclass(frozen=True)
class LogitsCase:
    """Tokens, experts, the hidden size, and dtypes of inputs and weights."""

    num_tokens: int
    num_experts: int
    hidden: int
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.moe.router_logits import router_logits
        from runtime.kernels.twins import router_logits as twin

        hidden = normal(1, self.num_tokens, self.hidden).to(self.dtype)
        weight = normal(2, self.num_experts, self.hidden).to(self.weight_dtype)
        exact = hidden.double() @ weight.double().T
        # terms are rounded once and added
        error = (hidden.double().abs() @ weight.double().abs().T) * gamma(self.hidden + 1)
        found = poison(exact.shape, FP32, device)
        there = hidden.to(device), weight.to(device)
        assert router_logits(*there, out=found) is found
        lone = router_logits(there[0][-1:], there[1])
        theirs = twin.router_logits(hidden, weight)
        return [
            *beyond("logits", found.cpu(), exact, error),
            *beyond("logits, twin", theirs, exact, error),
            *unequal("logits of a token alone", lone.cpu(), found[-1:].cpu()),
            *unequal("logits, new", router_logits(*there).cpu(), found.cpu()),
        ]


def logits_cases() -> Iterator[tuple[str, LogitsCase]]:
    for number, num_tokens in enumerate((1, 3, 16)):
        yield f"logits bf16 {num_tokens}", LogitsCase(num_tokens, 5 + number, 700, BF16, BF16)
    yield "logits fp16", LogitsCase(2, 3, 96, FP16, FP16)
    yield "logits fp32", LogitsCase(2, 160, 72, FP32, FP32)
    yield "logits mixed", LogitsCase(3, 8, 513, BF16, FP32)


# --- routing


@dataclass(frozen=True)
class RouteCase:
    """Tokens, experts and rules; logits all different, in ties, or beyond what sigmoid tells apart."""

    num_tokens: int
    num_experts: int
    rules: Any
    num_shared: int = 1
    logits: str = "normal"

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        logits = normal(self.num_tokens, self.num_tokens, self.num_experts) * 2
        bias = normal(self.num_experts, self.num_experts) * 0.3
        if self.logits == "ties":
            return logits.round() / 2, (bias * 4).round() / 4
        if self.logits == "equal":
            return torch.zeros_like(logits), torch.zeros_like(bias)
        if self.logits == "saturated":
            return torch.where(logits > 0, 60.0, -60.0), bias * 0
        if self.logits == "negative":
            return logits, bias - 3
        return logits, bias

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.moe.route import route
        from runtime.kernels.twins import route as twin

        logits, bias = self.inputs()
        ids, weights = route(logits.to(device), bias.to(device), self.rules, num_shared=self.num_shared)
        expected_ids, expected = twin.route(logits, bias, self.rules, num_shared=self.num_shared)
        # on either side: a score is rounded 4 times, their sum K times, the quotient once and the product once
        error = expected.double().abs() * 2 * gamma(10 + self.rules.num_experts_per_tok) + 2.0**-140
        found = unequal("ids", ids.cpu(), expected_ids) + beyond("weights", weights.cpu(), expected.double(), error)
        if self.num_shared:
            found += unequal("shared", weights[:, -1].cpu(), torch.ones(self.num_tokens))
        return found


def route_cases() -> Iterator[tuple[str, RouteCase]]:
    for num_tokens in (1, 3, 17, 257):
        yield f"route {num_tokens}", RouteCase(num_tokens, 160, config(8))
    for chosen in range(1, 8):
        yield f"route top-{chosen}", RouteCase(5, 96, config(chosen, is_normalized=chosen % 2 == 0), chosen % 2)
    for logits in ("ties", "equal", "saturated", "negative"):
        yield f"route {logits}", RouteCase(9, 128, config(8), logits=logits)
        yield f"route groups {logits}", RouteCase(9, 48, config(4, groups=6, kept=2), logits=logits)
    yield "route one group", RouteCase(5, 12, config(3, groups=4, kept=1), 0)


# --- index


@dataclass(frozen=True)
class IndexCase:
    """Experts of slots, and how rows are laid out; runs of `chunk` slots if that is given."""

    ids: torch.Tensor
    num_experts: int
    block_m: int
    num_shared: int = 0
    chunk: int = 0

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.moe import slots

        before = slots.ALONE, slots.CHUNK
        if self.chunk:
            slots.ALONE = slots.CHUNK = self.chunk
        try:
            return self._contiguous(device) + self._masked(device)
        finally:
            slots.ALONE, slots.CHUNK = before

    def _contiguous(self, device: str) -> list[str]:
        from runtime.kernels.moe import build_rows as kernels
        from runtime.kernels.twins import build_rows as twins

        arguments = (self.num_experts, self.block_m)
        expected = twins.build_rows(self.ids, *arguments, num_shared=self.num_shared)
        out = poisoned(expected, device)
        assert kernels.build_rows(self.ids.to(device), *arguments, num_shared=self.num_shared, out=out) is out
        return compared(out, expected) + self._unstable(out)

    def _masked(self, device: str) -> list[str]:
        from runtime.kernels.moe import build_rows as kernels
        from runtime.kernels.twins import build_rows as twins

        room = len(self.ids) if is_distinct(self.ids) else self.ids.numel()
        expected = twins.build_masked_rows(self.ids, self.num_experts, room)
        out = poisoned(expected, device)
        kernels.build_masked_rows(self.ids.to(device), self.num_experts, room, out=out)
        return compared(out, expected)

    def _unstable(self, rows: Any) -> list[str]:
        """Return what is not as a stable permutation is, whatever the twin says."""
        ids, slots = self.ids.flatten().long(), rows.slots_P.cpu().long()
        position = rows.position_of_slot.cpu().long()
        kept, used = ids >= 0, slots >= 0
        found = unequal("rows of slots", slots[position[kept]], kept.nonzero().flatten())
        if int(used.sum()) != int(kept.sum()):
            found.append("a slot has two rows")
        expert = rows.expert_of_block.cpu().long().repeat_interleave(self.block_m)
        found += unequal("experts of rows", ids[slots[used]], expert[used])
        for number in range(self.num_experts):
            here = slots[used & (expert == number)]
            if not torch.equal(here, here.sort().values):
                found.append(f"rows of expert {number} are not in the order of slots")
        return found


def is_distinct(ids: torch.Tensor) -> bool:
    return all(len(set(row)) == len(row) for row in (row[row >= 0].tolist() for row in ids))


def poisoned(like: Any, device: str) -> Any:
    """Return the same layout filled with what no kernel writes."""
    values = {name: getattr(like, name) for name in like.__dataclass_fields__}
    made = {
        name: torch.full_like(value, POISON, device=device) if isinstance(value, torch.Tensor) else value
        for name, value in values.items()
    }
    return type(like)(**made)


def compared(rows: Any, expected: Any) -> list[str]:
    tensors = {name: getattr(expected, name) for name in expected.__dataclass_fields__}
    return [
        line
        for name, value in tensors.items()
        if isinstance(value, torch.Tensor)
        for line in unequal(f"{type(rows).__name__} {name}", getattr(rows, name).cpu(), value)
    ]


def index_cases() -> Iterator[tuple[str, IndexCase]]:
    for num_tokens in (1, 3, 17):
        yield f"rows {num_tokens}", IndexCase(choices(num_tokens, num_tokens, 4, 12, filtered=0.2), 12, 16, 1)
    shared = torch.cat((choices(5, 257, 8, 160), torch.full((257, 1), 160, dtype=torch.int32)), 1)
    yield "rows 257 of 161 experts", IndexCase(shared, 161, 32, 1)
    yield "rows on one expert", IndexCase(torch.full((40, 1), 3, dtype=torch.int32), 5, 16)
    yield "rows all filtered", IndexCase(torch.full((7, 2), -1, dtype=torch.int32), 4, 16, 1)
    yield "rows in two runs", IndexCase(choices(6, 1100, 4, 5), 5, 64, 1)
    yield "rows in many runs", IndexCase(choices(7, 40, 3, 7, filtered=0.3), 7, 8, 1, chunk=16)


@given(
    st.integers(1, 5).flatmap(
        lambda width: st.lists(st.lists(st.integers(-1, 5), min_size=width, max_size=width), min_size=1, max_size=12)
    ),
    st.sampled_from([1, 4, 16]),
    st.integers(0, 1),
    st.sampled_from([0, 8]),
)
@settings(max_examples=LAYOUTS, deadline=None, derandomize=True, database=None)
def check_any_rows(rows: list[list[int]], block_m: int, num_shared: int, chunk: int) -> None:
    ids = torch.tensor(rows, dtype=torch.int32)
    assert IndexCase(ids, 6, block_m, num_shared, chunk).differences("cpu") == []


# --- experts


def experts(scheme: ExpertScheme, num_experts: int, hidden: int, intermediate: int, *, whole: bool) -> ExpertWeights:
    """Return random experts; whole numbers of at most 3 and scales of powers of two, or anything."""
    generator = torch.Generator().manual_seed(hidden)

    def packed(rows: int, columns: int, blocks: tuple[int, ...]) -> Packed:
        values = torch.randn(num_experts, rows, columns, generator=generator)
        values = values.clamp(-3, 3).round() if whole else values
        if scheme.is_plain:
            return Packed(values.to(scheme.code_dtype))
        codes = (values * (1 if whole else 30)).round() if scheme.code_dtype is torch.int8 else values
        shape = blocks if scheme is ExpertScheme.FP8_BLOCK else (num_experts, rows)
        scales = torch.rand(shape, generator=generator) + 0.5
        return Packed(codes.to(scheme.code_dtype), torch.exp2(scales.round()) if whole else scales)

    across, down = -(-hidden // BLOCK), -(-intermediate // BLOCK)
    up = packed(2 * intermediate, hidden, (num_experts, 2, down, across))
    return ExpertWeights(
        scheme, up, packed(hidden, intermediate, (num_experts, across, down)), num_experts, 0, hidden, intermediate
    )


@dataclass(frozen=True)
class GemvCase:
    """A scheme, sizes and the experts of slots."""

    scheme: ExpertScheme
    dtype: torch.dtype
    ids: torch.Tensor
    hidden: int
    intermediate: int
    has_residual: bool = False

    def differences(self, device: str) -> list[str]:
        weights = experts(self.scheme, 6, self.hidden, self.intermediate, whole=False)
        return self._up(weights, device) + self._down(weights, device) + self._rounded_once(device)

    def _up(self, weights: ExpertWeights, device: str) -> list[str]:
        from runtime.kernels.moe.gemv import up_gemv
        from runtime.kernels.twins import gemv as twin

        hidden = normal(1, len(self.ids), self.hidden).to(self.dtype)
        matrix = weights.up_values(torch.float64, self.ids.flatten().clamp(min=0).long())
        rows = hidden.double().repeat_interleave(self.ids.shape[1], 0)[..., None]
        gate, up = (matrix @ rows)[..., 0].unflatten(1, (-1, 2)).unbind(-1)
        # terms are rounded twice and added; those of the twin have a rounded weight as well
        errors = (matrix.abs() @ rows.abs())[..., 0] * gamma(self.hidden + 4)
        gate_error, up_error = errors.unflatten(1, (-1, 2)).unbind(-1)
        silu = gate * gate.sigmoid()
        # the slope of silu is at most 1.1; exp is off by a few units, and by its argument's rounding
        error = 1.1 * gate_error * (up.abs() + up_error) + silu.abs() * up_error
        error += (silu * up).abs() * gamma(16) * (1 + gate.abs())
        is_filtered = (self.ids.flatten() < 0)[:, None]
        exact = (silu * up).masked_fill(is_filtered, 0)
        error = narrowed(exact, error, self.dtype).masked_fill(is_filtered, 0)
        found = poison(exact.shape, self.dtype, device)
        up_gemv(hidden.to(device), self.ids.to(device), moved(weights, device), out=found)
        theirs = twin.up_gemv(hidden, self.ids, weights)
        return beyond("up", found.cpu(), exact, error) + beyond("up, twin", theirs, exact, error)

    def _down(self, weights: ExpertWeights, device: str) -> list[str]:
        from runtime.kernels.moe.gemv import down_gemv
        from runtime.kernels.twins import gemv as twin

        activated, routed, residual = self._rows(whole=False)
        matrix = weights.down_values(torch.float64, self.ids.flatten().clamp(min=0).long())
        factor = routed.double().masked_fill(self.ids < 0, 0)[..., None]
        rows, shape = activated.double().nan_to_num(0)[..., None], self.ids.shape
        exact = ((matrix @ rows)[..., 0].unflatten(0, shape) * factor).sum(1)
        sizes = ((matrix.abs() @ rows.abs())[..., 0].unflatten(0, shape) * factor.abs()).sum(1)
        if residual is not None:
            exact, sizes = exact + residual.double(), sizes + residual.double().abs()
        error = narrowed(exact, sizes * gamma(self.intermediate + shape[1] + 6), self.dtype)
        found = poison(exact.shape, self.dtype, device)
        there = [None if value is None else value.to(device) for value in (activated, self.ids, routed, residual)]
        down_gemv(there[0], there[1], there[2], moved(weights, device), residual_TH=there[3], out=found)
        theirs = twin.down_gemv(activated, self.ids, routed, weights, residual_TH=residual)
        lone = down_gemv(there[0][: shape[1]], there[1][:1], there[2][:1], moved(weights, device),
                         residual_TH=None if residual is None else there[3][:1])  # fmt: skip
        return [
            *beyond("down", found.cpu(), exact, error),
            *beyond("down, twin", theirs, exact, error),
            *unequal("down of a token alone", lone.cpu(), found[:1].cpu()),
        ]

    def _rounded_once(self, device: str) -> list[str]:
        """Whole numbers add up exactly in any order, so that the only rounding shows, ties too."""
        from runtime.kernels.moe.gemv import down_gemv
        from runtime.kernels.twins import gemv as twin

        weights = experts(self.scheme, 6, self.hidden, self.intermediate, whole=True)
        activated, routed, residual = self._rows(whole=True)
        there = [None if value is None else value.to(device) for value in (activated, self.ids, routed, residual)]
        found = down_gemv(there[0], there[1], there[2], moved(weights, device), residual_TH=there[3])
        expected = twin.down_gemv(activated, self.ids, routed, weights, residual_TH=residual)
        return unequal("down of whole numbers", found.cpu(), expected)

    def _rows(self, *, whole: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        activated, routed = normal(2, self.ids.numel(), self.intermediate), normal(3, *self.ids.shape).abs()
        residual = normal(4, len(self.ids), self.hidden) * 30
        if whole:
            activated, routed, residual = (value.clamp(-2, 2).round() for value in (activated, routed, residual))
        # a filtered slot's row is not read
        activated.masked_fill_((self.ids.flatten() < 0)[:, None], float("nan"))
        return activated.to(self.dtype), routed, residual.to(self.dtype) if self.has_residual else None


def moved(weights: ExpertWeights, device: str) -> ExpertWeights:
    def there(packed: Packed) -> Packed:
        return Packed(packed.codes.to(device), None if packed.scales is None else packed.scales.to(device))

    sizes = (weights.num_routed, weights.num_shared, weights.hidden_size, weights.intermediate_size)
    return ExpertWeights(weights.scheme, there(weights.up), there(weights.down), *sizes)


def poison(shape: torch.Size, dtype: torch.dtype, device: str) -> torch.Tensor:
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


def gemv_cases() -> Iterator[tuple[str, GemvCase]]:
    schemes = [scheme for scheme in ExpertScheme if scheme is not ExpertScheme.NVFP4]
    for scheme in schemes:
        dtype = scheme.code_dtype if scheme.is_plain else BF16
        ids = choices(1, 2, 3, 6, filtered=0.3)
        yield f"gemv {scheme}", GemvCase(scheme, dtype, ids, 200, 44, has_residual=True)
    for number, chosen in enumerate((1, 6)):
        yield f"gemv top-{chosen}", GemvCase(ExpertScheme.BF16, BF16, choices(2, 1, chosen, 6), 72, 22 + 11 * number)
    one = torch.full((3, 1), 5, dtype=torch.int32)
    yield "gemv on one expert", GemvCase(ExpertScheme.FP8_CHANNEL, FP16, one, 64, 16)
    yield "gemv all filtered", GemvCase(ExpertScheme.BF16, BF16, torch.full((1, 2), -1, dtype=torch.int32), 40, 24)
    # several tiles along the sum
    yield "gemv long", GemvCase(ExpertScheme.INT8_CHANNEL, BF16, choices(3, 1, 1, 6), 1100, 16)
    yield "gemv long down", GemvCase(ExpertScheme.BF16, BF16, choices(3, 1, 2, 6), 24, 704)
    yield "gemv blocks", GemvCase(ExpertScheme.FP8_BLOCK, BF16, choices(4, 1, 2, 6), 300, 176)


# --- combine


@dataclass(frozen=True)
class CombineCase:
    """Tokens, slots and the hidden size; filtered rows are NaN."""

    dtype: torch.dtype
    ids: torch.Tensor
    hidden: int
    has_residual: bool

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.moe import combine as kernels
        from runtime.kernels.twins import combine as twins

        values = normal(8, self.ids.numel(), self.hidden).to(self.dtype)
        values.masked_fill_((self.ids.flatten() < 0)[:, None], float("nan"))
        residual = (normal(9, len(self.ids), self.hidden) * 5).to(self.dtype)
        given = residual if self.has_residual else None
        expected = twins.combine(values, self.ids, residual_TH=given)
        there = (values.to(device), self.ids.to(device))
        out = poison(expected.shape, self.dtype, device)
        kernels.combine(*there, residual_TH=None if given is None else given.to(device), out=out)
        found = unequal("sums", out.cpu(), expected)
        if self.has_residual:
            weight = normal(10, self.hidden).to(self.dtype)
            sums, normed = kernels.combine_norm(*there, residual.to(device), weight.to(device), 1e-5)
            theirs = twins.combine_norm(values, self.ids, residual, weight, 1e-5)
            found += unequal("sums with a norm", sums.cpu(), expected) + unequal("twin's sums", theirs[0], expected)
            exact, error = exact_norm(expected, weight, 1e-5)
            found += beyond("norm", normed.cpu(), exact, error) + beyond("norm, twin", theirs[1], exact, error)
        return found


def exact_norm(hidden: torch.Tensor, weight: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the norm in fp64 and its budget: D + 8 roundings in fp32, and two in the dtype."""
    wide = hidden.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    factor = (1 + gamma(hidden.shape[-1] + 8)) * (1 + UNIT[hidden.dtype]) ** 2 - 1
    # fp16: what is subnormal before the weight or behind it
    return exact, exact.abs() * factor + 2.0**-24 * (1 + weight.double().abs())


def combine_cases() -> Iterator[tuple[str, CombineCase]]:
    for name, dtype in (("bf16", BF16), ("fp16", FP16), ("fp32", FP32)):
        for number, num_tokens in enumerate((1, 3, 17)):
            ids = choices(num_tokens, num_tokens, 1 + 4 * number, 12, filtered=0.2)
            yield f"combine {name} {num_tokens}", CombineCase(dtype, ids, 96 + number, number % 2 == 1)
    yield "combine wide", CombineCase(BF16, choices(1, 2, 9, 12), 1500, has_residual=True)
    yield "combine all filtered", CombineCase(BF16, torch.full((2, 3), -1, dtype=torch.int32), 40, has_residual=False)


Case = LogitsCase | RouteCase | IndexCase | GemvCase | CombineCase


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    return {
        **dict(logits_cases()),
        **dict(route_cases()),
        **dict(index_cases()),
        **dict(gemv_cases()),
        **dict(combine_cases()),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    # silu of a large negative number is 0, as it should be
    warnings.filterwarnings("ignore", "overflow encountered in exp", RuntimeWarning)
    check_any_rows()
    json.dump({name: case.differences("cpu") for name, case in cases().items()}, sys.stdout)
