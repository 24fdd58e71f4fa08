"""The few figures that a reader wants at once, the checks, and where it all comes from."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from runtime.verify.check import Check, severity, worst
from runtime.verify.report import VerifyReport
from runtime.verify.report_html.words import duration, figure, grouped, percent, size, with_error
from runtime.verify.results import LayerDifference
from runtime.verify.siblings import layer_name, mlp_name
from runtime.verify.summary import LogitSummary

# names of values in bytes
_SIZE = re.compile(r"\b(?:memory|bytes)\b")
# metrics whose worst verdict is that of the worst layer
_LAYER_CHECKS = ("attention error, worst layer", "MLP and MoE error, worst layer")


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure: its name, its value, what it is made of; verdict is that of its check, empty where there is none."""

    name: str
    value: str
    words: str
    verdict: str = ""


def tiles(report: VerifyReport) -> Iterator[Tile]:
    """Yield the figures of the levels that were run."""
    verdicts = {check.metric: str(check.verdict) for check in report.checks}
    models, weights = report.levels.layers, report.levels.weights
    if weights is not None:
        wrong = sum(1 for figures in weights.tensors if figures.outside or figures.wrong_scales)
        words = f"of {grouped(len(weights.tensors))}, compared element by element"
        yield Tile("Tensors that are wrong", grouped(wrong), words, verdicts.get("weights", ""))
    if models is not None and models.layers:
        yield from _layer_tiles(models.layers, report)
    if models is not None and models.summary is not None:
        floor = None if models.floor is None else models.floor.kl_mean
        yield from _logit_tiles(models.summary, floor, verdicts)


def _layer_tiles(layers: Sequence[LayerDifference], report: VerifyReport) -> Iterator[Tile]:
    halves = [
        (layer, part, error)
        for layer in layers
        for part, error in (("attention", layer.attention), (mlp_name(layer), layer.mlp))
    ]
    layer, part, error = max(halves, key=lambda half: severity(half[2].relative))
    place = f"{layer_name(layer)} {part}" if error.relative else "all layers equal"
    verdicts = [check.verdict for check in report.checks if check.metric in _LAYER_CHECKS]
    yield Tile("Worst layer error", percent(error.relative), place, worst(verdicts) if verdicts else "")
    routers = [layer.router for layer in layers if layer.router is not None]
    if routers:
        unexplained = sum(router.unexplained for router in routers)
        words = f"tokens sent elsewhere at a wide margin, {len(routers)} routers"
        yield Tile("Unexplained routing", grouped(unexplained), words, "fail" if unexplained else "pass")


def _logit_tiles(summary: LogitSummary, floor: float | None, verdicts: Mapping[str, str]) -> Iterator[Tile]:
    kl, top1, perplexity = summary.kl_nats.estimate, summary.top1, summary.perplexity
    words = f"nats a token{_error(figure(kl.se, 2), kl.se)}"
    words += "" if floor is None else f"; noise floor {figure(floor)}"
    yield Tile("Mean KL", figure(kl.mean), words, verdicts.get("KL mean", ""))
    words = f"same first choice{_error(percent(top1.se), top1.se)}, {grouped(summary.num_tokens)} tokens"
    yield Tile("Top-1 agreement", percent(top1.mean), words, verdicts.get("top-1 agreement", ""))
    sides = f"{figure(perplexity.reference, 5)} \u2192 {figure(perplexity.candidate, 5)}"
    words = f"{sides}{_error(figure(perplexity.ratio_se, 2), perplexity.ratio_se)}"
    yield Tile("Perplexity ratio", figure(perplexity.ratio, 5), words, verdicts.get("perplexity ratio", ""))


def _error(words: str, se: float | None) -> str:
    return "" if se is None else f", \u00b1\u00a0{words}"


def check_row(check: Check) -> dict[str, str]:
    """Return the cells of a check."""
    limit = "expected 0"
    if check.bound is not None:
        bars = dict.fromkeys((figure(check.bound.warn, 4), figure(check.bound.fail, 4)))
        limit = f"{'below' if check.at_least else 'above'} {' / '.join(bars)}"
    value = "nothing to measure" if check.value is None else f"{with_error(check.value, check.se)} {check.unit}".strip()
    notes = [check.place] if check.place else []
    if check.indistinguishable:
        notes.append("indistinguishable from rounding")
    return {
        "metric": check.metric,
        "place": ", ".join(notes),
        "value": value,
        "interval": "" if check.ci95 is None else f"{figure(check.ci95[0], 4)} to {figure(check.ci95[1], 4)}",
        "floor": "" if check.floor is None else figure(check.floor),
        "limit": limit,
        "verdict": check.verdict,
    }


def provenance(report: VerifyReport) -> Iterator[tuple[str, str]]:
    """Yield names and values of what was compared, how, and at what cost."""
    models = report.levels.layers
    yield "source", report.source
    yield "candidate", report.candidate
    yield "kind of conversion", report.scheme
    if models is not None:
        yield "protocol", models.protocol
        yield "compute", f"{models.dtype} on {models.device}, activations {models.activations}"
        for note in models.notes:
            yield "note", note
        if models.spent is not None:
            spent = models.spent
            yield "time", f"{duration(spent.seconds)}, {duration(spent.seconds_waiting)} of it waiting for reads"
            yield "read", size(spent.bytes_read)
            yield "planned peak of memory", size(spent.planned_peak_bytes)
    yield from _flat("", report.provenance)


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yield names and words of nested mappings and dataclasses."""
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if not isinstance(value, Mapping):
        is_size = isinstance(value, int) and not isinstance(value, bool) and _SIZE.search(prefix) is not None
        yield prefix, size(value) if is_size else _words(value)
        return
    for name, item in value.items():
        yield from _flat(f"{prefix} {name}".strip().replace("_", " "), item)


def _words(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return figure(value, 6)
    if isinstance(value, list | tuple):
        return ", ".join(map(_words, value)) or "none"
    return str(value)
