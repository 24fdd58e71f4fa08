"""Results of running models, made by hand."""

import math
from dataclasses import replace
from typing import Any

import torch

from runtime.verify.metrics import TokenScores
from runtime.verify.results import (
    ExpertDifference,
    FloorSummary,
    LayerDifference,
    ModelComparison,
    MtpDifference,
    OutputError,
    RouterDifference,
    TokenTable,
)
from runtime.verify.summary import ConfidenceBucket, Estimate, KlSummary, LogitSummary, PerplexitySummary
from runtime.verify.windows import Window

ROUTER = RouterDifference(0.0, 1.0, 0, 0.005, 0.0, None, 0.0, 0.0, 0.0)
FLOOR = FloorSummary(num_tokens=4, kl_mean=2e-4, top1=0.99, ln_ppl_ratio=1e-4)


def estimate(mean: float) -> Estimate:
    return Estimate(mean, 0.001, 0.0005, (mean - 0.002, mean + 0.002))


def summary(kl: float = 0.006, top1: float = 0.97, ratio: float = 1.001, flips: int = 3) -> LogitSummary:
    return LogitSummary(
        num_tokens=400,
        num_windows=4,
        kl_nats=KlSummary(estimate(kl), 0.004, 0.01, 0.02, 0.05, None, 0.2, 1),
        perplexity=PerplexitySummary(5.0, 5.0 * ratio, estimate(math.log(ratio)), ratio, 0.002),
        top1=estimate(top1),
        top5_overlap=estimate(0.95),
        top1_in_top5=estimate(0.999),
        delta_p=estimate(-0.001),
        delta_p_rms=0.02,
        logit_max_abs=1.5,
        logit_rms=0.1,
        top10_overlap=estimate(0.94),
        unexplained_flips=flips,
        delta_p_p1=-0.05,
        delta_p_p99=0.04,
        buckets=(
            ConfidenceBucket(0.0, 0.25, 0, None, None, None),
            ConfidenceBucket(0.95, 1.0, 400, 0.001, 0.99, -0.0001),
        ),
    )


def error(relative: float = 0.03, slope: float = 1.0, floor: float | None = 0.002) -> OutputError:
    sqnr = -20 * math.log10(relative) if 0 < relative < math.inf else math.inf
    return OutputError(relative, 2 * relative, 17, 0.999, sqnr, slope, floor)


def experts(*relative: float | None) -> tuple[ExpertDifference, ...]:
    return tuple(
        ExpertDifference(index, 0 if value is None else 20, 21, value, None if value is None else 1.0)
        for index, value in enumerate(relative)
    )


def layer(index: int, **changed: Any) -> LayerDifference:
    plain = LayerDifference(index, False, error(), error(), error(0.05), ROUTER, ROUTER, experts(0.03, 0.031, 0.03))
    return replace(plain, **changed)


def table(bad: tuple[int, ...] = ()) -> TokenTable:
    """Four predictions of a text of five tokens in one window; those in `bad` have NaN logits of the candidate."""
    values, true = torch.full((4,), 0.006, dtype=torch.float64), torch.ones(4, dtype=torch.bool)
    candidate = torch.tensor([index not in bad for index in range(4)])
    scores = TokenScores(*[values] * 9, true, candidate, *[values] * 3)
    return TokenTable(
        scores, (5, 6, 7, 8, 9), torch.arange(1, 5), torch.zeros(4, dtype=torch.int64), (Window(0, 0, 1, 5),)
    )


def comparison(**changed: Any) -> ModelComparison:
    """Three layers, the first dense, logits and an MTP layer, all within the limits of FP8."""
    found = ModelComparison(
        protocol="first 5 of 5 tokens",
        dtype="float32",
        device="cpu",
        activations="full",
        layers=(layer(0, router=None, router_own=None, experts=()), layer(1), layer(2, is_mtp=True)),
        tokens=table(),
        summary=summary(),
        mtp=MtpDifference(summary(), 0.5, 0.49),
        floor=FLOOR,
    )
    return replace(found, **changed)
