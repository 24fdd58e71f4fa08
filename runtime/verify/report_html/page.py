"""The page: what a report says, put into the template."""

from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from runtime.verify.check import Verdict
from runtime.verify.report import VerifyReport
from runtime.verify.report_html import colours
from runtime.verify.report_html.further import engine_table, text_section
from runtime.verify.report_html.sections import layers_section, mtp_words, predictions
from runtime.verify.report_html.tables import (
    MOST_FINDINGS,
    outliers_table,
    plain_table,
    schemes_table,
    tensors_table,
)
from runtime.verify.report_html.tiles import check_row, provenance, tiles
from runtime.verify.report_html.weights import weights_chart
from runtime.verify.report_html.words import Decode, main_reasons, visible
from runtime.verify.results import ModelComparison
from runtime.verify.tables import FINDING_COLUMNS, ROUTING_COLUMNS, finding_rows, routing_rows

MOST_REASONS = 12
_SYMBOLS = {Verdict.PASS: "\u2713", Verdict.WARN: "!", Verdict.FAIL: "\u2717"}


def render_page(report: VerifyReport, decode: Decode | None = None) -> str:
    """Return the report as HTML; equal reports give equal text.

    Args:
        report: what was found.
        decode: token ids to text, for the tokens that changed most; without it their ids are shown.
    """
    from jinja2 import Environment, StrictUndefined

    folder = files(__package__)
    environment = Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined, finalize=_finalize
    )
    template = environment.from_string((folder / "page.html").read_text(encoding="utf-8"))
    return template.render(_context(report, decode), style=_style((folder / "style.css").read_text(encoding="utf-8")))


def _finalize(value: object) -> object:
    """Make what is printed visible; drawings were made so when they were built."""
    return value if hasattr(value, "__html__") else visible(str(value))


def _style(text: str) -> str:
    scales = {"@LIGHT@": colours.variables(dark=False), "@DARK@": colours.variables(dark=True)}
    for mark, words in {**scales, "@CLASSES@": colours.classes()}.items():
        text = text.replace(mark, words)
    return text.strip()


def _context(report: VerifyReport, decode: Decode | None) -> dict[str, Any]:
    levels = report.levels
    models, weights = levels.layers, levels.weights
    context: dict[str, Any] = {
        "report": report,
        "symbols": _SYMBOLS,
        "reasons": main_reasons(report, MOST_REASONS),
        "source_name": PurePath(report.source).name or report.source,
        "candidate_name": PurePath(report.candidate).name or report.candidate,
        "sentence": report.headline.removeprefix(f"{report.verdict.upper()}: "),
        "tiles": list(tiles(report)),
        "checks": list(map(check_row, report.checks)),
        "outliers": outliers_table(report.outliers),
        "logits": models and predictions(report, models, decode),
        "layers": layers_section(report, models.layers) if models and models.layers else None,
        "routing": plain_table("Routing against the stored reference", ROUTING_COLUMNS, routing_rows(levels.routing)),
        "mtp": mtp_words(models.mtp) if models and models.mtp else None,
        "weights": weights
        and {
            "schemes": schemes_table(weights),
            "heat": weights_chart(weights, _mtp_layers(models)),
            "tensors": tensors_table(weights),
        },
        "text": text_section(levels.text) if levels.text else None,
        "engine": engine_table(levels.runtime) if levels.runtime else None,
        "findings": plain_table("Findings", FINDING_COLUMNS, finding_rows(report)[:MOST_FINDINGS]),
        "num_more_findings": max(0, len(report.findings) - MOST_FINDINGS),
        "provenance": list(provenance(report)),
    }
    return {**context, "contents": list(_contents(context))}


def _mtp_layers(models: ModelComparison | None) -> frozenset[int]:
    return frozenset(layer.layer for layer in models.layers if layer.is_mtp) if models else frozenset()


def _contents(context: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield anchors and names of the sections that are there."""
    layers = context["layers"]
    there = {
        ("causes", "Causes"): context["report"].causes,
        ("checks", "Checks"): True,
        ("logits", "Predictions"): context["logits"],
        ("layers", "Layers"): layers,
        ("experts", "Experts"): layers and layers["experts"],
        ("routing", "Routing"): context["routing"].rows,
        ("mtp", "MTP layer"): context["mtp"],
        ("weights", "Weights"): context["weights"],
        ("text", "Generated text"): context["text"],
        ("engine", "Serving engine"): context["engine"],
        ("findings", "Findings"): context["findings"].rows,
        ("provenance", "Provenance"): True,
    }
    return (section for section, is_there in there.items() if is_there)
