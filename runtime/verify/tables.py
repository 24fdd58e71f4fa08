"""A report as rows of text for people."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.verify.report import Check, VerifyReport

if TYPE_CHECKING:
    from converters.quant.certificate import Certificate
    from runtime.verify.routing import LayerRouting
    from runtime.verify.summary import Estimate, LogitSummary

METRIC_COLUMNS = ("metric", "reference", "candidate", "value", "threshold", "verdict")
FINDING_COLUMNS = ("severity", "subject", "expected", "found")
SCHEME_COLUMNS = ("stored as", "must be", "tensors", "mean relative error", "largest", "clipped")
WORST_COLUMNS = ("tensor", "stored as", "relative error", "SQNR dB", "slope", "clipped")
ROUTING_COLUMNS = ("layer", "tokens", "expert overlap", "tokens with another expert set")
Row = tuple[str, ...]


def finding_rows(report: VerifyReport) -> list[Row]:
    """Return the findings of all levels, level by level, failures first."""
    return [(finding.severity, finding.subject, finding.expected, finding.found) for finding in report.findings]


def scheme_rows(weights: "Certificate") -> list[Row]:
    """Return one row for all tensors that are stored alike."""
    return [
        (
            summary.scheme,
            summary.relation,
            str(summary.tensors),
            f"{summary.mean_relative_error:.4g}",
            f"{summary.largest_relative_error:.4g}",
            f"{summary.clipped:.3%}",
        )
        for summary in weights.summaries
    ]


def worst_rows(weights: "Certificate") -> list[Row]:
    """Return the tensors with the largest error, one a row."""
    return [
        (
            figures.tensor,
            figures.scheme,
            f"{figures.relative_error:.4g}",
            f"{figures.sqnr_db:.4g}",
            f"{figures.slope:.5g}",
            f"{figures.clipped:.3%}",
        )
        for figures in weights.worst
    ]


def routing_rows(routing: "tuple[LayerRouting, ...]") -> list[Row]:
    """Return one row a MoE layer; shares in percent."""
    return [(str(row.layer), str(row.num_tokens), f"{row.overlap:.2%}", f"{row.changed:.2%}") for row in routing]


def metric_rows(report: VerifyReport) -> list[Row]:
    """Return every metric; those without a limit have no verdict."""
    checks = {check.metric: check for check in report.checks}
    measured: list[Row] = []
    if report.logits is not None and report.logits.summary is not None:
        measured = list(_summary_rows(report.logits.summary))
    shown = {row[0] for row in measured}
    alone = [_row(check.metric, check.found, checks) for name, check in checks.items() if name not in shown]
    return [*alone, *(_row(metric, value, checks, sides) for metric, value, *sides in measured)]


def _row(metric: str, value: str, checks: dict[str, Check], sides: list[str] | None = None) -> Row:
    reference, candidate = sides or ("", "")
    check = checks.get(metric)
    return (metric, reference, candidate, value, check.expected if check else "", check.verdict if check else "")


def _summary_rows(summary: "LogitSummary") -> Iterator[Row]:
    """Yield (metric, value) or (metric, value, reference, candidate)."""
    kl, perplexity = summary.kl_nats, summary.perplexity
    yield "KL mean", f"{_with_error(kl.estimate)} nats"
    quantiles = {"median": kl.median, "p90": kl.p90, "p95": kl.p95, "p99": kl.p99, "p99.9": kl.p99_9, "max": kl.max}
    for name, value in quantiles.items():
        if value is not None:
            yield f"KL {name}", f"{value:.4g} nats"
    yield "KL below zero", f"{kl.num_negative} of {summary.num_tokens} tokens"
    yield "top-1 agreement", _with_error(summary.top1)
    yield "top-5 overlap", _with_error(summary.top5_overlap)
    yield "reference top-1 in candidate top-5", _with_error(summary.top1_in_top5)
    ratio_error = "" if perplexity.ratio_se is None else f" +- {perplexity.ratio_se:.2g}"
    yield (
        "perplexity ratio",
        f"{perplexity.ratio:.6g}{ratio_error}",
        f"{perplexity.reference:.5g}",
        f"{perplexity.candidate:.5g}",
    )
    yield "ln perplexity ratio", f"{_with_error(perplexity.ln_ratio)} nats"
    yield "probability change of the right token, mean", _with_error(summary.delta_p)
    yield "probability change of the right token, RMS", f"{summary.delta_p_rms:.4g}"
    yield "logit difference, max", f"{summary.logit_max_abs:.4g}"
    yield "logit difference, RMS", f"{summary.logit_rms:.4g}"


def _with_error(estimate: "Estimate") -> str:
    """Return mean +- block error, and the naive one beside it."""
    if estimate.se is None:
        return f"{estimate.mean:.6g}"
    naive = "" if estimate.se_block is None else f" (naive {estimate.se_naive:.2g})"
    return f"{estimate.mean:.6g} +- {estimate.se:.2g}{naive}"
