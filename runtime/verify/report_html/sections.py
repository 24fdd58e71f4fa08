"""The sections on predictions, layers, experts and the MTP layer."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from runtime.verify.report import VerifyReport
from runtime.verify.report_html.bars import Bucket, draw_buckets, draw_histogram, log_bins
from runtime.verify.report_html.layers import Chart, error_charts, expert_charts, router_chart
from runtime.verify.report_html.tables import Table, experts_table, layers_table, plain_table, routers_table
from runtime.verify.report_html.tokens import worst_tokens
from runtime.verify.report_html.words import Decode, figure, grouped, percent, with_error
from runtime.verify.results import FloorSummary, LayerDifference, ModelComparison, MtpDifference, TokenTable
from runtime.verify.siblings import layer_name
from runtime.verify.summary import KlSummary, LogitSummary
from runtime.verify.tables import METRIC_COLUMNS, metric_rows


def predictions(report: VerifyReport, models: ModelComparison, decode: Decode | None) -> dict[str, Any] | None:
    """Return what the template shows of the logits; None where they were not compared."""
    tokens, summary = models.tokens, models.summary
    if tokens is None:
        return None
    charts: list[tuple[Chart, Table]] = []
    if summary is not None:
        charts = [_histogram(tokens, summary.kl_nats, models.floor), _by_confidence(summary)]
    worst = [
        {
            **{field.name: getattr(token, field.name) for field in fields(token)},
            "kl": figure(token.kl_nats),
            "p": figure(token.p_reference),
            "q": figure(token.p_candidate),
        }
        for token in worst_tokens(tokens, decode)
    ]
    return {
        "protocol": f"{models.protocol}; computed in {models.dtype} on {models.device}",
        "num_bad": len(tokens.scores) - int(tokens.scores.finite.sum()),
        "charts": charts,
        "metrics": plain_table("All metrics", METRIC_COLUMNS, metric_rows(report)),
        "worst": worst,
    }


def _histogram(tokens: TokenTable, kl: KlSummary, floor: FloorSummary | None) -> tuple[Chart, Table]:
    bins = log_bins(tokens.scores.kl_nats[tokens.scores.finite].tolist())
    marks = [("mean", kl.estimate.mean), ("median", kl.median), ("p99", kl.p99), ("max", kl.max)]
    marks += [] if floor is None else [("mean of the noise floor", floor.kl_mean)]
    heading = "KL of the tokens"
    rows = [(figure(item.low), figure(item.high), grouped(item.count)) for item in bins]
    note = "number of tokens by KL, four bins to a factor of ten"
    table = plain_table(heading, ("from, nats#", "to, nats#", "tokens#"), rows)
    return Chart(heading, note, draw_histogram(bins, marks)), table


def _by_confidence(summary: LogitSummary) -> tuple[Chart, Table]:
    names = [f"p {figure(bucket.low)} to {figure(bucket.high)}" for bucket in summary.buckets]
    drawn = draw_buckets(
        [Bucket(name, item.num_tokens, item.kl_mean) for name, item in zip(names, summary.buckets, strict=True)]
    )
    rows = [
        (name, grouped(item.num_tokens), figure(item.kl_mean), percent(item.top1), percent(item.delta_p))
        for name, item in zip(names, summary.buckets, strict=True)
    ]
    heading = "KL by the reference's confidence"
    note = "mean KL of tokens by the largest probability that the reference gives; where it is sure, damage shows"
    columns = ("largest p", "tokens#", "mean KL, nats#", "same first choice#", "change of p of the right token#")
    return Chart(heading, note, drawn), plain_table(heading, columns, rows)


def layers_section(report: VerifyReport, layers: Sequence[LayerDifference]) -> dict[str, Any]:
    """Return what the template shows of layers, routers and experts."""
    first, limits = report.first_divergence, report.limits
    words = "The error of every layer stays within its band."
    if first is not None:
        words = (
            f"The first error that leaves its band is that of layer {first.layer}, {first.part}: "
            f"{figure(first.relative)}, expected at most {figure(first.limit)}."
        )
    return {
        "first_off": words,
        "non_finite": [
            f"{layer_name(layer)}: NaN or Inf: {layer.first_non_finite}" for layer in layers if layer.first_non_finite
        ],
        "errors": error_charts(layers, limits, report.first_off),
        "table": layers_table(layers),
        "routing": router_chart(layers),
        "routers": routers_table(layers),
        "experts": expert_charts(layers, report.outlined),
        "worst_experts": experts_table(layers),
    }


def mtp_words(mtp: MtpDifference) -> str:
    """Return what is known of the MTP layer's predictions."""
    words = (
        f"Its greedy drafts are the main head's token at {percent(mtp.acceptance_reference)} of the positions in the "
        f"reference and at {percent(mtp.acceptance_candidate)} in the candidate."
    )
    if mtp.summary is not None:
        kl, top1 = mtp.summary.kl_nats, mtp.summary.top1
        words += (
            f" Mean KL {with_error(kl.estimate.mean, kl.estimate.se, 3)} nats, 99th percentile {figure(kl.p99)}, "
            f"same first choice {percent(top1.mean)} over {grouped(mtp.summary.num_tokens)} tokens."
        )
    return words
