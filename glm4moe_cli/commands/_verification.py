"""What verify does once its options are known: run both models, show the report, fail where it fails."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.compare import StructureReport
from converters.errors import UsageError, VerificationFailed
from converters.formats.inputs import FULL
from glm4moe_cli._output import Output
from runtime.verify.limits import Limits, Overrides, choose_limits
from runtime.verify.report import Levels, Verdict, VerifyReport, build_report
from runtime.verify.tables import (
    FINDING_COLUMNS,
    METRIC_COLUMNS,
    ROUTING_COLUMNS,
    SCHEME_COLUMNS,
    WORST_COLUMNS,
    finding_rows,
    metric_rows,
    routing_rows,
    scheme_rows,
    worst_rows,
)
from runtime.verify.windows import Window

if TYPE_CHECKING:
    from runtime.verify.compare import EncodedText, LogitsComparison, LogitsOptions

# more of them say no more; --json has all
MAX_FINDINGS = 20


def is_sound(folders: tuple[Path, Path], structure: StructureReport) -> bool:
    """Return whether two checkpoints hold the same tensors, so that their weights can be compared at all."""
    return build_report(folders, structure.scheme, Levels(structure=structure)).verdict is not Verdict.FAIL


@dataclass(frozen=True, slots=True)
class TextRun:
    """A comparison on a text, checked as far as it can be before anything long is begun."""

    text: "EncodedText"
    how: "LogitsOptions"
    limits: Limits
    num_bytes: int


def plan_text_run(folders: tuple[Path, Path], scheme: str, options: Mapping[str, Any]) -> TextRun:
    """Read and encode the text.

    Raises:
        UsageError, InputError: text, sizes or tokenizer cannot be used.
    """
    from runtime.config import resolve_device
    from runtime.verify.compare import LogitsOptions, encode_text

    overrides = Overrides(**{field.name: options[field.name] for field in fields(Overrides)})
    names = ("num_tokens", "context_length", "stride", "seed", "activations")
    how = LogitsOptions(device=resolve_device(options["device"]), **{name: options[name] for name in names})
    content = _read_text(options["text"])
    text = encode_text(folders[0], content, how)
    num_bytes = len(content.encode()) * text.plan.num_tokens // text.plan.num_text_tokens
    return TextRun(text, how, choose_limits(scheme, overrides), num_bytes)


def compare_on_text(output: Output, folders: tuple[Path, Path], planned: TextRun) -> "LogitsComparison":
    """Run both models on the text."""
    from runtime.verify.compare import compare_logits

    plan, num_bytes = planned.text.plan, planned.num_bytes
    with output.progress("verify", num_bytes) as progress:

        def advance(window: Window) -> None:
            progress.describe(f"window {window.index + 1}/{len(plan.windows)}")
            progress.advance(num_bytes * window.end // plan.num_tokens - progress.done_bytes)

        progress.describe("loading both models")
        logits = compare_logits(*folders, planned.text, planned.how, advance)
    for note in logits.notes:
        output.warning(note)
    return logits


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise UsageError(f"--text {path}", expected="valid UTF-8", found=found) from error


def show(output: Output, report: VerifyReport) -> None:
    """Print the verdict first, then what it rests on; the JSON document holds all of it."""
    output.line(report.headline)
    findings = finding_rows(report)
    if findings:
        output.table("Findings", FINDING_COLUMNS, findings[:MAX_FINDINGS])
        if len(findings) > MAX_FINDINGS:
            output.hint(f"{len(findings) - MAX_FINDINGS} more findings; --json lists all of them.")
    output.table("Metrics", METRIC_COLUMNS, metric_rows(report))
    weights = report.levels.weights
    if weights is not None:
        output.table("Weights", SCHEME_COLUMNS, scheme_rows(weights))
        if weights.worst:
            output.table("Tensors with the largest error", WORST_COLUMNS, worst_rows(weights))
    if report.logits is not None:
        output.table("Routing", ROUTING_COLUMNS, routing_rows(report.logits.routing))
        compute = report.logits.dtype
        if report.logits.activations != FULL:
            compute += f", activations {report.logits.activations}"
        output.facts("Protocol", {"text": report.logits.protocol, "compute": compute, "device": report.logits.device})
    if report.verdict is Verdict.WARN:
        for reason in report.reasons[:MAX_FINDINGS]:
            output.warning(reason)
    output.result(report.to_json())


def raise_failure(report: VerifyReport, *, strict: bool) -> None:
    """End with exit code 3 where the verification failed, or where it warns and warnings are to fail."""
    if report.verdict is Verdict.FAIL or (strict and report.verdict is Verdict.WARN):
        found = report.reasons[0] + (f" and {len(report.reasons) - 1} more" if len(report.reasons) > 1 else "")
        raise VerificationFailed(f"{report.candidate} is not what {report.source} was", found=found)
