"""The results of the levels to a verdict, its reasons, and the one sentence that says it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.compare import StructureReport
from converters.findings import Finding
from runtime.verify.check import Check as Check
from runtime.verify.check import Judged, Reason, counted
from runtime.verify.check import Verdict as Verdict
from runtime.verify.check import worst as worst
from runtime.verify.further_checks import judge_engine, judge_text
from runtime.verify.layer_checks import Divergence, first_divergence, is_wrong, judge_layers
from runtime.verify.limits import Limits
from runtime.verify.logit_checks import judge_logits, judge_mtp
from runtime.verify.report_words import not_checked, sentences
from runtime.verify.siblings import Outlier, expert_name, layer_outliers, tensor_outliers

if TYPE_CHECKING:
    from converters.contents import ContentsReport
    from converters.diagnosis.cause import Cause
    from converters.quant.certificate import Certificate
    from runtime.verify.engine_logprobs import EngineComparison
    from runtime.verify.results import ModelComparison
    from runtime.verify.routing import LayerRouting
    from runtime.verify.text_results import TextReport

# reasons and causes that fit into the headline
_IN_HEADLINE = 3


@dataclass(frozen=True, slots=True)
class Levels:
    """The results of the levels; None for one that was not run.

    Attributes:
        structure: what the headers say.
        contents: of the bytes level.
        weights: of the weights level.
        layers: of the levels that run both models: layers, routers, logits.
        text: of the text level.
        runtime: of the comparison with a serving engine.
        routing: agreement of the free-running routers with a stored reference, which has no layers.
    """

    structure: StructureReport | None = None
    contents: "ContentsReport | None" = None
    weights: "Certificate | None" = None
    layers: "ModelComparison | None" = None
    text: "TextReport | None" = None
    runtime: "EngineComparison | None" = None
    routing: "tuple[LayerRouting, ...]" = ()

    @property
    def findings(self) -> Iterator[tuple[str, tuple[Finding, ...]]]:
        """Yield the name and the findings of every level that gives findings and was run."""
        found: Mapping[str, Any] = {"structure": self.structure, "bytes": self.contents, "weights": self.weights}
        return ((name, tuple(level.findings)) for name, level in found.items() if level is not None)


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A verification: what was compared, what came out, and what was not looked at.

    Attributes:
        source: folder, or the file of a stored reference.
        candidate: folder.
        scheme: kind of conversion, a key of PROFILES.
        verdict: the worst of all checks.
        reasons: why it is not a pass, one line each, failures first, then in the order of the levels.
        checks: every metric that has a limit.
        limits: what the models were held against; None where they were not run.
        levels: all results.
        not_checked: what nobody looked at.
        outliers: layers, experts and tensors far above their siblings.
        causes: what a diagnosis proved.
        provenance: versions, digests, options and plan, ready for JSON.
    """

    source: str
    candidate: str
    scheme: str
    verdict: Verdict
    reasons: tuple[str, ...]
    checks: tuple[Check, ...]
    limits: Limits | None
    levels: Levels
    not_checked: tuple[str, ...]
    outliers: tuple[Outlier, ...] = ()
    causes: "tuple[Cause, ...]" = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)

    @property
    def structure(self) -> StructureReport | None:
        """What the headers say."""
        return self.levels.structure

    @property
    def models(self) -> "ModelComparison | None":
        """What running both models found."""
        return self.levels.layers

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings of all levels, in their order."""
        return tuple(finding for _, findings in self.levels.findings for finding in findings)

    @property
    def first_divergence(self) -> Divergence | None:
        """The first half of a layer whose own error is out of its band."""
        if self.models is None or self.limits is None:
            return None
        return first_divergence(self.models.layers, self.limits)

    @property
    def first_off(self) -> int | None:
        """The layer of `first_divergence`."""
        return None if self.first_divergence is None else self.first_divergence.layer

    @property
    def wrong_layers(self) -> tuple[int, ...]:
        """The layers with a half, an expert or a router beyond its limit, or with NaN or Inf."""
        if self.models is None or self.limits is None:
            return ()
        return tuple(layer.layer for layer in self.models.layers if is_wrong(layer, self.limits))

    @property
    def outlined(self) -> tuple[tuple[int, int], ...]:
        """(layer, expert) of the experts that are beyond their limit or far above their siblings."""
        subjects = {outlier.subject for outlier in self.outliers}
        bar = math.inf if self.limits is None else self.limits.max_expert_error.fail
        return tuple(
            (layer.layer, expert.expert)
            for layer in (self.models.layers if self.models else ())
            for expert in layer.experts
            if expert_name(layer, expert.expert) in subjects or not (expert.relative or 0.0) <= bar
        )

    @property
    def headline(self) -> str:
        """Return the verdict and the sentence a reader wants: causes, reasons, what was found, what was not checked."""
        parts = [str(cause) for cause in self.causes[:_IN_HEADLINE]]
        if len(self.causes) > _IN_HEADLINE:
            parts.append(f"and {counted(len(self.causes) - _IN_HEADLINE, 'more causes')}")
        parts += self.reasons[:_IN_HEADLINE]
        if len(self.reasons) > _IN_HEADLINE:
            parts.append(f"and {len(self.reasons) - _IN_HEADLINE} more")
        parts += sentences(self.levels)
        words = [f"{self.verdict.upper()}: {self.scheme}"]
        if parts:
            words.append(f": {'; '.join(parts)}")
        if self.not_checked:
            words.append(f"{';' if parts else ':'} not checked: {', '.join(self.not_checked)}")
        return "".join(words)

    def to_json(self) -> dict[str, Any]:
        """Return the report as a mapping; values may be dataclasses, enums and tuples of such."""
        names = (
            "source",
            "candidate",
            "scheme",
            "verdict",
            "headline",
            "causes",
            "reasons",
            "checks",
            "limits",
            "outliers",
            "first_divergence",
            "structure",
            "not_checked",
            "provenance",
        )
        levels = self.levels
        return {
            **{name: getattr(self, name) for name in names},
            "bytes": levels.contents,
            "weights": levels.weights and _weights_json(levels.weights),
            **models_json(levels.layers),
            "routing": levels.routing or None,
            "text": levels.text,
            "runtime": levels.runtime,
        }


def build_report(
    folders: tuple[Path, Path],
    scheme: str,
    levels: Levels,
    limits: Limits | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> VerifyReport:
    """Judge the levels that were run.

    Args:
        folders: source (or stored reference) and candidate.
        scheme: kind of conversion, a key of PROFILES.
        levels: their results.
        limits: what the models are held against, if they were run.
        provenance: see `VerifyReport`.
    """
    judged = [*_finding_checks(levels), *_model_checks(levels, limits)]
    judged += [*judge_text(levels.text), *judge_engine(levels.runtime)]
    outliers = _outliers(levels)
    reasons = [reason for found in judged for reason in found.reasons]
    reasons += [(Verdict.WARN, str(outlier)) for outlier in outliers]
    verdicts = [found.check.verdict for found in judged]
    return VerifyReport(
        source=str(folders[0]),
        candidate=str(folders[1]),
        scheme=scheme,
        verdict=worst([*verdicts, *([Verdict.WARN] if outliers else [])]),
        # "fail" sorts before "warn"
        reasons=tuple(text for _, text in sorted(reasons, key=lambda reason: reason[0])),
        checks=tuple(found.check for found in judged),
        limits=limits,
        levels=levels,
        not_checked=tuple(not_checked(scheme, levels)),
        outliers=outliers,
        provenance=provenance or {},
    )


def models_json(models: "ModelComparison | None") -> dict[str, Any]:
    """Return the entries `layers`, `ends`, `logits`, `mtp`, `floor` and `run` of a report; no single tokens."""
    if models is None:
        return dict.fromkeys(("layers", "ends", "logits", "mtp", "floor", "run"))
    names = ("protocol", "dtype", "device", "activations", "notes", "first_non_finite", "spent")
    run = {name: getattr(models, name) for name in names}
    tokens = models.tokens
    logits = None if tokens is None else {"num_scored": len(tokens.scores), "summary": models.summary}
    found = {"layers": models.layers or None, "ends": models.ends, "logits": logits}
    return {**found, "mtp": models.mtp, "floor": models.floor, "run": run}


def _finding_checks(levels: Levels) -> Iterator[Judged]:
    """Yield a check for each level that gives findings."""
    for name, findings in levels.findings:
        reasons: tuple[Reason, ...] = tuple((Verdict(finding.severity), str(finding)) for finding in findings)
        yield Judged(Check(name, len(findings), "findings", worst([verdict for verdict, _ in reasons])), reasons)


def _model_checks(levels: Levels, limits: Limits | None) -> Iterator[Judged]:
    if levels.layers is None:
        return
    assert limits is not None, "models were run without limits"
    yield from judge_layers(levels.layers, limits)
    yield from judge_logits(levels.layers, limits)
    yield from judge_mtp(levels.layers.mtp, limits, levels.layers.floor)


def _outliers(levels: Levels) -> tuple[Outlier, ...]:
    return (
        *(tensor_outliers(levels.weights) if levels.weights else ()),
        *(layer_outliers(levels.layers.layers) if levels.layers else ()),
    )


def _weights_json(weights: "Certificate") -> dict[str, Any]:
    from converters.quant.report import certificate_json

    return certificate_json(weights, {})
