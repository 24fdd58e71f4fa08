"""What running both models found, held against the limits: layers, experts, routers, logits, MTP layer.

Each check stands for all layers and names the worst; every layer or expert beyond its limit is a reason of its own, in
the order in which the model runs them, so that the first one names where the error begins.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.verify.check import Check, Verdict, judge, severity, worst
from runtime.verify.limits import Bound, Limits
from runtime.verify.siblings import expert_name, layer_name, mlp_name

if TYPE_CHECKING:
    from runtime.verify.results import (
        ExpertDifference,
        FloorSummary,
        LayerDifference,
        ModelComparison,
        MtpDifference,
        OutputError,
        TokenTable,
    )
    from runtime.verify.summary import Estimate

Reason = tuple[Verdict, str]


@dataclass(frozen=True, slots=True)
class Judged:
    """A check, and what of it is worth a sentence: nothing, unless it is beyond its limit."""

    check: Check
    reasons: tuple[Reason, ...] = ()


@dataclass(frozen=True, slots=True)
class _Value:
    """A value of one layer, half of a layer or expert."""

    place: str
    value: float
    bound: Bound
    floor: float | None = None
    note: str = ""

    @property
    def verdict(self) -> Verdict:
        return judge(self.value, self.bound)


@dataclass(frozen=True, slots=True)
class Divergence:
    """The first half of a layer whose own error is out of its band."""

    layer: int
    part: str
    relative: float
    limit: float


def first_divergence(layers: "Sequence[LayerDifference]", limits: Limits) -> Divergence | None:
    """Return the first half of a layer, in the order of execution, whose error on the reference's input is beyond warn.

    The error of each half is its own, since it is fed the reference's input: what comes later is not its consequence.
    """
    for found in layers:
        for part, error in _halves(found):
            bound = limits.max_layer_error.over(error.floor_relative)
            if not error.relative <= bound.warn:
                return Divergence(found.layer, part, error.relative, bound.warn)
    return None


def is_wrong(found: "LayerDifference", limits: Limits) -> bool:
    """Return whether anything of a layer fails."""
    values = [_error_value(found, part, error, limits) for part, error in _halves(found)]
    values += [_expert_value(found, expert, limits) for expert in found.experts if expert.relative is not None]
    slopes = [judge(abs(error.slope - 1), limits.max_slope_error) for _, error in _halves(found)]
    flips = found.router is not None and found.router.unexplained > 0
    is_beyond = worst([*(value.verdict for value in values), *slopes]) is Verdict.FAIL
    return is_beyond or flips or found.first_non_finite is not None


def judge_layers(found: "ModelComparison", limits: Limits) -> Iterator[Judged]:
    """Yield the checks of the layers level, routers included; nothing where layers were not asked for."""
    if not found.layers:
        return
    yield from _finite_layers(found.layers)
    halves = [(layer, part, error) for layer in found.layers for part, error in _halves(layer)]
    for metric, is_attention in (("attention error, worst layer", True), ("MLP and MoE error, worst layer", False)):
        chosen = [half for half in halves if (half[1] == "attention") is is_attention]
        yield _extreme(metric, "relative error", [_error_value(*half, limits) for half in chosen])
    slopes = [
        _Value(_place(layer, part), abs(error.slope - 1), limits.max_slope_error, note=f" at slope {error.slope:.5g}")
        for layer, part, error in halves
    ]
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


def judge_logits(found: "ModelComparison", limits: Limits) -> Iterator[Judged]:
    """Yield the checks of the logits level; nothing where logits were not asked for."""
    if found.tokens is None:
        return
    yield from map(plain, _finite_tokens(found.tokens))
    floor, summary = found.floor, found.summary
    if summary is None:
        yield plain(Check("KL mean", None, "nats", Verdict.FAIL, bound=limits.max_kl))
        return
    yield _at_most("KL mean", summary.kl_nats.estimate, limits.max_kl, _kl_floor(floor))
    bound, top1 = _share_bound(limits.min_top1, floor), summary.top1
    verdict, base = judge(top1.mean, bound, at_least=True, se=top1.se), floor.top1 if floor else None
    yield plain(Check("top-1 agreement", top1.mean, "", verdict, top1.se, bound, True, top1.ci95, base))
    if not limits.allows_flips:
        count = summary.unexplained_flips
        verdict = Verdict.FAIL if count else Verdict.PASS
        yield plain(Check("unexplained top-1 changes", count, "tokens", verdict))
    bound, perplexity = _ratio_bound(limits.max_ppl_ratio, floor), summary.perplexity
    error = perplexity.ratio_se
    verdict = judge(perplexity.ratio, bound, se=error)
    yield plain(Check("perplexity ratio", perplexity.ratio, "", verdict, error, bound, ci95=perplexity.ratio_ci95))


def judge_mtp(mtp: "MtpDifference | None", limits: Limits, floor: "FloorSummary | None") -> Iterator[Judged]:
    """Yield the checks of the MTP layer's predictions."""
    if mtp is None:
        return
    if mtp.summary is None:
        yield plain(Check("MTP: KL mean", None, "nats", Verdict.FAIL, bound=limits.max_mtp_kl))
        return
    yield _at_most("MTP: KL mean", mtp.summary.kl_nats.estimate, limits.max_mtp_kl, _kl_floor(floor))
    loss, bound = mtp.acceptance_reference - mtp.acceptance_candidate, limits.max_acceptance_loss
    # a share of n positions is known to sqrt(a (1 - a) / n); fewer cannot show a loss of a few percent
    spread = math.sqrt(mtp.acceptance_reference * (1 - mtp.acceptance_reference) / mtp.summary.num_tokens)
    if bound.floors is not None:
        bound = Bound(bound.warn + 2 * spread, bound.fail + 2 * spread)
    yield plain(Check("MTP: acceptance lost", loss, "", judge(loss, bound), spread, bound))


