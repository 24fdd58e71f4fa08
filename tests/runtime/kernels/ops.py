"""Norm, rotary embedding, paged attention and sampling held against their twins; a program that says what differs.

The interpreter has to be chosen before triton is imported: TRITON_INTERPRET=1 python -m tests.runtime.kernels.ops
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from runtime.kernels.ops.inputs import HeadNorms, KvPages, PagedBatch
from tests.runtime.kernels.budgets import LEAST, UNIT, beyond, gamma, narrowed, unequal
from tests.runtime.kernels.moe_small import BF16, FP16, FP32, exact_norm, normal, poison
from tests.runtime.kernels.older_interpreter import mend

E4M3 = torch.float8_e4m3fn
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32}


def whole(seed: int, *shape: int) -> torch.Tensor:
    """Return whole numbers, whose squares add up exactly in any order: only what follows on the sum is rounded."""
    return (normal(seed, *shape) * 8).round()


# --- norm


@dataclass(frozen=True)
class NormCase:
    """Rows, with a residual or without."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    has_residual: bool = False

    def differences(self, device: str) -> list[str]:
        weight = normal(1, self.shape[-1]).to(self.dtype)
        found = self._compare(normal(2, *self.shape).to(self.dtype), weight, device, is_exact=False)
        return found + self._compare(whole(3, *self.shape).to(self.dtype), weight, device, is_exact=True)

    def _compare(self, hidden: torch.Tensor, weight: torch.Tensor, device: str, *, is_exact: bool) -> list[str]:
        from runtime.kernels.ops import rms_norm as kernels
        from runtime.kernels.twins import rms_norm as twins

        normed = poison(hidden.shape, self.dtype, device)
        sums, lines = hidden, []
        if self.has_residual:
            residual = whole(4, *self.shape).to(self.dtype)
            sums = hidden + residual
            out = (poison(hidden.shape, self.dtype, device), normed)
            kernels.add_rms_norm(hidden.to(device), residual.to(device), weight.to(device), 1e-5, out=out)
            lines = unequal("sums", out[0].cpu(), sums)
            expected = twins.add_rms_norm(hidden, residual, weight, 1e-5)[1]
        else:
            kernels.rms_norm(hidden.to(device), weight.to(device), 1e-5, out=normed)
            expected = twins.rms_norm(hidden, weight, 1e-5)
        exact, error = exact_norm(sums, weight, 1e-5)
        lines += beyond("norm", normed.cpu(), exact, error) + beyond("norm, twin", expected, exact, error)
        return lines + (unequal("norm of whole numbers", normed.cpu(), expected) if is_exact else [])


def norm_cases() -> Iterator[tuple[str, NormCase]]:
    for name, dtype in DTYPES.items():
        yield f"norm {name}", NormCase(dtype, (17, 72))
        yield f"norm {name} residual", NormCase(dtype, (3, 200), has_residual=True)
    yield "norm one value", NormCase(FP32, (2, 1))
    yield "norm wide", NormCase(BF16, (2, 5120), has_residual=True)
    yield "norm of heads", NormCase(BF16, (5, 3, 16))


# --- rotary embedding


@dataclass(frozen=True)
class RopeCase:
    """Heads side by side in one projection, as engines have them."""

    dtype: torch.dtype
    num_tokens: int
    heads: tuple[int, int]
    head_dim: int
    rotary_dim: int
    has_norms: bool = True

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.ops.rope import rope
        from runtime.kernels.twins import rope as twin
        from runtime.model.rope import build_rope

        angles = build_rope(torch.arange(50), self.rotary_dim, 1e4)
        positions = (torch.arange(self.num_tokens) * 7 + 3) % 50
        joined = whole(5, self.num_tokens, (sum(self.heads) + self.heads[1]) * self.head_dim).to(self.dtype)
        norms = [normal(6 + number, self.head_dim).to(self.dtype) for number in range(2)]

        def arguments(where: str) -> tuple[torch.Tensor, ...]:
            heads = joined.to(where).unflatten(1, (-1, self.head_dim))
            query, key, _ = heads.split([*self.heads, self.heads[1]], 1)
            return query, key, angles.cos_Tr.to(where), angles.sin_Tr.to(where), positions.to(where)

        def weights(where: str) -> HeadNorms | None:
            return HeadNorms(norms[0].to(where), norms[1].to(where), 1e-5) if self.has_norms else None

        out = tuple(
            poison(torch.Size((self.num_tokens, heads, self.head_dim)), self.dtype, device) for heads in self.heads
        )
        rope(*arguments(device), norms=weights(device), out=out)
        expected = twin.rope(*arguments("cpu"), norms=weights("cpu"))
        return [
            line
            for name, ours, theirs in zip(("query", "key"), out, expected, strict=True)
            for line in unequal(name, ours.cpu(), theirs)
        ]


