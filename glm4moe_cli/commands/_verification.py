"""What verify does once its options are known: run both models, show the report, fail where it fails."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from converters.errors import UsageError, VerificationFailed
from glm4moe_cli._output import Output
from runtime.verify.limits import Overrides, choose_limits
from runtime.verify.report import Verdict, VerifyReport, build_report
from runtime.verify.tables import (
    FINDING_COLUMNS,
    METRIC_COLUMNS,
    ROUTING_COLUMNS,
    finding_rows,
    metric_rows,
    routing_rows,
)
from runtime.verify.windows import Window

# more of them say no more; --json has all
MAX_FINDINGS = 20


def compare_on_text(output: Output, report: VerifyReport, scheme: str, options: Mapping[str, Any]) -> VerifyReport:
    """Run both models on the text, and judge again with what came out."""
    from runtime.config import resolve_device
    from runtime.verify.compare import LogitsOptions, compare_logits, encode_text

    overrides = Overrides(**{field.name: options[field.name] for field in fields(Overrides)})
    names = ("num_tokens", "context_length", "stride", "seed")
    how = LogitsOptions(device=resolve_device(options["device"]), **{name: options[name] for name in names})
    folders = Path(report.source), Path(report.candidate)
    content = _read_text(options["text"])
    text = encode_text(folders[0], content, how)
    num_bytes = len(content.encode()) * text.plan.num_tokens // text.plan.num_text_tokens
    with output.progress("verify", num_bytes) as progress:

        def advance(window: Window) -> None:
            progress.describe(f"window {window.index + 1}/{len(text.plan.windows)}")
            progress.advance(num_bytes * window.end // text.plan.num_tokens - progress.done_bytes)

        progress.describe("loading both models")
        logits = compare_logits(*folders, text, how, advance)
    limits = choose_limits(scheme, overrides)
    return build_report(folders, scheme, structure=report.structure, logits=logits, limits=limits)


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
        output.table("Structure", FINDING_COLUMNS, findings[:MAX_FINDINGS])
        if len(findings) > MAX_FINDINGS:
            output.hint(f"{len(findings) - MAX_FINDINGS} more findings; --json lists all of them.")
    output.table("Metrics", METRIC_COLUMNS, metric_rows(report))
    if report.logits is not None:
        output.table("Routing", ROUTING_COLUMNS, routing_rows(report.logits.routing))
        output.facts(
            "Protocol", {"text": report.logits.protocol, "compute": report.logits.dtype, "device": report.logits.device}
        )
    if report.verdict is Verdict.WARN:
        for reason in report.reasons[:MAX_FINDINGS]:
            output.warning(reason)
    output.result(report.to_json())


def raise_failure(report: VerifyReport, *, strict: bool) -> None:
    """End with exit code 3 where the verification failed, or where it warns and warnings are to fail."""
    if report.verdict is Verdict.FAIL or (strict and report.verdict is Verdict.WARN):
        found = report.reasons[0] + (f" and {len(report.reasons) - 1} more" if len(report.reasons) > 1 else "")
        raise VerificationFailed(f"{report.candidate} is not what {report.source} was", found=found)
