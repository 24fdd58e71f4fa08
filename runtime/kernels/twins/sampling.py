"""The next token of each row of logits. Shapes: B rows, V vocab."""

import torch

_UNIT = 2.0**40
_WORD = 0xFFFFFFFF
_ROUNDS = 10
# of Philox 4x32: multipliers, and what is added to the key in each round
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_STEPS = (0x9E3779B9, 0xBB67AE85)


def sample(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B: torch.Tensor,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the ids (B,) int64 of the next tokens; see `runtime.kernels.ops.sampling.sample`."""
    # -0 is equal to 0
    logits_BV = logits_BV + 0.0
    # of equal logits the first
    chosen_B = logits_BV.argmax(1)
    is_greedy_B = temperature_B <= 0
    if not bool(is_greedy_B.all()):
        chosen_B = torch.where(is_greedy_B, chosen_B, _drawn(logits_BV, temperature_B, top_k_B, top_p_B, uniform_B))
    chosen_B = torch.where(logits_BV.isfinite().all(1), chosen_B, -1)
    return chosen_B if out is None else out.copy_(chosen_B)


def _drawn(
    logits_BV: torch.Tensor,
    temperature_B: torch.Tensor,
    top_k_B: torch.Tensor,
    top_p_B: torch.Tensor,
    uniform_B: torch.Tensor,
) -> torch.Tensor:
    """Return ids (B,) by chance; those of rows without a temperature say nothing."""
    sorted_BV, ids_BV = logits_BV.sort(descending=True, stable=True)
    divisor_B1 = torch.where(temperature_B <= 0, 1.0, temperature_B)[:, None]
    masses_BV = (torch.exp((sorted_BV - sorted_BV[:, :1]) / divisor_B1) * _UNIT).to(torch.int64)
    place_V = torch.arange(logits_BV.shape[1], device=logits_BV.device)
    masses_BV.masked_fill_((top_k_B > 0)[:, None] & (place_V >= top_k_B[:, None]), 0)
    before_BV = masses_BV.cumsum(1) - masses_BV
    limit_B = (top_p_B.to(torch.float64) * masses_BV.sum(1)).ceil().clamp(min=1)
    is_left_BV = (before_BV < limit_B.to(torch.int64)[:, None]) | (top_p_B >= 1)[:, None]
    kept_BV = torch.zeros_like(masses_BV).scatter_(1, ids_BV, masses_BV * is_left_BV)
    end_BV = kept_BV.cumsum(1)
    place_B = (uniform_B * end_BV[:, -1]).to(torch.int64).minimum(end_BV[:, -1] - 1)
    return torch.searchsorted(end_BV, place_B[:, None], right=True)[:, 0]


def philox_uniforms(seeds_B: torch.Tensor, offsets_B: torch.Tensor, *, out: torch.Tensor | None = None) -> torch.Tensor:
    """Return fp64 (B,) in [0, 1) from Philox 4x32-10; see `runtime.kernels.ops.sampling.philox_uniforms`.

    Source: Salmon et al., Parallel random numbers: as easy as 1, 2, 3.
    """
    key = [seeds_B & _WORD, (seeds_B >> 32) & _WORD]
    zero_B = torch.zeros_like(offsets_B)
    counter = [offsets_B & _WORD, (offsets_B >> 32) & _WORD, zero_B, zero_B]
    for _ in range(_ROUNDS):
        (high_0, low_0), (high_2, low_2) = (
            _product(multiplier, word) for multiplier, word in zip(_MULTIPLIERS, counter[::2], strict=True)
        )
        counter = [high_2 ^ counter[1] ^ key[0], low_2, high_0 ^ counter[3] ^ key[1], low_0]
        key = [(word + step) & _WORD for word, step in zip(key, _STEPS, strict=True)]
    whole_B = (counter[0] >> 5) * 2**26 + (counter[1] >> 6)
    uniform_B = whole_B.to(torch.float64) * 2.0**-53
    return uniform_B if out is None else out.copy_(uniform_B)


def _product(multiplier: int, word: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the high and low 32 bits of a product of 32-bit words, held in int64."""
    # by halves: the whole product does not fit
    low = multiplier * (word & 0xFFFF)
    high = multiplier * (word >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)
