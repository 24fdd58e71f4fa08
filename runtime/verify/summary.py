"""Means with their uncertainty, percentiles and perplexities from per-token scores, all in fp64.

Tokens of one window are correlated, so the standard error that counts is the block bootstrap over windows, and so is
the 95 % interval; the naive error, s / sqrt(n) over tokens, is given beside it because llama.cpp prints that.

Shape suffixes: T tokens, W windows, B bootstrap draws.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.verify.metrics import TokenScores

NUM_DRAWS = 1000
# probability mass outside a confidence interval, half on each side
_OUTSIDE = 0.05
# the reference prefers its best token by more than this, so that rounding of 16-bit logits does not explain a change
EXPLAINED_GAP_NATS = 0.125
# lower ends of the classes of max p; the last class holds its upper end, 1
_CONFIDENCES = (0.0, 0.25, 0.5, 0.75, 0.95)
# with fewer tokens the 99.9th percentile is one of the few largest values, not a percentile
MIN_TOKENS_P99_9 = 20_000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its uncertainty; None where one window or one token leaves nothing to estimate from.

    Attributes:
        se_block: standard deviation of the mean over resamplings of whole windows.
        se_naive: s / sqrt(n) over tokens; the binomial error where the values are 0 and 1.
        ci95: 2.5th and 97.5th percentile of the mean over the same resamplings.
    """

    mean: float
    se_block: float | None
    se_naive: float | None
    ci95: tuple[float, float] | None = None

    @property
    def se(self) -> float | None:
        """The block error where there is one, else the naive one."""
        return self.se_naive if self.se_block is None else self.se_block


@dataclass(frozen=True, slots=True)
class KlSummary:
    """KL(reference||candidate) over tokens, in nats per token. Percentiles interpolate linearly."""

    estimate: Estimate
    median: float
    p90: float
    p95: float
    p99: float
    p99_9: float | None
    max: float
    num_negative: int


@dataclass(frozen=True, slots=True)
class PerplexitySummary:
    """Perplexities and their ratio.

    Attributes:
        reference: exp(mean NLL) of the reference, unitless.
        candidate: exp(mean NLL) of the candidate.
        ln_ratio: mean of d = NLL_candidate - NLL_reference, nats; paired, so the text's own spread cancels.
        ratio: candidate / reference = exp(ln_ratio).
        ratio_se: ratio * SE(ln_ratio), the first-order error of the exponential.
    """

    reference: float
    candidate: float
    ln_ratio: Estimate
    ratio: float
    ratio_se: float | None

    @property
    def ratio_ci95(self) -> tuple[float, float] | None:
        """The interval of ln_ratio, exponentiated: percentiles keep their place under a monotonic function."""
        interval = self.ln_ratio.ci95
        return interval and (_exp(interval[0]), _exp(interval[1]))


@dataclass(frozen=True, slots=True)
class ConfidenceBucket:
    """Tokens whose largest reference probability is in [low, high), or [low, 1] of the last bucket.

    The top bucket shows damage where the reference is sure; the others mix in tokens that it left open.

    Attributes:
        num_tokens: tokens in the bucket; without any the means are None.
        kl_mean: nats per token.
        top1: share of tokens whose argmax is equal.
        delta_p: mean change of the probability of the right token.
    """

    low: float
    high: float
    num_tokens: int
    kl_mean: float | None
    top1: float | None
    delta_p: float | None


@dataclass(frozen=True, slots=True)
class LogitSummary:
    """What a comparison of logits found; averages run over `num_tokens` tokens that are finite on both sides.

    Attributes:
        top1: share of tokens whose argmax is equal.
        top5_overlap: mean share of the reference's top 5 that is in the candidate's top 5.
        top1_in_top5: share of tokens whose reference argmax is in the candidate's top 5.
        delta_p: mean of q(x) - p(x) for the token x that follows; negative is damage.
        delta_p_rms: root of the mean square of the same.
        logit_max_abs: largest |candidate - reference| over tokens and vocabulary.
        logit_rms: root of the mean over tokens and vocabulary of the squared difference.
        top10_overlap: mean share of the reference's top 10 that is in the candidate's top 10.
        unexplained_flips: tokens whose argmax differs although the reference prefers its own by more than
            EXPLAINED_GAP_NATS.
        delta_p_p1: 1st percentile of delta_p over tokens.
        delta_p_p99: 99th percentile of the same.
        buckets: by confidence of the reference, least sure first.
    """

    num_tokens: int
    num_windows: int
    kl_nats: KlSummary
    perplexity: PerplexitySummary
    top1: Estimate
    top5_overlap: Estimate
    top1_in_top5: Estimate
    delta_p: Estimate
    delta_p_rms: float
    logit_max_abs: float
    logit_rms: float
    top10_overlap: Estimate
    unexplained_flips: int
    delta_p_p1: float
    delta_p_p99: float
    buckets: tuple[ConfidenceBucket, ...]


