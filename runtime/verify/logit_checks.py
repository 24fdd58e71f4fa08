"""What the logits of both models and of their MTP layers say, held against the limits."""

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.verify.check import Check, Judged, Verdict, judge, plain
from runtime.verify.limits import Bound, Limits

if TYPE_CHECKING:
    from runtime.verify.results import FloorSummary, ModelComparison, MtpDifference, TokenTable
    from runtime.verify.summary import Estimate


def judge_logits(found: "ModelComparison", limits: Limits) -> Iterator[Judged]:
    """Yield the checks of the logits level; nothing where logits were not asked for."""
    if found.tokens is None:
        return
    if found.first_non_finite:
        words = tuple((Verdict.FAIL, f"{place}: NaN or Inf") for place in found.first_non_finite)
        place = found.first_non_finite[0]
        yield Judged(Check("models with NaN or Inf", len(words), "models", Verdict.FAIL, place=place), words)
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
