"""Thresholds to a verdict, and the one sentence that says it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.compare import Outcome, StructureReport
from converters.findings import Finding
from converters.formats.inputs import FULL
from runtime.verify.limits import Bound, Limits

if TYPE_CHECKING:
    from converters.contents import ContentsReport
    from converters.quant.certificate import Certificate
    from runtime.verify.compare import LogitsComparison
    from runtime.verify.summary import LogitSummary


class Verdict(StrEnum):
    """What a level or a metric comes to, mildest first."""

    PASS = "pass"
    WARN = "warn"
    FAIL = "fail"


def worst(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the most severe verdict; PASS of none."""
    return max(verdicts, key=list(Verdict).index, default=Verdict.PASS)


@dataclass(frozen=True, slots=True)
class Check:
    """One metric held against its limit.

    Attributes:
        metric: what was measured, with its reduction.
        value: in `unit`; None where nothing could be measured.
        se: standard error in the same unit (block bootstrap over windows), None where there is none.
        bound: limits in the same unit; None where any value but the expected one fails.
        at_least: the value must not be below the bound, rather than not above it.
    """

    metric: str
    value: float | None
    unit: str
    verdict: Verdict
    se: float | None = None
    bound: Bound | None = None
    at_least: bool = False

    @property
    def expected(self) -> str:
        """Return the limit in words."""
        if self.bound is None:
            return "0"
        sign = ">=" if self.at_least else "<="
        limits = dict.fromkeys((f"{self.bound.warn:.6g}", f"{self.bound.fail:.6g}"))
        return f"{sign} {' / '.join(limits)}"

    @property
    def found(self) -> str:
        """Return the value in words."""
        if self.value is None:
            return "nothing to measure"
        error = "" if self.se is None else f" +- {self.se:.2g}"
        return f"{self.value:.6g}{error} {self.unit}".rstrip()


@dataclass(frozen=True, slots=True)
class Levels:
    """The results of the levels; None for one that was not run."""

    structure: StructureReport | None = None
    contents: "ContentsReport | None" = None
    weights: "Certificate | None" = None
    logits: "LogitsComparison | None" = None


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A verification: what was compared, what came out, and what was not looked at."""

    source: str
    candidate: str
    scheme: str
    verdict: Verdict
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    limits: Limits | None
    levels: Levels
    not_checked: tuple[str, ...]

    @property
    def structure(self) -> StructureReport | None:
        """What the headers say."""
        return self.levels.structure

    @property
    def logits(self) -> "LogitsComparison | None":
        """What the models say."""
        return self.levels.logits

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings of all levels, in their order."""
        contents, weights = self.levels.contents, self.levels.weights
        return (
            *(self.structure.findings if self.structure else ()),
            *(contents.findings if contents else ()),
            *(weights.findings if weights else ()),
        )

    @property
    def headline(self) -> str:
        """Return the verdict and the sentence a reader wants."""
        parts = list(self.reasons[:3])
        if len(self.reasons) > len(parts):
            parts.append(f"and {len(self.reasons) - len(parts)} more")
        if self.structure is not None:
            parts.append(_structure_words(self.structure))
        if self.levels.weights is not None:
            parts.append(_weights_words(self.levels.weights))
        if self.logits is not None and self.logits.summary is not None:
            parts.append(_logits_words(self.logits.summary))
        return f"{self.verdict.upper()}: {self.scheme}: {'; '.join(parts)}; not checked: {', '.join(self.not_checked)}"

    def to_json(self) -> dict[str, Any]:
        """Return the report as a mapping; values may be dataclasses, enums and tuples of such."""
        names = (
            "source",
            "candidate",
            "scheme",
            "verdict",
            "headline",
            "reasons",
            "checks",
            "limits",
            "structure",
            "logits",
            "not_checked",
        )
        weights = self.levels.weights
        found: dict[str, Any] = {name: getattr(self, name) for name in names}
        return {**found, "bytes": self.levels.contents, "weights": weights and _weights_json(weights)}


