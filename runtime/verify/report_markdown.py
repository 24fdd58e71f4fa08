"""The report on one screen of Markdown, with the statistics block that readers know from llama.cpp."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import TYPE_CHECKING

from runtime.verify.report import Check, VerifyReport
from runtime.verify.report_html.words import main_reasons, visible

if TYPE_CHECKING:
    import torch

    from runtime.verify.metrics import TokenScores
    from runtime.verify.results import ModelComparison

MOST_REASONS = 8
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$])")
# percentiles of the block, most first
_KL_SHARES = (0.999, 0.99, 0.95, 0.9)
_DELTA_SHARES = (0.999, 0.99, 0.95, 0.9, 0.75)


def render_markdown(report: VerifyReport) -> str:
    """Return the report as Markdown: verdict, causes, reasons, checks, statistics, what was not checked, provenance."""
    return "\n".join(_lines(report)).rstrip("\n") + "\n"


def escape(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _SPECIAL.sub(r"\\\1", visible(text))


def _lines(report: VerifyReport) -> Iterator[str]:
    names = [escape(PurePath(folder).name or folder) for folder in (report.candidate, report.source)]
    yield f"# {report.verdict.upper()}: {names[0]} against {names[1]}"
    yield ""
    yield escape(report.headline)
    yield from _list("Causes", [f"{cause}; {cause.remedy}" for cause in report.causes])
    yield from _list("Reasons", main_reasons(report, MOST_REASONS), len(report.reasons))
    yield from ("", "| metric | value | 95 % interval | floor | limit | verdict |", "|---|--:|--:|--:|--:|---|")
    yield from map(_check_line, report.checks)
    models = report.levels.layers
    if models is not None:
        yield from ("", f"Protocol: {escape(models.protocol)}; computed in {models.dtype} on {models.device}.")
        yield from _statistics(models)
    yield from _list("Not checked", report.not_checked)


def _list(heading: str, items: Sequence[str], count: int | None = None) -> Iterator[str]:
    """Yield the first items of a list that has `count` of them."""
    if not items:
        return
    shown = items[:MOST_REASONS]
    more = (len(items) if count is None else count) - len(shown)
    yield from ("", f"**{heading}**", "")
    yield from (f"- {escape(item)}" for item in shown)
    if more:
        yield f"- and {more} more"


def _check_line(check: Check) -> str:
    interval = "" if check.ci95 is None else f"{check.ci95[0]:.4g} to {check.ci95[1]:.4g}"
    floor = "" if check.floor is None else f"{check.floor:.3g}"
    cells = (check.metric, check.found, interval, floor, check.expected, str(check.verdict))
    return f"| {' | '.join(map(escape, cells))} |"


def _statistics(models: "ModelComparison") -> Iterator[str]:
    """Yield llama.cpp's block; its errors are the naive ones over tokens, as that program prints them."""
    if models.tokens is None:
        return
    scores = models.tokens.scores.select(models.tokens.scores.finite)
    if len(scores) < 2:
        return
    yield from ("", "```text")
    yield from _perplexity_lines(scores)
    yield from _kl_lines(scores)
    yield from _probability_lines(scores)
    yield "```"


def _mean(values_T: "torch.Tensor") -> tuple[float, float]:
    """Return the mean and s / sqrt(n)."""
    return values_T.mean().item(), values_T.std(correction=1).item() / math.sqrt(values_T.numel())


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def _perplexity_lines(scores: "TokenScores") -> Iterator[str]:
    import torch

    (ours, ours_se), (theirs, theirs_se) = _mean(scores.nll_reference), _mean(scores.nll_candidate)
    ln_ratio, ln_ratio_se = _mean(scores.nll_candidate - scores.nll_reference)
    both = torch.stack((scores.nll_reference, scores.nll_candidate))
    base, other, ratio = _exp(ours), _exp(theirs), _exp(ln_ratio)
    covariance = torch.cov(both)[0, 1].item() / len(scores)
    correlation = covariance / (ours_se * theirs_se) if ours_se * theirs_se else math.nan
    variance = (other * theirs_se) ** 2 + (base * ours_se) ** 2 - 2 * other * base * covariance
    yield "====== Perplexity statistics ======"
    yield f"Mean PPL(Q)                   : {other:10.6f} \u00b1 {other * theirs_se:10.6f}"
    yield f"Mean PPL(base)                : {base:10.6f} \u00b1 {base * ours_se:10.6f}"
    yield f"Cor(ln(PPL(Q)), ln(PPL(base))): {100 * correlation:6.2f}%"
    yield f"Mean ln(PPL(Q)/PPL(base))     : {ln_ratio:10.6f} \u00b1 {ln_ratio_se:10.6f}"
    yield f"Mean PPL(Q)/PPL(base)         : {ratio:10.6f} \u00b1 {ratio * ln_ratio_se:10.6f}"
    yield f"Mean PPL(Q)-PPL(base)         : {other - base:10.6f} \u00b1 {math.sqrt(max(0.0, variance)):10.6f}"


def _kl_lines(scores: "TokenScores") -> Iterator[str]:
    from runtime.verify.summary import percentiles

    mean, error = _mean(scores.kl_nats)
    shares = (*_KL_SHARES, 0.5, *(1 - share for share in reversed(_KL_SHARES)))
    names = (
        *(f"{share:5.1%}  " for share in _KL_SHARES),
        "Median ",
        *(f"{1 - s:5.1%}  " for s in reversed(_KL_SHARES)),
    )
    yield ""
    yield "====== KL divergence statistics ======"
    yield f"Mean    KLD: {mean:10.6f} \u00b1 {error:10.6f}"
    yield f"Maximum KLD: {scores.kl_nats.max().item():10.6f}"
    for name, value in zip(names, percentiles(scores.kl_nats, shares), strict=True):
        yield f"{name} KLD: {value:10.6f}"
    yield f"Minimum KLD: {scores.kl_nats.min().item():10.6f}"


def _probability_lines(scores: "TokenScores") -> Iterator[str]:
    from runtime.verify.summary import percentiles

    change = 100 * scores.delta_p
    mean, error = _mean(change)
    square, square_error = _mean(change.square())
    rms = math.sqrt(square)
    shares = (*_DELTA_SHARES, 0.5, *(1 - share for share in reversed(_DELTA_SHARES)))
    same = scores.top1_same.mean().item()
    yield ""
    yield "====== Token probability statistics ======"
    yield f"Mean    \u0394p: {mean:6.3f} \u00b1 {error:5.3f} %"
    yield f"Maximum \u0394p: {change.max().item():6.3f}%"
    for share, value in zip(shares, percentiles(change, shares), strict=True):
        name = "Median " if share == 0.5 else f"{share:5.1%}  "
        yield f"{name} \u0394p: {value:6.3f}%"
    yield f"Minimum \u0394p: {change.min().item():6.3f}%"
    yield f"RMS \u0394p    : {rms:6.3f} \u00b1 {square_error / (2 * rms) if rms else 0.0:5.3f} %"
    yield f"Same top p: {100 * same:6.3f} \u00b1 {100 * math.sqrt(same * (1 - same) / (len(scores) - 1)):5.3f} %"
