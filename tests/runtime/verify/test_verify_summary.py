"""Means, errors, percentiles and perplexities against cases computed by hand."""

import math

import pytest
import torch

from runtime.verify.metrics import TokenScores, score_tokens
from runtime.verify.summary import (
    MIN_TOKENS_P99_9,
    ConfidenceBucket,
    block_bootstrap_means,
    confidence_buckets,
    estimate_mean,
    percentiles,
    summarize,
)


def scores_of(
    kl: list[float], nll_reference: list[float] | None = None, nll_candidate: list[float] | None = None
) -> TokenScores:
    count = len(kl)
    zeros, true = torch.zeros(count, dtype=torch.float64), torch.ones(count, dtype=torch.bool)
    reference = torch.tensor(nll_reference or [0.0] * count, dtype=torch.float64)
    candidate = torch.tensor(nll_candidate or [0.0] * count, dtype=torch.float64)
    kl_T = torch.tensor(kl, dtype=torch.float64)
    return TokenScores(kl_T, reference, candidate, *[zeros] * 6, true, true, *[zeros] * 3)


def windows(*counts: int) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))


def test_naive_error_is_sample_deviation_over_root_of_count() -> None:
    estimate = estimate_mean(torch.tensor([1.0, 2.0, 3.0, 4.0]), windows(2, 2), seed=0)
    assert estimate.mean == 2.5
    assert estimate.se_naive == pytest.approx(math.sqrt(5 / 3) / 2, rel=1e-6)


def test_block_bootstrap_is_a_function_of_its_seed() -> None:
    values, blocks = torch.randn(60, generator=torch.Generator().manual_seed(1)), windows(20, 20, 20)
    same = [estimate_mean(values, blocks, seed=7) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0].se_block != estimate_mean(values, blocks, seed=8).se_block


def test_block_bootstrap_sees_correlation_that_the_naive_error_misses() -> None:
    """Four windows of 100 equal tokens hold four values: SE = population deviation / sqrt(4), not s / sqrt(400)."""
    values = torch.tensor([0.0, 0.0, 1.0, 1.0]).repeat_interleave(100)
    estimate = estimate_mean(values, windows(100, 100, 100, 100), seed=0)
    assert estimate.se_block == pytest.approx(0.25, rel=0.1)
    assert estimate.se_naive == pytest.approx(0.025, rel=0.01)
    assert estimate.se == estimate.se_block


def test_block_bootstrap_weighs_windows_by_their_tokens() -> None:
    """Equal values have no spread however unequal the windows are; a mean of window means would agree only by luck."""
    estimate = estimate_mean(torch.full((9,), 0.3, dtype=torch.float64), windows(1, 2, 6), seed=0)
    assert estimate.se_block == pytest.approx(0.0, abs=1e-12)
    assert estimate.ci95 == pytest.approx((0.3, 0.3))


def test_interval_holds_the_middle_95_percent_of_resampled_means() -> None:
    """Two windows of one token, 0 and 1: the mean is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4."""
    means = block_bootstrap_means(torch.tensor([0.0, 1.0]), windows(1, 1), seed=0)
    assert means is not None
    assert set(means.tolist()) == {0.0, 0.5, 1.0}
    assert (means == 0.5).double().mean().item() == pytest.approx(0.5, abs=0.06)
    assert estimate_mean(torch.tensor([0.0, 1.0]), windows(1, 1), seed=0).ci95 == (0.0, 1.0)


def test_interval_of_many_windows_is_near_the_normal_one() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = estimate_mean(values, torch.arange(400), seed=1)
    assert found.ci95 is not None
    assert found.ci95[0] == pytest.approx(found.mean - 1.96 / 20, abs=0.02)
    assert found.ci95[1] == pytest.approx(found.mean + 1.96 / 20, abs=0.02)


def test_one_window_has_no_block_error_and_falls_back_to_the_naive_one() -> None:
    estimate = estimate_mean(torch.tensor([1.0, 3.0]), windows(2), seed=0)
    assert estimate.se_block is estimate.ci95 is None
    assert estimate.se == estimate.se_naive == pytest.approx(1.0)


def test_one_token_has_no_error_at_all() -> None:
    assert estimate_mean(torch.tensor([1.0]), windows(1), seed=0).se is None


