import pytest
import torch

from converters.errors import InputError, UsageError
from runtime.engine.request import SamplingParams
from runtime.engine.sampler import Sampler, nucleus

# probabilities 0.5, 0.25, 0.125, 0.125 under ids 2, 0, 1, 3
LOGITS = torch.tensor([0.25, 0.125, 0.5, 0.125]).log()


def frequencies(params: SamplingParams, draws: int = 4000) -> list[float]:
    sampler = Sampler(params)
    ids = torch.tensor([sampler.sample(LOGITS) for _ in range(draws)])
    return (torch.bincount(ids, minlength=4) / draws).tolist()


def test_sampler_greedy_takes_the_most_likely():
    assert Sampler(SamplingParams()).sample(LOGITS) == 2


def test_sampler_greedy_tie_goes_to_the_lower_id():
    assert Sampler(SamplingParams()).sample(torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])) == 1


def test_sampler_temperature_1_draws_the_distribution():
    """4000 draws: five standard errors are 0.04."""
    expected = [0.25, 0.125, 0.5, 0.125]
    assert frequencies(SamplingParams(temperature=1.0)) == pytest.approx(expected, abs=0.04)


def test_sampler_temperature_half_squares_the_odds():
    squares = [0.0625, 0.015625, 0.25, 0.015625]
    expected = [square / sum(squares) for square in squares]
    assert frequencies(SamplingParams(temperature=0.5)) == pytest.approx(expected, abs=0.04)


def test_sampler_top_k_draws_from_k_tokens_renormalized():
    assert frequencies(SamplingParams(temperature=1.0, top_k=2)) == pytest.approx([1 / 3, 0, 2 / 3, 0], abs=0.04)


def test_sampler_same_seed_same_tokens_other_seed_others():
    runs = [
        [sampler.sample(LOGITS) for _ in range(50)]
        for sampler in (Sampler(SamplingParams(temperature=1.0, seed=seed)) for seed in (7, 7, 8))
    ]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_sampler_tiny_temperature_is_greedy():
    assert {Sampler(SamplingParams(temperature=1e-300, seed=seed)).sample(LOGITS) for seed in range(9)} == {2}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_sampler_logits_that_are_not_finite_are_refused(temperature, bad):
    logits = LOGITS.clone()
    logits[1] = bad
    with pytest.raises(InputError) as error:
        Sampler(SamplingParams(temperature=temperature)).sample(logits)
    assert str(error.value) == (
        "logits: expected finite numbers, found NaN or Inf. A weight is damaged or overflows in this dtype."
    )


@pytest.mark.parametrize(
    ("top_k", "top_p", "ids"),
    [
        (0, 1.0, [2, 0, 1, 3]),
        (1, 1.0, [2]),
        (9, 1.0, [2, 0, 1, 3]),
        (3, 1.0, [2, 0, 1]),  # of two equal tokens at the edge the lower id stays
        (0, 0.49, [2]),
        (0, 0.51, [2, 0]),
        (0, 0.75, [2, 0]),
        (0, 0.8, [2, 0, 1]),
        (0, 1e-9, [2]),  # one token always stays
        (2, 0.6, [2]),  # of 2/3 and 1/3, the first reaches 0.6 alone
        (2, 0.7, [2, 0]),
    ],
)
def test_nucleus_keeps_top_k_then_top_p(top_k, top_p, ids):
    probabilities, kept = nucleus(LOGITS, SamplingParams(temperature=1.0, top_k=top_k, top_p=top_p))
    assert kept.tolist() == ids
    assert probabilities.sum() <= 1 + 1e-9


def test_nucleus_ends_with_the_token_that_reaches_top_p_exactly():
    """Four equal logits have probabilities of exactly 1/4."""
    _, kept = nucleus(torch.zeros(4), SamplingParams(temperature=1.0, top_p=0.5))
    assert kept.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: expected at least 1, found 0"),
        ({"temperature": -0.1}, "temperature: expected a finite number from 0, found -0.1"),
        ({"temperature": float("nan")}, "temperature: expected a finite number from 0, found nan"),
        ({"temperature": float("inf")}, "temperature: expected a finite number from 0, found inf"),
        ({"top_k": -1}, "top_k: expected at least 0 (0 = all tokens), found -1"),
        ({"top_p": 0.0}, "top_p: expected above 0 and at most 1, found 0.0"),
        ({"top_p": 1.5}, "top_p: expected above 0 and at most 1, found 1.5"),
        ({"seed": -1}, "seed: expected from 0 to 2^63 - 1, found -1"),
        ({"seed": 1 << 63}, "seed: expected from 0 to 2^63 - 1, found 9223372036854775808"),
    ],
)
def test_sampling_params_without_meaning_are_refused_by_name(changes, message):
    with pytest.raises(UsageError) as error:
        SamplingParams(**changes)
    assert str(error.value) == message


def test_smallest_temperature_is_greedy_and_does_not_overflow():
    probabilities, ids = nucleus(torch.tensor([1.0, 30.0, -5.0]), SamplingParams(temperature=1e-320))
    assert ids[0] == 1
    assert probabilities[0] == 1.0
