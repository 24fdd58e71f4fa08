"""The heat map of weight errors by expert."""

import math
from collections.abc import Collection
from typing import TYPE_CHECKING

from converters.errors import InputError
from converters.schema import parse
from runtime.verify.report_html import heat
from runtime.verify.report_html.heat import Map, log_ramp
from runtime.verify.report_html.layers import Chart
from runtime.verify.report_html.words import figure

if TYPE_CHECKING:
    from converters.quant.certificate import Certificate


def weights_chart(weights: "Certificate", mtp_layers: Collection[int]) -> Chart | None:
    """Return the largest relative error of each routed expert's tensors; None where no expert has any error."""
    errors: dict[int, dict[int, float]] = {}
    for figures in weights.tensors:
        place = _place(figures.tensor)
        if place is not None:
            row = errors.setdefault(place[0], {})
            row[place[1]] = _larger(row.get(place[1], 0.0), figures.relative_error)
    if not any(error for row in errors.values() for error in row.values()):
        return None
    layers = sorted(errors)
    num_experts = max(max(row) for row in errors.values()) + 1
    rows = tuple(tuple(errors[layer].get(expert) for expert in range(num_experts)) for layer in layers)
    heading = "Weight error of experts"
    note = "largest relative error of the tensors of each expert"
    drawn = Map(
        title=f"{heading}, layers by experts: {note}",
        layers=tuple(layers),
        num_mtp=sum(layer in mtp_layers for layer in layers),
        rows=rows,
        ramp=log_ramp([cell for row in rows for cell in row]),
        tooltip=(lambda r, c: f"layer {layers[r]}, expert {c}: {figure(rows[r][c])}")
        if len(layers) * num_experts <= heat.MOST_TITLED
        else None,
        row_tooltips=tuple(_row_words(layer, errors[layer]) for layer in layers),
    )
    return Chart(heading, note, heat.draw(drawn))


def _place(tensor: str) -> tuple[int, int] | None:
    """Return layer and expert of a routed expert's tensor; None for any other, known or not."""
    try:
        parsed = parse(tensor)
    except InputError:
        return None
    return None if parsed.layer is None or parsed.expert is None else (parsed.layer, parsed.expert)


def _larger(error: float, other: float) -> float:
    return math.nan if math.isnan(error) or math.isnan(other) else max(error, other)


def _row_words(layer: int, row: dict[int, float]) -> str:
    worst = max(row, key=lambda expert: math.inf if math.isnan(row[expert]) else row[expert])
    return f"layer {layer}: largest {figure(row[worst])} (expert {worst})"
