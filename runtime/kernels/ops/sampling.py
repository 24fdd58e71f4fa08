"""The next token of each row of logits, without sorting them and without asking the host.

A token's mass is exp((logit - largest) / temperature) as a whole number of 2^-40. Sums of whole numbers are exact, so
that neither tiles nor threads can change a choice. Top-k and top-p both keep the beginning of the row sorted by logit,
of equal ones the lower id first; where it ends is found bit by bit, in 32 passes over the row.

Shapes: B rows, V vocab, W values of a tile.
"""

import torch
import triton
import triton.language as tl

from runtime.kernels.launch import Launch
from runtime.kernels.numbers import bits_of, is_finite, magnitude

TILE = 4096
# the mass of the most likely token; 2^18 of these stay below 2^63
_UNIT = tl.constexpr(1099511627776.0)


@triton.jit
def _logits(row_ptr: tl.tensor, first: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr) -> tl.tensor:
    """Return a tile of logits, -inf behind the end; -0 as 0, which it is equal to."""
    place_W = first + tl.arange(0, TILE)
    return tl.load(row_ptr + place_W, mask=place_W < VOCAB, other=float("-inf")) + 0.0


@triton.jit
def _keys(logit_W: tl.tensor) -> tl.tensor:
    """Return int64 that are ordered as logits are, above -2^31 where these are numbers."""
    bits_W = bits_of(logit_W)
    return (bits_W ^ ((bits_W >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _masses(logit_W: tl.tensor, largest: tl.tensor, temperature: tl.tensor) -> tl.tensor:
    """Return the int64 masses of logits; 0 behind the end."""
    distance_W = tl.div_rn(logit_W - largest, tl.zeros(logit_W.shape, tl.float32) + temperature)
    return (tl.exp(distance_W) * _UNIT).to(tl.int64)


@triton.jit
def _last(
    row_ptr: tl.tensor,
    place: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    IS_COUNT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Return the key of the token that covers a place of the sorted row, and how much lies before that key.

    Places count tokens, or masses.
    """
    key = tl.full((), -(1 << 31), tl.int64)
    before = tl.zeros((), tl.int64)
    for bit in range(32):
        trial = key + (tl.full((), 1 << 31, tl.int64) >> bit)
        sum_1 = tl.zeros((), tl.int64)
        for first in range(0, VOCAB, TILE):
            logit_W = _logits(row_ptr, first, VOCAB, TILE)
            weight_W = tl.full((TILE,), 1, tl.int64) if IS_COUNT else _masses(logit_W, largest, temperature)
            sum_1 += tl.sum(tl.where(_keys(logit_W) >= trial, weight_W, 0), axis=0)
        is_beyond = sum_1 > place
        key = tl.where(is_beyond, trial, key)
        before = tl.where(is_beyond, before, sum_1)
    return key, before


@triton.jit
def _mass_of(
    row_ptr: tl.tensor,
    least_key: tl.tensor,
    num_equal: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return the mass of all tokens above a key and of `num_equal` of those that have it."""
    mass = tl.zeros((), tl.int64)
    equal = tl.zeros((), tl.int64)
    for first in range(0, VOCAB, TILE):
        logit_W = _logits(row_ptr, first, VOCAB, TILE)
        key_W, mass_W = _keys(logit_W), _masses(logit_W, largest, temperature)
        mass += tl.sum(tl.where(key_W > least_key, mass_W, 0), axis=0)
        equal = tl.maximum(equal, tl.max(tl.where(key_W == least_key, mass_W, 0), axis=0))
    return mass + equal * num_equal


@triton.jit
def _at(
    row_ptr: tl.tensor,
    place: tl.tensor,
    least_key: tl.tensor,
    num_equal: tl.tensor,
    largest: tl.tensor,
    temperature: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> tl.tensor:
    """Return the id of the kept token that covers a place when their masses lie in the order of ids."""
    # ids and numbers of tokens in 32 bits: a thread has no registers to spare
    found = tl.full((), VOCAB, tl.int32)
    mass = tl.zeros((), tl.int64)
    equal = tl.zeros((), tl.int32)
    for first in range(0, VOCAB, TILE):
        logit_W = _logits(row_ptr, first, VOCAB, TILE)
        key_W = _keys(logit_W)
        is_equal_W = (key_W == least_key).to(tl.int32)
        number_W = equal + tl.cumsum(is_equal_W, 0) - is_equal_W
        is_kept_W = (key_W > least_key) | ((key_W == least_key) & (number_W < num_equal))
        mass_W = tl.where(is_kept_W, _masses(logit_W, largest, temperature), 0)
        end_W = mass + tl.cumsum(mass_W, 0)
        # beyond the place, the first whose mass reaches past it
        id_W = tl.where((end_W > place) & (mass_W > 0), first + tl.arange(0, TILE), VOCAB)
        found = tl.minimum(found, tl.min(id_W, axis=0))
        mass += tl.sum(mass_W, axis=0)
        equal += tl.sum(is_equal_W, axis=0)
    return found.to(tl.int64)


@triton.jit
def choose_tokens(
    logits_ptr: tl.tensor,
    temperature_ptr: tl.tensor,
    top_k_ptr: tl.tensor,
    top_p_ptr: tl.tensor,
    uniform_ptr: tl.tensor,
    ids_ptr: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """Write the id of one row's token; -1 if a logit is no finite number."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * VOCAB
    largest = tl.full((), float("-inf"), tl.float32)
    first_id = tl.full((), VOCAB, tl.int32)
    num_bad = tl.zeros((), tl.int32)
    for first in range(0, VOCAB, TILE):
        logit_W = _logits(row_ptr, first, VOCAB, TILE)
        id_W = first + tl.arange(0, TILE)
        is_bad_W = (is_finite(magnitude(logit_W)) == 0) & (id_W < VOCAB)
        num_bad += tl.sum(is_bad_W.to(tl.int32), axis=0)
        here = tl.max(logit_W, axis=0)
        id_here = tl.min(tl.where(logit_W == here, id_W, VOCAB), axis=0)
        first_id = tl.where(here > largest, id_here, first_id)
        largest = tl.maximum(here, largest)
    temperature = tl.load(temperature_ptr + row)
    chosen = first_id.to(tl.int64)
    if (num_bad == 0) & (temperature > 0):
        top_k, top_p = tl.load(top_k_ptr + row), tl.load(top_p_ptr + row).to(tl.float64)
        least_key = tl.full((), -(1 << 31), tl.int64)
        num_equal = tl.zeros((), tl.int64)
        if (top_k > 0) & (top_k < VOCAB):
            least_key, before = _last(row_ptr, top_k.to(tl.int64) - 1, largest, temperature, VOCAB, TILE, True)
            num_equal = top_k.to(tl.int64) - before
        total = _mass_of(row_ptr, least_key, num_equal, largest, temperature, VOCAB, TILE)
        if top_p < 1.0:
            limit = top_p * total.to(tl.float64)
            whole = limit.to(tl.int64)
            # tokens stay while what lies before them is less than the limit; the first one always does
            place = tl.maximum(whole + (whole.to(tl.float64) < limit).to(tl.int64), 1) - 1
            least_key, before = _last(row_ptr, place, largest, temperature, VOCAB, TILE, False)
            each = _mass_of(row_ptr, least_key, 1, largest, temperature, VOCAB, TILE) - before
            num_equal = (place - before) // each + 1
            total = before + each * num_equal
        place = (tl.load(uniform_ptr + row) * total.to(tl.float64)).to(tl.int64)
        place = tl.minimum(place, total - 1)
        chosen = _at(row_ptr, place, least_key, num_equal, largest, temperature, VOCAB, TILE)
    tl.store(ids_ptr + row, tl.where(num_bad == 0, chosen, -1))


@triton.jit(do_not_specialize=["num_rows"])
def draw(
    seeds_ptr: tl.tensor, offsets_ptr: tl.tensor, out_ptr: tl.tensor, num_rows: tl.tensor, ROWS: tl.constexpr
) -> None:
    """Write 53 bits of Philox 4x32-10 for each row as fp64 in [0, 1)."""
    row_B = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row_B = row_B < num_rows
    seed_B = tl.load(seeds_ptr + row_B, mask=is_row_B, other=0)
    offset_B = tl.load(offsets_ptr + row_B, mask=is_row_B, other=0)
    high_B, low_B, _, _ = tl.randint4x(seed_B, offset_B)
    high_B, low_B = high_B.to(tl.uint32, bitcast=True), low_B.to(tl.uint32, bitcast=True)
    whole_B = (high_B >> 5).to(tl.int64) * 67108864 + (low_B >> 6).to(tl.int64)
    tl.store(out_ptr + row_B, whole_B.to(tl.float64) * 1.1102230246251565e-16, mask=is_row_B)


def sample_launch(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
    tile: int = TILE,
) -> Launch:
    """Return the launch of `sample`."""
    num_rows, vocab_size = logits_BV.shape
    assert logits_BV.dtype is torch.float32, logits_BV.dtype
    assert logits_BV.is_contiguous(), logits_BV.stride()
    assert vocab_size < 1 << 18, vocab_size
    out = torch.empty(num_rows, dtype=torch.int64, device=logits_BV.device) if out is None else out
    constants = {"VOCAB": vocab_size, "TILE": min(tile, triton.next_power_of_2(vocab_size))}
    arguments = (logits_BV, temperature_B, top_k_B, top_p_B, uniform_B, out)
    return Launch(choose_tokens, num_rows, arguments, constants, (out,), num_warps=16)


def sample(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the ids (B,) int64 of the next tokens; -1 for a row with a logit that is NaN or infinite.

    Args:
        logits_BV: fp32, contiguous.
        temperature_B: fp32; 0 = the most likely token, of equal ones the lowest id.
        top_k_B: int32, 0 = all; applied after temperature.
        top_p_B: fp32; applied to what top-k left: tokens stay while those before them have not reached it.
        uniform_B: fp64 in [0, 1): the place in the masses of what is left, in the order of ids.
        out: where the ids go.
    """
    return sample_launch(logits_BV, temperature_B, top_k_B, top_p_B, uniform_B, out=out).run()[0]


def philox_uniforms_launch(
    seeds_B: torch.Tensor, offsets_B: torch.Tensor, *, out: torch.Tensor | None = None
) -> Launch:
    """Return the launch of `philox_uniforms`."""
    out = torch.empty(len(seeds_B), dtype=torch.float64, device=seeds_B.device) if out is None else out
    constants, rows = {"ROWS": 128}, len(seeds_B)
    return Launch(draw, triton.cdiv(rows, 128), (seeds_B, offsets_B, out, rows), constants, (out,))


def philox_uniforms(seeds_B: torch.Tensor, offsets_B: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return fp64 (B,) in [0, 1): number offsets_B (int64) of the sequence of seeds_B (int64), 53 bits of it."""
    return philox_uniforms_launch(seeds_B, offsets_B, out=out).run()[0]
