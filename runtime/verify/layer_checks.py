"""What running both models layer by layer found, held against the limits: layers, experts, routers.

Each check stands for all layers and names the worst; every layer or expert beyond its limit is a reason of its own, in
the order in which the model runs them, so that the first one names where the error begins.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from runtime.verify.check import Check, Judged, Verdict, counted, judge, severity, worst
from runtime.verify.limits import Bound, Limits
from runtime.verify.siblings import ATTENTION, MLP_NAMES, NORM, layer_name, mlp_name

if TYPE_CHECKING:
    from runtime.verify.results import (
        ExpertDifference,
        LayerDifference,
        ModelComparison,
        OutputError,
    )

ROUTER = "router"
_ERRORS = {
    "attention error, worst layer": (ATTENTION,),
    "norm before the MLP, worst layer": (NORM,),
    "MLP and MoE error, worst layer": MLP_NAMES,
}


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of one part of a layer, or of one expert."""

    layer: str
    part: str
    value: float
    bound: Bound
    floor: float | None = None
    note: str = ""

    @property
    def place(self) -> str:
        return f"{self.layer} {self.part}"

    @property
    def verdict(self) -> Verdict:
        return judge(self.value, self.bound)


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first part of a layer whose own error is out of its band: a half or its slope, norm, router or expert."""

    layer: int
    part: str
    relative: float
    limit: float


def first_divergence(layers: "Sequence[LayerDifference]", limits: Limits) -> Divergence | None:
    """Return the first part of a layer, in the order of execution, whose error on the reference's input is beyond warn.

    The error of each part is its own, since it is fed the reference's input: what comes later is not its consequence.
    """
    for found in layers:
        for value in _in_order(found, limits):
            if not value.value <= value.bound.warn:
                return Divergence(found.layer, value.part, value.value, value.bound.warn)
    return None


def is_wrong(found: "LayerDifference", limits: Limits) -> bool:
    """Return whether anything of a layer fails."""
    verdicts = [value.verdict for value in _in_order(found, limits)]
    flips = found.router is not None and found.router.unexplained > 0
    return worst(verdicts) is Verdict.FAIL or flips or found.first_non_finite is not None


def judge_layers(found: "ModelComparison", limits: Limits) -> Iterator[Judged]:
    """Yield the checks of the layers level, in the order of execution; nothing where layers were not asked for."""
    if not found.layers:
        return
    yield from _finite_layers(found.layers)
    if found.ends is not None:
        yield _end("embedding", found.ends.embedding, limits.max_norm_error)
    parts = [value for layer in found.layers for value in _parts(layer, limits)]
    for metric, names in _ERRORS.items():
        chosen = [value for value in parts if value.part in names]
        if chosen:
            yield _extreme(metric, "relative error", chosen)
    slopes = [_slope_value(layer, *half, limits) for layer in found.layers for half in _halves(layer)]
    yield _extreme("slope, furthest from 1", "|slope - 1|", slopes)
    experts = [
        _expert_value(layer, expert, limits)
        for layer in found.layers
        for expert in layer.experts
        if expert.relative is not None
    ]
    if experts:
        yield _extreme("expert error, worst expert", "relative error", experts)
    if any(layer.router is not None for layer in found.layers):
        yield _routers(found.layers)
        moved = [value for value in parts if value.part == ROUTER]
        yield _extreme("routing weight moved, worst layer", "share of the routing weight moved", moved)
    if found.ends is not None:
        yield _end("final norm", found.ends.final_norm, limits.max_norm_error)
        if found.ends.mtp_norm is not None:
            yield _end("norm behind the MTP layer", found.ends.mtp_norm, limits.max_norm_error)
        yield _end("head", found.ends.head, limits.max_layer_error)


def _end(name: str, error: "OutputError", bound: Bound) -> Judged:
    """Return the check of what lies in front of the layers or behind them."""
    verdict = judge(error.relative, bound)
    check = Check(f"{name}, relative error", error.relative, "", verdict, bound=bound)
    if verdict is Verdict.PASS:
        return Judged(check)
    limit = bound.fail if verdict is Verdict.FAIL else bound.warn
    where = f"{error.worst_token_relative:.4g} at token {error.worst_token}"
    words = f"{name}: relative error {error.relative:.4g}, {where}, expected <= {limit:.4g}"
    return Judged(check, ((verdict, words),))


def _halves(found: "LayerDifference") -> "tuple[tuple[str, OutputError], ...]":
    return (ATTENTION, found.attention), (mlp_name(found), found.mlp)


def _parts(found: "LayerDifference", limits: Limits) -> list[_Value]:
    """Return the errors of a layer's parts in the order of execution; each is fed what the reference's was."""
    first, second = (_error_value(found, part, error, limits.max_layer_error) for part, error in _halves(found))
    parts = [first]
    if found.mlp_norm is not None:
        parts.append(_error_value(found, NORM, found.mlp_norm, limits.max_norm_error))
    if found.router is not None:
        floor = found.router.weight_moved_floor
        bound = limits.max_weight_moved.over(floor)
        parts.append(_Value(layer_name(found), ROUTER, found.router.weight_moved, bound, floor))
    return [*parts, second]


def _in_order(found: "LayerDifference", limits: Limits) -> list[_Value]:
    """Return everything of a layer that has a limit, in the order of execution."""
    *before, second = _parts(found, limits)
    first_slope, second_slope = (_slope_value(found, *half, limits) for half in _halves(found))
    experts = [_expert_value(found, expert, limits) for expert in found.experts if expert.relative is not None]
    slopes = [replace(slope, part=f"{slope.part} slope") for slope in (first_slope, second_slope)]
    return [before[0], slopes[0], *before[1:], *experts, second, slopes[1]]


def _error_value(found: "LayerDifference", part: str, error: "OutputError", limit: Bound) -> _Value:
    note = f", {error.worst_token_relative:.4g} at token {error.worst_token}"
    bound = limit.over(error.floor_relative)
    return _Value(layer_name(found), part, error.relative, bound, error.floor_relative, note)


def _slope_value(found: "LayerDifference", part: str, error: "OutputError", limits: Limits) -> _Value:
    note = f" at slope {error.slope:.5g}"
    return _Value(layer_name(found), part, abs(error.slope - 1), limits.max_slope_error, note=note)


def _expert_value(found: "LayerDifference", expert: "ExpertDifference", limits: Limits) -> _Value:
    assert expert.relative is not None
    floor = found.mlp.floor_relative
    note = f" on {expert.num_tokens} tokens, slope {expert.slope:.4g}"
    bound = limits.max_expert_error.over(floor)
    return _Value(layer_name(found), f"expert {expert.expert}", expert.relative, bound, floor, note)


def _extreme(metric: str, unit: str, values: Sequence[_Value]) -> Judged:
    """Return the check of the worst value, most severe verdict first, with a reason for each beyond its limit."""
    found = max(values, key=_rank)
    verdict = worst([value.verdict for value in values])
    reasons = tuple(
        (value.verdict, f"{value.place}: {unit} {value.value:.4g}{value.note}, expected <= {value.bound.fail:.4g}")
        for value in values
        if value.verdict is Verdict.FAIL
    ) + tuple(
        (value.verdict, f"{value.place}: {unit} {value.value:.4g}{value.note}, expected <= {value.bound.warn:.4g}")
        for value in values
        if value.verdict is Verdict.WARN
    )
    check = Check(metric, found.value, "", verdict, bound=found.bound, floor=found.floor, place=found.place)
    return Judged(check, reasons)


def _rank(value: _Value) -> tuple[int, float]:
    return list(Verdict).index(value.verdict), severity(value.value)


def _routers(layers: "Sequence[LayerDifference]") -> Judged:
    """Return the check of changes that no rounding explains; on the reference's input there may be none."""
    reasons, total, place, most = [], 0, "", 0
    for layer in layers:
        router = layer.router
        if router is None or not router.unexplained:
            continue
        total += router.unexplained
        if router.unexplained > most:
            most, place = router.unexplained, layer_name(layer)
        go = "goes" if router.unexplained == 1 else "go"
        words = (
            f"{counted(router.unexplained, 'tokens')} {go} to other experts at margins up to {router.worst_margin:.3g}"
        )
        reasons.append(
            (Verdict.FAIL, f"{layer_name(layer)} router: {words}, expected none above {router.margin_limit:.3g}")
        )
    verdict = Verdict.FAIL if total else Verdict.PASS
    return Judged(Check("router, unexplained changes", total, "tokens", verdict, place=place), tuple(reasons))


def _finite_layers(layers: "Sequence[LayerDifference]") -> Iterator[Judged]:
    bad = [layer for layer in layers if layer.first_non_finite]
    if not bad:
        return
    first = f"{layer_name(bad[0])}: NaN or Inf: {bad[0].first_non_finite}"
    check = Check("layers with NaN or Inf", len(bad), "layers", Verdict.FAIL, place=f"first in {layer_name(bad[0])}")
    yield Judged(check, ((Verdict.FAIL, first),))
