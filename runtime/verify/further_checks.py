"""The text level and the comparison with a serving engine, judged."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from runtime.verify.check import Check, Judged, Reason, Verdict, counted, judge, plain, worst
from runtime.verify.limits import Bound

if TYPE_CHECKING:
    from runtime.verify.engine_logprobs import EngineComparison
    from runtime.verify.text_results import TextReport

# an engine computes in bf16, whose log-probability near -4 has a grid of 0.031 nats, with kernels of its own. Measured
# on the trained fixture against vLLM in bf16, held-out text and built-in corpus: KL 0.0006 and 0.0011, unexplained
# 0.07 % and 0.54 %; with two experts of one layer exchanged 0.027 and 0.019, 4.1 % and 4.9 %
ENGINE_UNEXPLAINED = Bound(0.01, 0.02)
ENGINE_NLL = Bound(0.01, 0.05)
ENGINE_KL = Bound(0.003, 0.01)
# a choice that the source finds this much less likely than its own is no near tie; 4 bits move more than 8
_NEAR_TIES = {"nvfp4": 1.0, "nvfp4-weight-only": 1.0, "int4": 1.0, "int4-weight-only": 1.0}
_NEAR_TIE = 0.5


def near_tie(scheme: str) -> float:
    """Return how far behind, in nats, the first token that differs may be in an answer."""
    return _NEAR_TIES.get(scheme, _NEAR_TIE)


def judge_text(found: "TextReport | None") -> Iterator[Judged]:
    """Yield the check of the text level."""
    if found is None:
        return
    reasons: tuple[Reason, ...] = tuple(
        (Verdict(problem.severity), f"text, prompt {problem.prompt}: {problem.statement}") for problem in found.problems
    )
    check = Check("text", len(reasons), "problems", worst([verdict for verdict, _ in reasons]))
    yield Judged(check, reasons)


def judge_engine(found: "EngineComparison | None") -> Iterator[Judged]:
    """Yield the checks of an engine's log-probabilities against this runtime's."""
    if found is None:
        return
    change = found.nll_difference
    size = abs(change.mean)
    yield plain(Check("engine: |mean NLL change|", size, "nats", judge(size, ENGINE_NLL), change.se, ENGINE_NLL))
    if found.kl_bound is not None:
        verdict = judge(found.kl_bound, ENGINE_KL)
        yield plain(Check("engine: KL, lower bound", found.kl_bound, "nats", verdict, bound=ENGINE_KL))
    if found.num_with_top:
        share = found.unexplained / found.num_with_top
        place = f"{found.unexplained} of {found.num_with_top}, up to {found.worst_gap:.3g} nats behind"
        verdict = judge(share, ENGINE_UNEXPLAINED)
        yield plain(
            Check("engine: unexplained top-1 changes", share, "", verdict, bound=ENGINE_UNEXPLAINED, place=place)
        )


def text_words(found: "TextReport") -> str:
    """Return how many answers were alike."""
    same = sum(result.first_difference is None for result in found.results)
    return f"{same} of {counted(len(found.results), 'answers')} equal"


def engine_words(found: "EngineComparison") -> str:
    """Return how close the engine is."""
    top1 = "" if found.top1 is None else f", top-1 {found.top1:.2%}"
    return f"engine: NLL {found.nll_difference.mean:+.2g} nats{top1} over {counted(found.num_tokens, 'tokens')}"