def test_percentiles_interpolate_linearly() -> None:
    summary = summarize(scores_of([float(value) for value in range(101)]), windows(50, 51), seed=0)
    kl = summary.kl_nats
    assert (kl.median, kl.p90, kl.p95, kl.p99, kl.max) == (50.0, 90.0, 95.0, 99.0, 100.0)


@pytest.mark.parametrize(("count", "shown"), [(MIN_TOKENS_P99_9 - 1, False), (MIN_TOKENS_P99_9, True)])
def test_last_permille_is_shown_from_twenty_thousand_tokens(count: int, shown: bool) -> None:
    summary = summarize(scores_of([0.5] * count), windows(count - 1, 1), seed=0)
    assert (summary.kl_nats.p99_9 is not None) is shown


def test_negative_values_are_counted_and_kept_in_the_mean() -> None:
    summary = summarize(scores_of([-1e-9, 3e-9]), windows(1, 1), seed=0)
    assert summary.kl_nats.num_negative == 1
    assert summary.kl_nats.estimate.mean == pytest.approx(1e-9)


def test_perplexity_is_the_exponential_of_the_mean_and_its_ratio_is_paired() -> None:
    """The text varies by whole nats between tokens, the pair differs by 0.1 everywhere: the paired error is zero."""
    reference = [math.log(2), math.log(8), math.log(4)]
    summary = summarize(scores_of([0.0] * 3, reference, [nll + 0.1 for nll in reference]), windows(2, 1), seed=0)
    perplexity = summary.perplexity
    assert perplexity.reference == pytest.approx(4.0)
    assert perplexity.ln_ratio.mean == pytest.approx(0.1)
    assert perplexity.ratio == pytest.approx(math.exp(0.1))
    assert perplexity.candidate == pytest.approx(perplexity.reference * perplexity.ratio)
    assert perplexity.ratio_se == pytest.approx(0.0, abs=1e-12)


def test_perplexity_too_large_for_a_float_is_infinite() -> None:
    """math.exp raises there, and a candidate with absurd but finite logits ended in a traceback."""
    summary = summarize(scores_of([900.0] * 2, [1.0, 1.0], [900.0, 901.0]), windows(2), seed=0)
    assert summary is not None
    assert (summary.perplexity.candidate, summary.perplexity.ratio) == (math.inf, math.inf)


def test_ratio_error_is_the_ratio_times_the_error_of_the_logarithm() -> None:
    summary = summarize(scores_of([0.0] * 2, [1.0, 1.0], [1.2, 1.4]), windows(2), seed=0)
    perplexity = summary.perplexity
    assert perplexity.ln_ratio.se_naive == pytest.approx(0.1)
    assert perplexity.ratio_se == pytest.approx(math.exp(0.3) * 0.1)


def test_root_mean_squares_pool_tokens_before_the_root() -> None:
    reference, candidate = torch.zeros(2, 2), torch.tensor([[1.0, 0.0], [0.0, 3.0]])
    summary = summarize(score_tokens(reference, candidate, torch.tensor([0, 0])), windows(2), seed=0)
    assert summary.logit_rms == pytest.approx(math.sqrt((1 + 9) / 4))
    assert summary.logit_max_abs == 3.0
    first, second = 1 / (1 + math.exp(-1)) - 0.5, 1 / (1 + math.exp(3)) - 0.5
    assert summary.delta_p.mean == pytest.approx((first + second) / 2, abs=1e-7)
    assert summary.delta_p_rms == pytest.approx(math.sqrt((first**2 + second**2) / 2), abs=1e-7)


def test_non_finite_tokens_are_left_out_of_every_average() -> None:
    candidate = torch.zeros(3, 4)
    candidate[1, 0] = torch.nan
    summary = summarize(score_tokens(torch.zeros(3, 4), candidate, torch.tensor([0, 1, 2])), windows(2, 1), seed=0)
    assert summary.num_tokens == 2
    assert summary.kl_nats.estimate.mean == 0.0
    assert summary.top1.mean == 1.0


def test_no_finite_token_leaves_no_summary() -> None:
    nan = torch.full((2, 4), torch.nan)
    assert summarize(score_tokens(nan, nan, torch.tensor([0, 1])), windows(2), seed=0) is None


