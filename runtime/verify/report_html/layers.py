"""The charts of layers, routers and experts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.verify.limits import Bound, Limits
from runtime.verify.report_html import curves, heat
from runtime.verify.report_html.curves import Curve, Panel
from runtime.verify.report_html.heat import Map, log_ramp, share_ramp
from runtime.verify.report_html.words import figure, grouped, percent
from runtime.verify.results import ExpertDifference, LayerDifference, OutputError
from runtime.verify.siblings import expert_name, layer_name


@dataclass(frozen=True, slots=True)
class Chart:
    """A drawing with its heading, what it shows, and its legend as (class, words); no drawing where nothing differs."""

    heading: str
    note: str
    svg: str
    key: tuple[tuple[str, str], ...] = ()


def error_charts(layers: Sequence[LayerDifference], limits: Limits | None, first_off: int | None) -> list[Chart]:
    """Return the curves of attention, norm, MLP and residual errors.

    Args:
        layers: all layers, MTP layers last.
        limits: of the errors, None where there are none.
        first_off: layer to be marked.
    """
    forced = "on the reference's input and routing: each layer answers for itself"
    limit, of_norm = (None, None) if limits is None else (limits.max_layer_error, limits.max_norm_error)
    parts: list[tuple[str, str, Callable[[LayerDifference], OutputError | None], Bound | None]] = [
        ("Attention output", forced, lambda layer: layer.attention, limit),
        ("Norm before the MLP", forced, lambda layer: layer.mlp_norm, of_norm),
        ("MLP and MoE output", forced, lambda layer: layer.mlp, limit),
        ("Residual stream", "the candidate on its own states: errors add up", lambda layer: layer.residual, None),
    ]
    return [_error_chart(layers, *part, first_off) for part in parts if all(map(part[2], layers))]


def _error_chart(
    layers: Sequence[LayerDifference],
    heading: str,
    note: str,
    part: Callable[[LayerDifference], OutputError | None],
    limit: Bound | None,
    first_off: int | None,
) -> Chart:
    errors = [error for layer in layers if (error := part(layer)) is not None]
    if not any(error.relative for error in errors):
        return Chart(heading, "equal in every layer", "")
    floors = tuple(error.floor_relative for error in errors)
    noise = Curve("noise floor", "s-floor", floors)
    panel = Panel(
        title=f"{heading}: relative error by layer",
        layers=tuple(layer.layer for layer in layers),
        num_mtp=sum(layer.is_mtp for layer in layers),
        curves=(
            *_limits(limit, floors),
            *([noise] if any(floor is not None for floor in floors) else []),
            Curve("worst token", "s-worst", tuple(error.worst_token_relative for error in errors)),
            Curve("relative error", "s-error", tuple(error.relative for error in errors), has_points=True),
        ),
        tooltips=tuple(
            f"{layer_name(layer)}: error {figure(error.relative)}, worst token "
            f"{figure(error.worst_token_relative)} at {error.worst_token}, floor {figure(error.floor_relative)}, "
            f"SQNR {figure(error.sqnr_db)} dB, slope {figure(error.slope, 5)}"
            for layer, error in zip(layers, errors, strict=True)
        ),
        marked=first_off,
    )
    return Chart(heading, note, curves.draw(panel), tuple(curves.key(panel)))


def _limits(limit: Bound | None, floors: Sequence[float | None]) -> tuple[Curve, ...]:
    """Return the curves of a limit, which a high floor may lift; none for a limit of 0, which has no place here."""
    if limit is None or not limit.fail:
        return ()
    bounds = [limit.over(floor) for floor in floors]
    curves_by_look = {
        ("s-warn", "warns above"): tuple(bound.warn for bound in bounds),
        ("s-fail", "fails above"): tuple(bound.fail for bound in bounds),
    }
    found = []
    for (look, name), values in curves_by_look.items():
        low, high = min(values), max(values)
        span = figure(low) if low == high else f"{figure(low)} to {figure(high)}"
        found.append(Curve(f"{name} {span}", look, values))
    return tuple(found[1:] if limit.warn == limit.fail else found)


def router_chart(layers: Sequence[LayerDifference]) -> Chart | None:
    """Return the share of tokens whose experts changed, by layer; None without an MoE layer."""
    if all(layer.router is None for layer in layers):
        return None
    forced = tuple(layer.router.changed if layer.router else None for layer in layers)
    own = tuple(layer.router_own.changed if layer.router_own else None for layer in layers)
    shift = tuple(layer.router_own.load_shift if layer.router_own else None for layer in layers)
    if not any(value for value in (*forced, *own, *shift)):
        return Chart("Routing by layer", "no token is sent to other experts", "")
    panel = Panel(
        title="Share of tokens that are sent to other experts, by layer",
        layers=tuple(layer.layer for layer in layers),
        num_mtp=sum(layer.is_mtp for layer in layers),
        curves=(
            Curve("load shift, own states", "s-worst", shift),
            Curve("tokens changed, own states", "s-own", own, has_points=True),
            Curve("tokens changed, reference's states", "s-error", forced, has_points=True),
        ),
        tooltips=tuple(map(_router_words, layers)),
    )
    note = "share of tokens with another set of experts; a 0 at the bottom stands for none"
    return Chart("Routing by layer", note, curves.draw(panel), tuple(curves.key(panel)))


def _router_words(layer: LayerDifference) -> str:
    if layer.router is None:
        return f"{layer_name(layer)}: dense"
    words = f"{layer_name(layer)}: {percent(layer.router.changed)} changed, {layer.router.unexplained} unexplained"
    if layer.router_own is not None:
        words += f"; own states: {percent(layer.router_own.changed)}, load shift {percent(layer.router_own.load_shift)}"
    return words


def expert_charts(layers: Sequence[LayerDifference], outlined: Sequence[tuple[int, int]]) -> list[Chart]:
    """Return the heat maps of experts: error, load, and change of load.

    Args:
        layers: all layers; dense ones are left out.
        outlined: (layer, expert) that are out of line.
    """
    kept = [layer for layer in layers if layer.experts]
    if not kept:
        return []
    num_cells = sum(len(layer.experts) for layer in kept)
    rows = {layer.layer: row for row, layer in enumerate(kept)}
    marks = tuple((rows[layer], expert) for layer, expert in outlined if layer in rows)
    specs = (
        ("Error of experts", "relative error of each expert on the tokens that the reference sends it", _error),
        ("Load of experts", "tokens that the reference sends each expert", _load),
        ("Change of load", "tokens more or fewer in the candidate's own run, by the mean load of the layer", None),
    )
    charts = []
    for index, (heading, note, value) in enumerate(specs):
        values = tuple(tuple(map(value, layer.experts)) if value else tuple(_changes(layer.experts)) for layer in kept)
        flat = [cell for row in values for cell in row]
        if not any(flat):
            charts.append(Chart(heading, "0 for every expert", ""))
            continue
        drawn = Map(
            title=f"{heading}, layers by experts: {note}",
            layers=tuple(layer.layer for layer in kept),
            num_mtp=sum(layer.is_mtp for layer in kept),
            rows=values,
            ramp=log_ramp(flat) if value else share_ramp(flat),
            tooltip=(lambda r, c: _expert_words(kept[r], kept[r].experts[c]))
            if index == 0 or num_cells <= heat.MOST_TITLED
            else None,
            row_tooltips=tuple(map(_row_words, kept)),
            outlined=marks if index == 0 else (),
        )
        charts.append(Chart(heading, note, heat.draw(drawn)))
    return charts


def _error(expert: ExpertDifference) -> float | None:
    return expert.relative


def _load(expert: ExpertDifference) -> float | None:
    return float(expert.num_tokens)


def _changes(experts: Sequence[ExpertDifference]) -> list[float | None]:
    mean = sum(expert.num_tokens for expert in experts) / len(experts)
    if not mean:
        return [None] * len(experts)
    return [(expert.num_tokens_candidate - expert.num_tokens) / mean for expert in experts]


def _expert_words(layer: LayerDifference, expert: ExpertDifference) -> str:
    loads = f"{expert.num_tokens} tokens, candidate {expert.num_tokens_candidate}"
    return f"{expert_name(layer, expert.expert)}: {figure(expert.relative)}; {loads}"


def _row_words(layer: LayerDifference) -> str:
    loads = [expert.num_tokens for expert in layer.experts]
    mean = sum(loads) / len(loads)
    few = sum(load < 0.1 * mean for load in loads)
    busiest = max(range(len(loads)), key=loads.__getitem__)
    shift = "" if layer.router_own is None else f", load shift {percent(layer.router_own.load_shift)}"
    return (
        f"{layer_name(layer)}: {grouped(sum(loads))} assignments, mean {figure(mean)} an expert, "
        f"most {loads[busiest]} (expert {layer.experts[busiest].expert}), {few} experts below 10 % of it{shift}"
    )
