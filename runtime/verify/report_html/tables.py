"""Tables of the report: each chart's figures once more as text, and what only a table can say."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from runtime.verify.report_html.words import figure, grouped, percent
from runtime.verify.results import ExpertDifference, LayerDifference, OutputError

if TYPE_CHECKING:
    from converters.quant.certificate import Certificate
    from runtime.verify.siblings import Outlier

# what a page shows of long lists; the files beside it have all
MOST_FINDINGS = 50
MOST_TENSORS = 20
MOST_EXPERTS = 20
MOST_OUTLIERS = 20


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under a caption; columns whose name ends in `#` hold numbers and are set to the right."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    @property
    def heads(self) -> list[tuple[str, bool]]:
        """Names of the columns, and whether they hold numbers."""
        return [(name.rstrip("#"), name.endswith("#")) for name in self.columns]


def layer_name(layer: LayerDifference) -> str:
    """Return the index of a layer, marked where it is the MTP layer."""
    return f"{layer.layer} (MTP)" if layer.is_mtp else str(layer.layer)


def layers_table(layers: Sequence[LayerDifference]) -> Table:
    """Return every layer's errors, one row a layer."""
    columns = ["layer"]
    for part in ("attention", "norm before the MLP", "MLP", "residual"):
        columns += [f"{part} error#", "floor#", "worst token#", "SQNR dB#", "slope#"]
    rows = []
    for layer in layers:
        parts = (layer.attention, layer.mlp_norm, layer.mlp, layer.residual)
        rows.append((layer_name(layer), *(cell for part in parts for cell in _output_cells(part))))
    return Table("Errors of every layer", tuple(columns), tuple(rows))


def _output_cells(error: OutputError | None) -> tuple[str, ...]:
    if error is None:
        return (figure(None),) * 5
    return (
        figure(error.relative),
        figure(error.floor_relative),
        f"{figure(error.worst_token_relative)} at {error.worst_token}",
        figure(error.sqnr_db),
        figure(error.slope, 5),
    )


def routers_table(layers: Sequence[LayerDifference]) -> Table:
    """Return every router's decisions, one row an MoE layer."""
    columns = (
        "layer", "changed#", "unexplained#", "margin limit#", "worst margin#", "at token#", "expert overlap#",
        "weight moved#", "floor#", "load shift#", "logit change, max#", "changed, free-running#",
        "load shift, free-running#",
    )  # fmt: skip
    rows = []
    for layer in layers:
        router, own = layer.router, layer.router_own
        if router is None:
            continue
        rows.append(
            (
                layer_name(layer),
                percent(router.changed),
                grouped(router.unexplained),
                figure(router.margin_limit),
                figure(router.worst_margin),
                figure(None) if router.worst_token is None else str(router.worst_token),
                percent(router.overlap),
                percent(router.weight_moved),
                percent(router.weight_moved_floor),
                percent(router.load_shift),
                figure(router.logit_max_abs),
                percent(own.changed if own else None),
                percent(own.load_shift if own else None),
            )
        )
    return Table("Routers of every MoE layer", columns, tuple(rows))


def experts_table(layers: Sequence[LayerDifference]) -> Table:
    """Return the experts with the largest errors, the worst first."""
    found: list[tuple[LayerDifference, ExpertDifference]] = [
        (layer, expert) for layer in layers for expert in layer.experts if expert.relative
    ]
    # NaN sorts before every number
    found.sort(key=lambda pair: (pair[1].relative == pair[1].relative, -(pair[1].relative or 0.0)))
    rows = tuple(
        (
            layer_name(layer),
            str(expert.expert),
            figure(expert.relative),
            figure(expert.slope, 5),
            grouped(expert.num_tokens),
            grouped(expert.num_tokens_candidate),
        )
        for layer, expert in islice(found, MOST_EXPERTS)
    )
    columns = ("layer", "expert#", "error#", "slope#", "tokens#", "tokens, candidate#")
    return Table("Experts with the largest errors", columns, rows)


def outliers_table(outliers: "Sequence[Outlier]") -> Table:
    """Return what is far above its siblings, the worst first."""
    rows = tuple(
        (outlier.subject, figure(outlier.value), figure(outlier.median), figure(outlier.z))
        for outlier in outliers[:MOST_OUTLIERS]
    )
    return Table("Out of line with their siblings", ("what", "error#", "median of its siblings#", "robust z#"), rows)


def tensors_table(weights: "Certificate") -> Table:
    """Return the tensors that are wrong, then those with the largest errors."""
    wrong = [figures for figures in weights.tensors if figures.outside or figures.wrong_scales]
    seen = {figures.tensor for figures in wrong}
    rows = tuple(
        (
            figures.tensor,
            figures.scheme,
            str(figures.relation),
            f"{grouped(figures.outside)} of {grouped(figures.elements)}",
            figure(figures.relative_error),
            figure(figures.sqnr_db),
            figure(figures.slope, 5),
            percent(figures.clipped),
        )
        for figures in islice((*wrong, *(f for f in weights.worst if f.tensor not in seen)), MOST_TENSORS)
    )
    columns = ("tensor", "stored as", "must be", "elements outside#", "error#", "SQNR dB#", "slope#", "clipped#")
    return Table("Tensors that are wrong, then those with the largest errors", columns, rows)


def schemes_table(weights: "Certificate") -> Table:
    """Return one row for all tensors that are stored alike."""
    rows = tuple(
        (
            summary.scheme,
            str(summary.relation),
            grouped(summary.tensors),
            grouped(summary.elements),
            figure(summary.mean_relative_error),
            figure(summary.largest_relative_error),
            percent(summary.clipped),
        )
        for summary in weights.summaries
    )
    columns = ("stored as", "must be", "tensors#", "elements#", "mean error#", "largest error#", "clipped#")
    return Table("Tensors by how they are stored", columns, rows)


def plain_table(caption: str, columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Table:
    """Return a table of ready-made rows."""
    return Table(caption, tuple(columns), tuple(tuple(map(str, row)) for row in rows))