def _at_most(metric: str, found: "Estimate", limit: Bound, floor: float | None) -> Judged:
    """Return the check of a mean in nats."""
    bound = limit.over(floor)
    verdict = judge(found.mean, bound, se=found.se)
    return plain(Check(metric, found.mean, "nats", verdict, found.se, bound, ci95=found.ci95, floor=floor))


def _kl_floor(floor: "FloorSummary | None") -> float | None:
    return None if floor is None else floor.kl_mean


def _halves(found: "LayerDifference") -> "tuple[tuple[str, OutputError], ...]":
    return ("attention", found.attention), (mlp_name(found), found.mlp)


def _place(found: "LayerDifference", part: str) -> str:
    return f"{layer_name(found)} {part}"


def _error_value(found: "LayerDifference", part: str, error: "OutputError", limits: Limits) -> _Value:
    bound = limits.max_layer_error.over(error.floor_relative)
    note = f", {error.worst_token_relative:.4g} at token {error.worst_token}"
    return _Value(_place(found, part), error.relative, bound, error.floor_relative, note)


def _expert_value(found: "LayerDifference", expert: "ExpertDifference", limits: Limits) -> _Value:
    assert expert.relative is not None
    floor = found.mlp.floor_relative
    note = f" on {expert.num_tokens} tokens, slope {expert.slope:.4g}"
    bound = limits.max_expert_error.over(floor)
    return _Value(expert_name(found, expert.expert), expert.relative, bound, floor, note)


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
        words = f"{router.unexplained} tokens go to other experts at margins up to {router.worst_margin:.3g}"
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


def _finite_tokens(tokens: "TokenTable") -> Iterator[Check]:
    for name, finite_T in (
        ("reference", tokens.scores.finite_reference),
        ("candidate", tokens.scores.finite_candidate),
    ):
        bad = (~finite_T).nonzero()[:, 0]
        if len(bad):
            place = f"first at token {int(tokens.positions_T[bad[0]])}, window {int(tokens.windows_T[bad[0]])}"
            yield Check(f"{name}: NaN or Inf logits", len(bad), "tokens", Verdict.FAIL, place=place)


def _share_bound(bound: Bound, floor: "FloorSummary | None") -> Bound:
    """Return a lower bound on a share of equal tokens, below what the floor gives."""
    if floor is None or bound.floors is None:
        return bound
    warn, fail = bound.floors
    lost = 1 - floor.top1
    return Bound(min(bound.warn, 1 - warn * lost), min(bound.fail, 1 - fail * lost), bound.floors)


def _ratio_bound(bound: Bound, floor: "FloorSummary | None") -> Bound:
    """Return an upper bound on the ratio of perplexities, beyond what the floor gives."""
    if floor is None or bound.floors is None:
        return bound
    warn, fail = (math.exp(times * abs(floor.ln_ppl_ratio)) for times in bound.floors)
    return Bound(max(bound.warn, warn), max(bound.fail, fail), bound.floors)


def plain(check: Check) -> Judged:
    """Return a check with a reason of its own words, unless it passes."""
    if check.verdict is Verdict.PASS:
        return Judged(check)
    return Judged(check, ((check.verdict, f"{check.metric} {check.found}, expected {check.expected}"),))


JUDGES: tuple[Callable[["ModelComparison", Limits], Iterator[Judged]], ...] = (
    judge_layers,
    judge_logits,
    lambda found, limits: judge_mtp(found.mtp, limits, found.floor),
)