def summarize(scores: TokenScores, window_ids_T: torch.Tensor, *, seed: int) -> LogitSummary | None:
    """Reduce per-token scores to the figures of a report; None where no token is finite.

    Args:
        scores: T tokens.
        window_ids_T: the window (T,) int64 that each token was scored in; windows are the blocks of the bootstrap.
        seed: of the bootstrap draws.
    """
    finite_T = scores.finite
    if not bool(finite_T.any()):
        return None
    kept, windows_T = scores.select(finite_T), window_ids_T[finite_T]

    def estimate(values_T: torch.Tensor) -> Estimate:
        return estimate_mean(values_T, windows_T, seed=seed)

    delta_p_p1, delta_p_p99 = percentiles(kept.delta_p, (0.01, 0.99))
    flips_T = (kept.top1_same == 0) & (kept.gap_reference > EXPLAINED_GAP_NATS)
    return LogitSummary(
        num_tokens=len(kept),
        num_windows=windows_T.unique().numel(),
        kl_nats=_summarize_kl(kept.kl_nats, estimate(kept.kl_nats)),
        perplexity=_summarize_perplexity(kept, estimate(kept.nll_candidate - kept.nll_reference)),
        top1=estimate(kept.top1_same),
        top5_overlap=estimate(kept.top5_overlap),
        top1_in_top5=estimate(kept.top1_in_top5),
        delta_p=estimate(kept.delta_p),
        delta_p_rms=math.sqrt(kept.delta_p.square().mean().item()),
        logit_max_abs=kept.logit_max_abs.max().item(),
        logit_rms=math.sqrt(kept.logit_mean_square.mean().item()),
        top10_overlap=estimate(kept.top10_overlap),
        unexplained_flips=int(flips_T.sum()),
        delta_p_p1=delta_p_p1,
        delta_p_p99=delta_p_p99,
        buckets=confidence_buckets(kept),
    )


def percentiles(values_T: torch.Tensor, shares: Sequence[float]) -> list[float]:
    """Return percentiles of values (T,) fp64, interpolated linearly; T has no upper limit, unlike torch.quantile."""
    ordered_T = values_T.sort().values
    found = []
    for share in shares:
        place = share * (values_T.numel() - 1)
        low = math.floor(place)
        high = min(low + 1, values_T.numel() - 1)
        found.append(torch.lerp(ordered_T[low], ordered_T[high], place - low).item())
    return found


def confidence_buckets(scores: TokenScores) -> tuple[ConfidenceBucket, ...]:
    """Return KL, top-1 agreement and probability change by the reference's largest probability, of finite tokens."""
    buckets = []
    for low, high in zip(_CONFIDENCES, (*_CONFIDENCES[1:], 1.0), strict=True):
        inside_T = (scores.max_p_reference >= low) & ((scores.max_p_reference < high) | (high == 1.0))
        kept = scores.select(inside_T)
        values = (kept.kl_nats, kept.top1_same, kept.delta_p)
        means = [value.mean().item() if len(kept) else None for value in values]
        buckets.append(ConfidenceBucket(low, high, len(kept), *means))
    return tuple(buckets)


def estimate_mean(values_T: torch.Tensor, window_ids_T: torch.Tensor, *, seed: int) -> Estimate:
    """Return the mean of values (T,) over tokens with its errors and interval, in the unit of the values."""
    count = values_T.numel()
    naive = None if count < 2 else values_T.std(correction=1).item() / math.sqrt(count)
    means_B = block_bootstrap_means(values_T, window_ids_T, seed=seed)
    if means_B is None:
        return Estimate(values_T.mean().item(), None, naive)
    low, high = percentiles(means_B, (_OUTSIDE / 2, 1 - _OUTSIDE / 2))
    return Estimate(values_T.mean().item(), means_B.std(correction=1).item(), naive, (low, high))


def block_bootstrap_means(values_T: torch.Tensor, window_ids_T: torch.Tensor, *, seed: int) -> torch.Tensor | None:
    """Return the token mean (B,) fp64 of NUM_DRAWS resamplings of whole windows.

    Each draw takes as many windows as there are, with replacement; its mean is the sum of their values by the number of
    their tokens. None with a single window.
    """
    _, block_T = window_ids_T.unique(return_inverse=True)
    num_windows = int(block_T.max()) + 1
    if num_windows < 2:
        return None
    sums_W = torch.zeros(num_windows, dtype=torch.float64).index_add_(0, block_T, values_T.double())
    counts_W = torch.bincount(block_T, minlength=num_windows).double()
    generator = torch.Generator().manual_seed(seed)
    means_B = torch.empty(NUM_DRAWS, dtype=torch.float64)
    # one draw at a time: all of them would take NUM_DRAWS * W indices, and a small stride makes many windows
    for draw in range(NUM_DRAWS):
        windows_W = torch.randint(num_windows, (num_windows,), generator=generator)
        means_B[draw] = sums_W[windows_W].sum() / counts_W[windows_W].sum()
    return means_B


def _summarize_kl(kl_T: torch.Tensor, estimate: Estimate) -> KlSummary:
    median, p90, p95, p99, p99_9 = percentiles(kl_T, (0.5, 0.9, 0.95, 0.99, 0.999))
    return KlSummary(
        estimate=estimate,
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        p99_9=p99_9 if kl_T.numel() >= MIN_TOKENS_P99_9 else None,
        max=kl_T.max().item(),
        num_negative=int((kl_T < 0).sum()),
    )


def _summarize_perplexity(scores: TokenScores, ln_ratio: Estimate) -> PerplexitySummary:
    ratio = _exp(ln_ratio.mean)
    return PerplexitySummary(
        reference=_exp(scores.nll_reference.mean().item()),
        candidate=_exp(scores.nll_candidate.mean().item()),
        ln_ratio=ln_ratio,
        ratio=ratio,
        ratio_se=None if ln_ratio.se is None else ratio * ln_ratio.se,
    )


def _exp(nats: float) -> float:
    """Return e^nats, infinity where that is too large: a broken candidate may well be off by thousands of nats."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
