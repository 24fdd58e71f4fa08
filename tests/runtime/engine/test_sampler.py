import pytest
import torch

from converters.errors import InputError, UsageError
from runtime.engine.request import SamplingParams
from runtime.engine.sampler import Sampler, token_of
from runtime.model.ops import LayerOps
from tests.runtime.nucleus import nucleus

# probabilities 0.5, 0.25, 0.125, 0.125 under ids 2, 0, 1, 3
LOGITS = torch.tensor([0.25, 0.125, 0.5, 0.125]).log()


def drawn(params: SamplingParams, logits_V: torch.Tensor = LOGITS, draws: int = 1) -> list[int]:
    sampler = Sampler(params, LayerOps.of_twins())
    return [token_of(sampler.draw(logits_V[None])) for _ in range(draws)]


def frequencies(params: SamplingParams, draws: int = 1000) -> list[float]:
    return (torch.bincount(torch.tensor(drawn(params, LOGITS, draws)), minlength=4) / draws).tolist()


def test_sampler_greedy_takes_the_most_likely():
    assert drawn(SamplingParams()) == [2]


def test_sampler_greedy_tie_goes_to_the_lower_id():
    assert drawn(SamplingParams(), torch.tensor([1.0, 3.0, 3.0, 2.0, 3.0])) == [1]


def test_sampler_temperature_1_draws_the_distribution():
    """1000 draws: five standard errors are 0.08."""
    expected = [0.25, 0.125, 0.5, 0.125]
    assert frequencies(SamplingParams(temperature=1.0)) == pytest.approx(expected, abs=0.08)


def test_sampler_temperature_half_squares_the_odds():
    squares = [0.0625, 0.015625, 0.25, 0.015625]
    expected = [square / sum(squares) for square in squares]
    assert frequencies(SamplingParams(temperature=0.5)) == pytest.approx(expected, abs=0.08)


def test_sampler_top_k_draws_from_k_tokens_renormalized():
    assert frequencies(SamplingParams(temperature=1.0, top_k=2)) == pytest.approx([1 / 3, 0, 2 / 3, 0], abs=0.08)


def test_sampler_same_seed_same_tokens_other_seed_others():
    runs = [drawn(SamplingParams(temperature=1.0, seed=seed), LOGITS, 50) for seed in (7, 7, 8)]
    assert runs[0] == runs[1]
    assert runs[0] != runs[2]


def test_sampler_tiny_temperature_is_greedy():
    for temperature in (1e-300, 1e-39, 1e-37):
        assert {drawn(SamplingParams(temperature=temperature, seed=seed))[0] for seed in range(9)} == {2}


def test_sampler_huge_temperature_and_top_k_draw_from_all_tokens():
    assert set(drawn(SamplingParams(temperature=1e300, top_k=1 << 40), LOGITS, 100)) == {0, 1, 2, 3}


@pytest.mark.parametrize("changes", [{}, {"top_k": 2}, {"top_p": 0.6}, {"top_k": 3, "top_p": 0.7}])
def test_sampler_draws_only_what_the_nucleus_leaves(changes):
    params = SamplingParams(temperature=1.0, **changes)
    _, ids = nucleus(LOGITS, params)
    assert set(drawn(params, LOGITS, 200)) == set(ids.tolist())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_sampler_logits_that_are_not_finite_are_refused(temperature, bad):
    logits = LOGITS.clone()
    logits[1] = bad
    with pytest.raises(InputError) as error:
        drawn(SamplingParams(temperature=temperature), logits)
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