def test_window_by_window_equals_one_shot() -> None:
    generator = torch.Generator().manual_seed(3)
    reference, candidate = torch.randn(2, 30, 17, generator=generator)
    ids, blocks = torch.randint(17, (30,), generator=generator), windows(11, 13, 6)
    parts = [
        score_tokens(reference[blocks == window], candidate[blocks == window], ids[blocks == window])
        for window in range(3)
    ]
    streamed = summarize(TokenScores.cat(parts), blocks, seed=5)
    assert streamed == summarize(score_tokens(reference, candidate, ids), blocks, seed=5)


def test_percentiles_equal_those_of_torch() -> None:
    values = torch.randn(57, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    shares = (0.0, 0.01, 0.5, 0.975, 1.0)
    expected = torch.quantile(values, torch.tensor(shares, dtype=torch.float64)).tolist()
    assert percentiles(values, shares) == pytest.approx(expected, rel=1e-12)
    assert percentiles(torch.tensor([3.0]), (0.01, 0.99)) == [3.0, 3.0]


def probabilities(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log().float()


def test_flip_is_unexplained_where_the_reference_was_sure() -> None:
    """ln(0.6 / 0.4) = 0.405 nats is a choice, ln(0.52 / 0.48) = 0.080 nats is not."""
    reference = probabilities([0.6, 0.4], [0.52, 0.48], [0.6, 0.4])
    candidate = probabilities([0.4, 0.6], [0.48, 0.52], [0.55, 0.45])
    summary = summarize(score_tokens(reference, candidate, torch.tensor([0, 0, 0])), windows(3), seed=0)
    assert summary is not None
    assert summary.top1.mean == pytest.approx(1 / 3)
    assert summary.unexplained_flips == 1


def test_percentiles_of_the_probability_change() -> None:
    """Changes -0.2, -0.12 and -0.05: the 1st percentile is 2 % of the way from the least to the next."""
    reference = probabilities([0.6, 0.4], [0.52, 0.48], [0.6, 0.4])
    candidate = probabilities([0.4, 0.6], [0.4, 0.6], [0.55, 0.45])
    summary = summarize(score_tokens(reference, candidate, torch.tensor([0, 0, 0])), windows(3), seed=0)
    assert summary is not None
    assert summary.delta_p_p1 == pytest.approx(-0.2 + 0.02 * 0.08, abs=1e-6)
    assert summary.delta_p_p99 == pytest.approx(-0.05 - 0.02 * 0.07, abs=1e-6)


def test_buckets_by_confidence_of_the_reference() -> None:
    """Largest probabilities 0.6, 0.8 and exactly 1: the third, fourth and last bucket, which holds its upper end."""
    reference = torch.stack([*probabilities([0.6, 0.4], [0.8, 0.2]), torch.tensor([200.0, 0.0])])
    candidate = torch.stack([*probabilities([0.4, 0.6], [0.8, 0.2]), torch.tensor([200.0, 0.0])])
    found = confidence_buckets(score_tokens(reference, candidate, torch.tensor([0, 1, 0])))
    kl = 0.6 * math.log(0.6 / 0.4) + 0.4 * math.log(0.4 / 0.6)
    near = pytest.approx
    assert found == (
        ConfidenceBucket(0.0, 0.25, 0, None, None, None),
        ConfidenceBucket(0.25, 0.5, 0, None, None, None),
        ConfidenceBucket(0.5, 0.75, 1, near(kl, abs=1e-6), 0.0, near(-0.2, abs=1e-6)),
        ConfidenceBucket(0.75, 0.95, 1, 0.0, 1.0, 0.0),
        ConfidenceBucket(0.95, 1.0, 1, 0.0, 1.0, 0.0),
    )


def test_interval_of_the_ratio_is_that_of_its_logarithm() -> None:
    scores = scores_of([0.0] * 3, [1.0] * 3, [1.1, 1.2, 1.3])
    summary = summarize(scores, windows(1, 1, 1), seed=0)
    assert summary is not None
    low, high = summary.perplexity.ln_ratio.ci95
    assert summary.perplexity.ratio_ci95 == pytest.approx((math.exp(low), math.exp(high)))
