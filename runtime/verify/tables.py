"""A report as rows of text for people."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.verify.check import Check, severity
from runtime.verify.report import VerifyReport
from runtime.verify.siblings import expert_name, layer_name

if TYPE_CHECKING:
    from converters.quant.certificate import Certificate
    from runtime.verify.results import LayerDifference, OutputError
    from runtime.verify.routing import LayerRouting
    from runtime.verify.summary import Estimate, LogitSummary
    from runtime.verify.text_results import TextReport

METRIC_COLUMNS = ("metric", "reference", "candidate", "value", "95 % interval", "floor", "threshold", "verdict")
FINDING_COLUMNS = ("severity", "subject", "expected", "found")
SCHEME_COLUMNS = ("stored as", "must be", "tensors", "mean relative error", "largest", "clipped")
WORST_COLUMNS = ("tensor", "stored as", "relative error", "SQNR dB", "slope", "clipped")
LAYER_COLUMNS = (
    "layer",
    "attention error (floor)",
    "norm error",
    "MLP error (floor)",
    "slope",
    "SQNR dB",
    "residual error (floor)",
    "expert sets changed",
    "unexplained",
    "routing weight moved (floor)",
    "changed, free-running",
)
EXPERT_COLUMNS = ("expert", "relative error", "slope", "tokens", "tokens of the candidate")
ROUTING_COLUMNS = ("layer", "tokens", "expert overlap", "tokens with another expert set")
ANSWER_COLUMNS = ("prompt", "first difference", "gap, nats", "source ends by", "candidate ends by")
CAUSE_COLUMNS = ("subject", "cause", "evidence", "remedy")
MOST_EXPERTS = 5
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


def routing_rows(routing: "Sequence[LayerRouting]") -> list[Row]:
    """Return one row a MoE layer; shares in percent."""
    return [(str(row.layer), str(row.num_tokens), f"{row.overlap:.2%}", f"{row.changed:.2%}") for row in routing]


def answer_rows(text: "TextReport") -> list[Row]:
    """Return one row a prompt: where the answers part, and how both begin."""
    return [
        (
            result.prompt,
            "none" if result.first_difference is None else str(result.first_difference),
            "" if result.gap is None else f"{result.gap:.3g}",
            result.reference.finish_reason,
            result.candidate.finish_reason,
        )
        for result in text.results
    ]


def layer_rows(layers: "Sequence[LayerDifference]") -> list[Row]:
    """Return one row a layer: relative errors with their floor, slope and SQNR of the MLP, residual, routing."""
    return [_layer_row(found) for found in layers]


def _layer_row(found: "LayerDifference") -> Row:
    router, own = found.router, found.router_own
    return (
        layer_name(found),
        _with_floor(found.attention),
        "" if found.mlp_norm is None else f"{found.mlp_norm.relative:.3g}",
        _with_floor(found.mlp),
        f"{found.mlp.slope:.5g}",
        f"{found.mlp.sqnr_db:.3g}",
        _with_floor(found.residual),
        "" if router is None else f"{router.changed:.2%}",
        "" if router is None else f"{router.unexplained}",
        "" if router is None else _beside_floor(router.weight_moved, router.weight_moved_floor),
        "" if own is None else f"{own.changed:.2%}",
    )


def _with_floor(error: "OutputError") -> str:
    return _beside_floor(error.relative, error.floor_relative)


def _beside_floor(value: float, floor: float | None) -> str:
    return f"{value:.3g}" if floor is None else f"{value:.3g} ({floor:.2g})"


def expert_rows(layers: "Sequence[LayerDifference]") -> list[Row]:
    """Return the experts with the largest error of all layers, the worst first."""
    found = [
        (expert.relative, layer, expert) for layer in layers for expert in layer.experts if expert.relative is not None
    ]
    found.sort(key=lambda item: (-severity(item[0]), item[1].layer, item[2].expert))
    return [
        (
            expert_name(layer, expert.expert),
            f"{relative:.4g}",
            f"{expert.slope:.5g}",
            str(expert.num_tokens),
            str(expert.num_tokens_candidate),
        )
        for relative, layer, expert in found[:MOST_EXPERTS]
        if relative
    ]


def cause_rows(report: VerifyReport) -> list[Row]:
    """Return what was proved to be wrong, one cause a row."""
    return [(cause.subject, cause.statement, cause.evidence, cause.remedy) for cause in report.causes]


def metric_rows(report: VerifyReport) -> list[Row]:
    """Return every metric; those without a limit have no verdict."""
    checks = {check.metric: check for check in report.checks}
    measured: list[_Metric] = []
    if report.models is not None and report.models.summary is not None:
        measured = list(_summary_rows(report.models.summary))
    shown = {found.name for found in measured}
    alone = [_row(check.metric, check.found, checks) for name, check in checks.items() if name not in shown]
    return [*alone, *(_row(found.name, found.value, checks, found.sides, found.span) for found in measured)]


def _row(metric: str, value: str, checks: dict[str, Check], sides: list[str] | None = None, span: str = "") -> Row:
    reference, candidate = sides or ("", "")
    check = checks.get(metric)
    if check is None:
        return (metric, reference, candidate, value, span, "", "", "")
    floor = "" if check.floor is None else f"{check.floor:.4g}"
    return (metric, reference, candidate, value, span or interval(check.ci95), floor, check.expected, check.verdict)


@dataclass(frozen=True, slots=True)
class _Metric:
    name: str
    value: str
    span: str = ""
    sides: list[str] | None = None


def _summary_rows(summary: "LogitSummary") -> Iterator[_Metric]:
    """Yield every figure of the logits."""
    kl, perplexity = summary.kl_nats, summary.perplexity
    yield _mean("KL mean", kl.estimate, " nats")
    quantiles = {"median": kl.median, "p90": kl.p90, "p95": kl.p95, "p99": kl.p99, "p99.9": kl.p99_9, "max": kl.max}
    for name, value in quantiles.items():
        if value is not None:
            yield _Metric(f"KL {name}", f"{value:.4g} nats")
    yield _Metric("KL below zero", f"{kl.num_negative} of {summary.num_tokens} tokens")
    yield _mean("top-1 agreement", summary.top1)
    yield _mean("top-5 overlap", summary.top5_overlap)
    yield _mean("top-10 overlap", summary.top10_overlap)
    yield _mean("reference top-1 in candidate top-5", summary.top1_in_top5)
    yield _Metric("unexplained top-1 changes", f"{summary.unexplained_flips} of {summary.num_tokens} tokens")
    error = "" if perplexity.ratio_se is None else f" +- {perplexity.ratio_se:.2g}"
    sides = [f"{perplexity.reference:.5g}", f"{perplexity.candidate:.5g}"]
    yield _Metric("perplexity ratio", f"{perplexity.ratio:.6g}{error}", interval(perplexity.ratio_ci95), sides)
    yield _mean("ln perplexity ratio", perplexity.ln_ratio, " nats")
    yield _mean("probability change of the right token, mean", summary.delta_p)
    yield _Metric("probability change of the right token, RMS", f"{summary.delta_p_rms:.4g}")
    span = f"{summary.delta_p_p1:.4g} / {summary.delta_p_p99:.4g}"
    yield _Metric("probability change of the right token, p1 / p99", span)
    for bucket in summary.buckets:
        if bucket.num_tokens:
            name = f"KL where the reference's largest p is in [{bucket.low:g}, {bucket.high:g}{_end(bucket.high)}"
            yield _Metric(name, f"{bucket.kl_mean:.4g} nats, {bucket.num_tokens} tokens")
    yield _Metric("logit difference, max", f"{summary.logit_max_abs:.4g}")
    yield _Metric("logit difference, RMS", f"{summary.logit_rms:.4g}")


def _end(high: float) -> str:
    return "]" if high == 1 else ")"


def _mean(name: str, estimate: "Estimate", unit: str = "") -> _Metric:
    """Return mean +- block error, with the naive one beside it, and the interval."""
    value = f"{estimate.mean:.6g}"
    if estimate.se is not None:
        naive = "" if estimate.se_block is None else f" (naive {estimate.se_naive:.2g})"
        value += f" +- {estimate.se:.2g}{naive}"
    return _Metric(name, value + unit, interval(estimate.ci95))


def interval(ci95: tuple[float, float] | None) -> str:
    """Return a confidence interval in words, nothing where there is none."""
    return "" if ci95 is None else f"{ci95[0]:.4g} to {ci95[1]:.4g}"