def build_report(
    folders: tuple[Path, Path],
    scheme: str,
    levels: Levels,
    limits: Limits | None = None,
) -> VerifyReport:
    """Judge the levels that were run.

    Args:
        folders: source and candidate.
        scheme: kind of conversion, a key of PROFILES.
        levels: their results.
        limits: what the logits are held against, if they were compared.
    """
    checks = list(_finding_checks(levels))
    reasons: list[tuple[Verdict, str]] = []
    for level in (levels.structure, levels.contents, levels.weights):
        reasons += [(Verdict(finding.severity), str(finding)) for finding in (level.findings if level else ())]
    logits = levels.logits
    if logits is not None:
        assert limits is not None, scheme
        logit_checks = list(_logit_checks(logits, limits))
        checks += logit_checks
        reasons += [
            (check.verdict, f"{check.metric} {check.found}, expected {check.expected}")
            for check in logit_checks
            if check.verdict is not Verdict.PASS
        ]
    return VerifyReport(
        source=str(folders[0]),
        candidate=str(folders[1]),
        scheme=scheme,
        verdict=worst([check.verdict for check in checks]),
        # "fail" sorts before "warn"
        reasons=tuple(text for _, text in sorted(reasons, key=lambda reason: reason[0])),
        checks=tuple(checks),
        limits=limits,
        levels=levels,
        not_checked=tuple(_not_checked(scheme, levels)),
    )


def _finding_checks(levels: Levels) -> Iterator[Check]:
    """Yield a check for each level that gives findings."""
    for name, level in (("structure", levels.structure), ("bytes", levels.contents), ("weights", levels.weights)):
        if level is not None:
            verdict = worst([Verdict(finding.severity) for finding in level.findings])
            yield Check(name, len(level.findings), "findings", verdict)


def _logit_checks(logits: "LogitsComparison", limits: Limits) -> Iterator[Check]:
    for found in logits.non_finite:
        place = f"first at token {found.first_token}, window {found.first_window}"
        yield Check(f"{found.model}: NaN or Inf logits", found.num_tokens, f"tokens, {place}", Verdict.FAIL)
    summary = logits.summary
    if summary is None:
        yield Check("KL mean", None, "nats", Verdict.FAIL, bound=limits.max_kl)
        return
    kl, perplexity = summary.kl_nats.estimate, summary.perplexity
    yield _judge("KL mean", kl.mean, "nats", kl.se, limits.max_kl)
    yield _judge("top-1 agreement", summary.top1.mean, "", summary.top1.se, limits.min_top1, at_least=True)
    yield _judge("perplexity ratio", perplexity.ratio, "", perplexity.ratio_se, limits.max_ppl_ratio)


def _judge(metric: str, value: float, unit: str, se: float | None, bound: Bound, *, at_least: bool = False) -> Check:
    def within(limit: float) -> bool:
        # written so that NaN is never within
        return value >= limit if at_least else value <= limit

    verdict = Verdict.FAIL if not within(bound.fail) else Verdict.WARN if not within(bound.warn) else Verdict.PASS
    return Check(metric, value, unit, verdict, se, bound, at_least)


# of these, engines quantize the activations as well
_QUANTIZED_INPUTS = frozenset({"fp8", "int8", "nvfp4", "int4"})


def _not_checked(scheme: str, levels: Levels) -> Iterator[str]:
    if levels.structure is None:
        yield "structure"
    if levels.contents is None or not levels.contents.record:
        yield "bytes of the files"
    if levels.weights is None:
        yield "weights element by element"
    if levels.logits is None:
        yield "logits"
    elif scheme in _QUANTIZED_INPUTS and levels.logits.activations == FULL:
        yield "activations quantized at run time"
    yield "outputs of the MTP layer"
    yield "generated text"


def _structure_words(structure: StructureReport) -> str:
    counts = [f"{structure.outcomes[outcome]} {outcome}" for outcome in Outcome if structure.outcomes.get(outcome)]
    return f"{sum(structure.outcomes.values())} source tensors: {', '.join(counts)}; MTP layer {structure.mtp}"


def _weights_words(weights: "Certificate") -> str:
    rounded = [summary for summary in weights.summaries if summary.largest_relative_error]
    worst_error = max((summary.largest_relative_error for summary in rounded), default=0.0)
    words = f"{len(weights.tensors)} tensors compared element by element"
    return f"{words}, relative error at most {worst_error:.3g}" if rounded else words


def _weights_json(weights: "Certificate") -> dict[str, Any]:
    from converters.quant.report import certificate_json

    return certificate_json(weights, {})


def _logits_words(summary: "LogitSummary") -> str:
    kl, perplexity = summary.kl_nats.estimate, summary.perplexity
    kl_error = "" if kl.se is None else f" +- {kl.se:.1g}"
    ratio_error = "" if perplexity.ratio_se is None else f" +- {perplexity.ratio_se:.1g}"
    return (
        f"KL {kl.mean:.3g}{kl_error} nats, top-1 {summary.top1.mean:.2%}, "
        f"PPL ratio {perplexity.ratio:.5f}{ratio_error} over {summary.num_tokens} tokens"
    )