def rope_cases() -> Iterator[tuple[str, RopeCase]]:
    for name, dtype in DTYPES.items():
        yield f"rope {name}", RopeCase(dtype, 3, (24, 2), 16, 8)
        yield f"rope {name} without norms", RopeCase(dtype, 1, (12, 1), 16, 8, has_norms=False)
    yield "rope all dims", RopeCase(BF16, 2, (4, 2), 24, 24)
    yield "rope odd sizes", RopeCase(BF16, 17, (5, 3), 20, 12)
    yield "rope as the model", RopeCase(BF16, 1, (96, 8), 128, 64)


# --- attention


@dataclass(frozen=True)
class AttentionCase:
    """Sequences by their new tokens and all their tokens; pages lie anywhere, and what no token owns is NaN."""

    dtype: torch.dtype
    stored: torch.dtype
    new: tuple[int, ...]
    lengths: tuple[int, ...]
    heads: tuple[int, int] = (12, 1)
    head_dim: int = 16
    page: int = 16
    run_tokens: int = 0

    def inputs(self) -> tuple[torch.Tensor, KvPages, PagedBatch]:
        width = max(-(-length // self.page) for length in self.lengths) + 1
        num_pages = len(self.lengths) * width + 2
        table = normal(1, num_pages).argsort()[2:].view(-1, width).to(torch.int32)
        shape = (num_pages, self.page, self.heads[1], self.head_dim)
        scales = torch.tensor([0.021, 0.034]) if self.stored is E4M3 else None
        pages = KvPages(*(torch.full(shape, float("nan")).to(self.stored) for _ in range(2)), scales)
        for number, length in enumerate(self.lengths):
            # later keys have larger scores, so that peaks rise from tile to tile
            rising = torch.linspace(0.2, 3, length)[:, None, None]
            key, value = (normal(9 * number + kind, length, *shape[2:]) for kind in range(2))
            write(pages, table[number], key * rising, value)
        query = normal(3, sum(self.new), self.heads[0], self.head_dim) * 2
        starts = torch.tensor([0, *self.new]).cumsum(0).to(torch.int32)
        batch = PagedBatch(starts, torch.tensor(self.lengths, dtype=torch.int32), table, max(self.new))
        return query.to(self.dtype), pages, batch

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.ops.paged_attention import paged_attention
        from runtime.kernels.twins import paged_attention as twin

        query, pages, batch = self.inputs()
        out = poison(query.shape, self.dtype, device)
        there = (query.to(device), moved_pages(pages, device), moved_batch(batch, device))
        paged_attention(*there, run_tokens=self.run_tokens, out=out)
        exact, error = self.exact(query, pages, batch)
        theirs = twin.paged_attention(query, pages, batch)
        found = beyond("attention", out.cpu(), exact, error) + beyond("attention, twin", theirs, exact, error)
        return found + (self._alone(*there, out) if max(self.new) == 1 else [])

    def _alone(self, query: torch.Tensor, pages: KvPages, batch: PagedBatch, out: torch.Tensor) -> list[str]:
        """Return where the last sequence by itself, with a longer table, comes out otherwise."""
        from runtime.kernels.ops.paged_attention import paged_attention

        table = torch.cat((batch.block_table_BM[-1:], batch.block_table_BM[-1:]), 1)
        alone = PagedBatch(batch.cu_seqlens_q[:2], batch.seq_lens_B[-1:], table, 1)
        found = paged_attention(query[-1:], pages, alone, run_tokens=self.run_tokens)
        return unequal("a sequence alone", found.cpu(), out[-1:].cpu())

    def exact(self, query: torch.Tensor, pages: KvPages, batch: PagedBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the result in fp64, and its budget."""
        exact, budget, first = [], [], 0
        for number, (num_new, length) in enumerate(zip(self.new, self.lengths, strict=True)):
            key, value = (part.double() for part in read(pages, batch.block_table_BM[number], length))
            rows = query[first : first + num_new].double().unflatten(1, (self.heads[1], -1))
            first += num_new
            scale = self.head_dim**-0.5
            is_seen = torch.arange(length) <= torch.arange(length - num_new, length)[:, None]
            scores = torch.einsum("tghp,sgp->ghts", rows, key) * scale
            shares = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
            sizes = torch.einsum("tghp,sgp->ghts", rows.abs(), key.abs()) * scale * is_seen
            # of a score: products, scales, the base of powers; what is off in it multiplies its share
            off = gamma(self.head_dim + 8) * sizes.amax(-1, keepdim=True)
            relative = 4 * off + gamma(2 * length + 64) + 2 * UNIT[self.dtype]
            mixed = torch.einsum("ghts,sgp->tghp", shares, value).flatten(1, 2)
            largest = torch.einsum("ghts,sgp->tghp", shares * relative, value.abs()).flatten(1, 2)
            largest += length * LEAST[self.dtype] * value.abs().max()
            exact.append(mixed)
            budget.append(narrowed(mixed, largest, self.dtype))
        return torch.cat(exact), torch.cat(budget)


def slots_of(pages: KvPages, table: torch.Tensor, length: int) -> torch.Tensor:
    """Return the places of a sequence's tokens."""
    page, token = pages.keys_NSGP.shape[1], torch.arange(length)
    return table.long()[token // page] * page + token % page


def write(pages: KvPages, table: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    from runtime.kernels.twins.write_pages import write_pages

    write_pages(key, value, slots_of(pages, table, len(key)), pages)


def read(pages: KvPages, table: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    """Yield keys and values of a sequence, fp64."""
    for number, stored in enumerate((pages.keys_NSGP, pages.values_NSGP)):
        values = stored.double().flatten(0, 1)[slots_of(pages, table, length)]
        yield values if pages.scales is None else values * pages.scales[number].double()


def moved_pages(pages: KvPages, device: str) -> KvPages:
    scales = None if pages.scales is None else pages.scales.to(device)
    return KvPages(pages.keys_NSGP.to(device), pages.values_NSGP.to(device), scales)


def moved_batch(batch: PagedBatch, device: str) -> PagedBatch:
    there = (part.to(device) for part in (batch.cu_seqlens_q, batch.seq_lens_B, batch.block_table_BM))
    return PagedBatch(*there, batch.max_tokens_q)


@dataclass(frozen=True)
class BeyondCase:
    """A sequence that says it is longer than its pages are: no loop runs past these."""

    run_tokens: int = 0

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.ops.paged_attention import paged_attention

        query, pages, batch = AttentionCase(BF16, BF16, (1,), (80,)).inputs()
        query, pages, batch = query.to(device), moved_pages(pages, device), moved_batch(batch, device)
        batch = replace(batch, block_table_BM=batch.block_table_BM[:, :5].contiguous())
        longer = [replace(batch, seq_lens_B=batch.seq_lens_B + more) for more in (0, 1 << 20)]
        found = [paged_attention(query, pages, one, run_tokens=self.run_tokens) for one in longer]
        return unequal("beyond the pages", found[1].cpu(), found[0].cpu())


@dataclass(frozen=True)
class MeanCase:
    """A query of zeros takes the mean of two or four whole numbers, which is exact: one rounding shows, ties too.

    In the budgets of other cases a result that is truncated would have room.
    """

    dtype: torch.dtype
    run_tokens: int = 0

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.ops.paged_attention import paged_attention

        query, pages, batch = AttentionCase(self.dtype, self.dtype, (1, 1), (2, 4)).inputs()
        # neighbours above 2^8 and 2^11 are odd and even: means of two lie halfway between numbers of 8 and 11 bits
        first = {BF16: 2**8, FP16: 2**11, FP32: 2**22}[self.dtype]
        numbers = first + 2 * (torch.arange(4 * 16).view(4, 1, 16) * 7 % 13)
        exact = []
        for number, length in enumerate(batch.seq_lens_B.tolist()):
            values = numbers[:length].to(self.dtype)
            write(pages, batch.block_table_BM[number], values, values)
            exact.append(values.double().mean(0).to(self.dtype).expand(query.shape[1:]))
        there = (query.to(device) * 0, moved_pages(pages, device), moved_batch(batch, device))
        return unequal("means", paged_attention(*there, run_tokens=self.run_tokens).cpu(), torch.stack(exact))


def mean_cases() -> Iterator[tuple[str, MeanCase]]:
    for name, dtype in DTYPES.items():
        yield f"mean {name}", MeanCase(dtype)
    yield "mean in runs", MeanCase(BF16, 64)


def beyond_cases() -> Iterator[tuple[str, BeyondCase]]:
    yield "length beyond pages", BeyondCase()
    yield "length beyond pages, runs", BeyondCase(64)


def attention_cases() -> Iterator[tuple[str, AttentionCase]]:
    for name, dtype in DTYPES.items():
        yield f"attention {name} prefill", AttentionCase(dtype, dtype, (17, 3), (17, 3))
        yield f"attention {name} decode", AttentionCase(dtype, dtype, (1, 1), (70, 1))
        yield f"attention {name} fp8", AttentionCase(dtype, E4M3, (5, 1), (9, 66), (24, 2))
    yield "attention mixed", AttentionCase(BF16, BF16, (1, 12, 3), (65, 80, 3), (4, 2), 40, 8)
    yield "attention runs", AttentionCase(BF16, BF16, (1, 1, 1), (64, 130, 5), run_tokens=64)
    yield "attention runs fp8", AttentionCase(FP16, E4M3, (3, 1), (66, 128), run_tokens=64)
    yield "attention as the model", AttentionCase(BF16, BF16, (2,), (20,), (12, 1), 128)


@dataclass(frozen=True)
class InvariantCase:
    """Tokens of a prompt beside another sequence, and in parts by themselves: the same bits."""

    dtype: torch.dtype
    stored: torch.dtype

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.ops.paged_attention import invariant_paged_attention, paged_attention

        query, pages, batch = AttentionCase(self.dtype, self.stored, (140, 7), (140, 90)).inputs()
        query, pages, batch = query.to(device), moved_pages(pages, device), moved_batch(batch, device)
        whole, lines = invariant_paged_attention(query, pages, batch), []

        def part(attend: Callable[..., torch.Tensor], first: int, last: int) -> torch.Tensor:
            starts, lengths = torch.tensor([0, last - first], dtype=torch.int32), torch.tensor([last]).int()
            table = batch.block_table_BM[:1].contiguous()
            alone = PagedBatch(starts.to(device), lengths.to(device), table, last - first)
            return attend(query[first:last].contiguous(), pages, alone, run_tokens=64).cpu()

        for first, last in ((139, 140), (70, 71), (64, 66), (60, 77), (0, 3)):
            found = part(invariant_paged_attention, first, last)
            lines += unequal(f"tokens {first} to {last}", found, whole[first:last].cpu())
        # or the comparison would see nothing
        is_seen = not torch.equal(part(paged_attention, 139, 140), whole[139:140].cpu())
        return lines if is_seen or self.dtype is not FP32 else [*lines, "runs make no difference"]


def invariant_cases() -> Iterator[tuple[str, InvariantCase]]:
    yield "invariant attention fp32", InvariantCase(FP32, FP32)
    yield "invariant attention bf16", InvariantCase(BF16, BF16)
    yield "invariant attention bf16 fp8", InvariantCase(BF16, E4M3)


@dataclass(frozen=True)
class WriteCase:
    """Keys and values of heads side by side in one projection; some tokens are left out."""

    dtype: torch.dtype
    stored: torch.dtype
    num_heads: int

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.ops.write_pages import write_pages
        from runtime.kernels.twins import write_pages as twin

        joined = normal(1, 9, 2 * self.num_heads * 24).to(self.dtype).unflatten(1, (2, self.num_heads, 24))
        # the middles of two codes, and what lies beyond the largest
        codes = torch.arange(126, dtype=torch.uint8).view(E4M3).float()
        hard = torch.cat([(codes[1:] + codes[:-1]) / 2, torch.tensor([464.0, 1e4, -449.0, 0.0])])
        joined[0].view(-1)[: len(hard)] = hard[: joined[0].numel()].to(self.dtype)
        slots = torch.tensor([5, -1, 17, 0, 1, 2, -1, 11, 12])
        scales = torch.tensor([1.0, 0.37]) if self.stored is E4M3 else None

        def written(where: str, write: object) -> KvPages:
            stored = (torch.full((5, 4, self.num_heads, 24), 0.5).to(self.stored).to(where) for _ in range(2))
            pages = KvPages(*stored, None if scales is None else scales.to(where))
            key, value = joined.to(where).unbind(1)
            assert callable(write)
            write(key, value, slots.to(where), pages)
            return pages

        ours, theirs = written(device, write_pages), written("cpu", twin.write_pages)
        return [
            *unequal("keys", ours.keys_NSGP.cpu(), theirs.keys_NSGP),
            *unequal("values", ours.values_NSGP.cpu(), theirs.values_NSGP),
        ]


def write_cases() -> Iterator[tuple[str, WriteCase]]:
    for name, dtype in DTYPES.items():
        yield f"write {name}", WriteCase(dtype, dtype, 1)
        yield f"write {name} as fp8", WriteCase(dtype, E4M3, 3)
    yield "write wide", WriteCase(BF16, BF16, 50)


# --- sampling


@dataclass(frozen=True)
class SampleCase:
    """Rows of logits and how to choose from them; `tile` values of a row at once."""

    logits: str
    vocab_size: int
    tile: int = 4096

    def inputs(self) -> tuple[torch.Tensor, ...]:
        temperature = torch.tensor([1.0, 0.0, 0.7, 1.5, 1e-3, 1.0, 1.0, 1.0])
        top_k = torch.tensor([0, 5, 3, 40, 7, 60, 61, 62], dtype=torch.int32)
        top_p = torch.tensor([1.0, 0.9, 0.8, 0.35, 1e-9, 1.0, 0.95, 0.9])
        uniform = torch.rand(8, generator=torch.Generator().manual_seed(self.vocab_size), dtype=torch.float64)
        return self.rows(), temperature, top_k, top_p, uniform

    def rows(self) -> torch.Tensor:
        logits = normal(self.vocab_size, 8, self.vocab_size) * 3
        if self.logits == "ties":
            return (logits / 3).round() * 0.5 - 0.0
        if self.logits == "equal":
            return torch.zeros(8, self.vocab_size).index_fill(1, torch.tensor([0, 2]), -0.0)
        if self.logits == "far":
            return logits * 40
        if self.logits == "bad":
            logits[:, -1] = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.0] * 2)
        return logits

    def differences(self, device: str) -> list[str]:
        from runtime.kernels.ops.sampling import philox_uniforms, sample_launch
        from runtime.kernels.twins import sampling as twins

        inputs = self.inputs()
        (found,) = sample_launch(*(value.to(device) for value in inputs), tile=self.tile).run()
        seeds = torch.tensor([0, 1, -1, 2**62 + 5, -(2**40)])
        offsets = torch.tensor([0, 3, 2**33 + 1, self.vocab_size, 2**62])
        uniform = philox_uniforms(seeds.to(device), offsets.to(device))
        return [
            *unequal("ids", found.cpu(), twins.sample(*inputs)),
            *unequal("uniforms", uniform.cpu(), twins.philox_uniforms(seeds, offsets)),
        ]


def sample_cases() -> Iterator[tuple[str, SampleCase]]:
    for logits in ("normal", "ties", "equal", "far", "bad"):
        yield f"sample {logits}", SampleCase(logits, 97)
    yield "sample one token", SampleCase("normal", 1)
    yield "sample in tiles", SampleCase("ties", 150, 64)


Case = NormCase | RopeCase | AttentionCase | MeanCase | BeyondCase | InvariantCase | WriteCase | SampleCase


def cases() -> dict[str, Case]:
    """Return all cases by name."""
    attention = (attention_cases, mean_cases, beyond_cases, invariant_cases)
    kinds = (norm_cases, rope_cases, *attention, write_cases, sample_cases)
    return {name: case for kind in kinds for name, case in kind()}


if __name__ == "__main__":
    torch.set_num_threads(1)
    mend()
    json.dump({name: case.differences("cpu") for name, case in cases().items()}, sys.stdout)
