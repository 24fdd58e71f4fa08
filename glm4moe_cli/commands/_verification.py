"""What verify does around its levels: is there a point in going on, why did it fail, how is it shown."""

import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import converters
from converters.compare import StructureReport, compare_structure
from converters.errors import Glm4MoeError, VerificationFailed
from glm4moe_cli._output import Output
from runtime.verify.check import counted
from runtime.verify.report import Levels, Verdict, VerifyReport, build_report
from runtime.verify.tables import (
    ANSWER_COLUMNS,
    CAUSE_COLUMNS,
    EXPERT_COLUMNS,
    FINDING_COLUMNS,
    LAYER_COLUMNS,
    METRIC_COLUMNS,
    ROUTING_COLUMNS,
    SCHEME_COLUMNS,
    WORST_COLUMNS,
    answer_rows,
    cause_rows,
    expert_rows,
    finding_rows,
    layer_rows,
    metric_rows,
    routing_rows,
    scheme_rows,
    worst_rows,
)

if TYPE_CHECKING:
    from converters.diagnosis.cause import Cause
    from runtime.verify.report_html.words import Decode

# options that change how long a run takes or where its results go, and nothing in them
_WITHOUT_EFFECT = frozenset({"workers", "max_memory", "report"})
# more of them say no more; --json has all
MAX_FINDINGS = 20
# a warning names so many, and the next command
MAX_WARNINGS = 5


def is_sound(folders: tuple[Path, Path], structure: StructureReport) -> bool:
    """Return whether two checkpoints hold the same tensors, so that their weights can be compared at all."""
    return build_report(folders, structure.scheme, Levels(structure=structure)).verdict is not Verdict.FAIL


def scheme_of(candidate: Path) -> str:
    """Return the kind of conversion that a candidate shows without its source: how its weights are stored."""
    from converters.compare import Outcome
    from converters.compare_side import Side

    side = Side.open("candidate", candidate)
    if side.declared is None:
        # a plain copy may be of another dtype
        return "cast"
    held = (side.held(tensor) for tensor in side.schema.tensors.values())
    schemes = dict.fromkeys(found.scheme for found in held if found is not None and found.scheme is not None)
    quantized = {Outcome.QUANTIZED: len(schemes)}
    inputs = side.declared.quantizes_inputs
    return StructureReport("", str(candidate), (), quantized, "present", (), tuple(schemes), inputs).scheme


def compared(output: Output, source: Path, candidate: Path) -> StructureReport:
    """Compare headers and config; causes of a candidate that cannot be opened are said before the error.

    Raises:
        InputError, ConfigError: a side is no complete checkpoint.
    """
    try:
        return compare_structure(source, candidate)
    except Glm4MoeError:
        from converters.diagnosis.diagnose import diagnose_folders

        # a source that cannot be opened either has no diagnosis; its own error is the one that is told
        with suppress(Glm4MoeError):
            for cause in diagnose_folders(source, candidate):
                output.warning(f"{cause}. {cause.remedy}")
        raise


def diagnosed(output: Output, report: VerifyReport) -> VerifyReport:
    """Return the report with the causes that the files prove, where structure, weights or layers are not as they must.

    A diagnosis that cannot be made is said, and changes nothing.
    """
    if report.verdict is Verdict.PASS:
        return report
    from converters.diagnosis.diagnose import diagnose_folders

    levels, causes = report.levels, tuple["Cause", ...]()
    try:
        causes = diagnose_folders(
            Path(report.source), Path(report.candidate), levels.structure, levels.weights, report.wrong_layers
        )
    except Glm4MoeError as error:
        output.warning(f"No diagnosis: {error}")
    return replace(report, causes=causes)


def provenance(folders: tuple[Path | None, Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """Return versions, digests of headers and config, and the options of the run, for reports."""
    names = "source", "candidate"
    digests = {name: _digest(folder) for name, folder in zip(names, folders, strict=True) if folder is not None}
    return {
        "versions": {"glm4moe": converters.__version__, "python": platform.python_version(), **_torch_version()},
        "digests": digests,
        "options": {
            name: value for name, value in options.items() if value not in (None, False) and name not in _WITHOUT_EFFECT
        },
    }


def _digest(folder: Path) -> str:
    """Return what a checkpoint's headers and config are; empty where it cannot be opened, as findings say."""
    from converters.checkpoint.manifest import source_digest
    from converters.shard.whole import open_whole

    try:
        with open_whole(folder) as source:
            return source_digest(source.reader, source.raw_config)
    except Glm4MoeError:
        return ""


def _torch_version() -> dict[str, str]:
    """Return torch's version if it was used."""
    import sys

    torch = sys.modules.get("torch")
    return {} if torch is None else {"torch": str(torch.__version__)}


def show(output: Output, report: VerifyReport) -> None:
    """Print the verdict first, then what it rests on; the JSON document holds all of it."""
    output.line(report.headline)
    if report.causes:
        output.table("Causes", CAUSE_COLUMNS, cause_rows(report))
    findings = finding_rows(report)
    if findings:
        output.table("Findings", FINDING_COLUMNS, findings[:MAX_FINDINGS])
        if len(findings) > MAX_FINDINGS:
            output.hint(f"{counted(len(findings) - MAX_FINDINGS, 'more findings')}; --json lists all of them.")
    output.table("Metrics", METRIC_COLUMNS, metric_rows(report))
    _show_weights(output, report)
    _show_models(output, report)
    if report.verdict is Verdict.WARN:
        for reason in report.reasons[:MAX_WARNINGS]:
            output.warning(reason)
        if len(report.reasons) > MAX_WARNINGS:
            more = counted(len(report.reasons) - MAX_WARNINGS, "more warnings")
            output.warning(f"{more}; --json lists all of them.")
    output.result(report.to_json())


def _show_weights(output: Output, report: VerifyReport) -> None:
    weights = report.levels.weights
    if weights is None:
        return
    output.table("Weights", SCHEME_COLUMNS, scheme_rows(weights))
    if weights.worst:
        output.table("Tensors with the largest error", WORST_COLUMNS, worst_rows(weights))


def _show_models(output: Output, report: VerifyReport) -> None:
    models, levels = report.models, report.levels
    if models is not None and models.layers:
        output.table("Layers", LAYER_COLUMNS, layer_rows(models.layers))
        experts = expert_rows(models.layers)
        if experts:
            output.table("Experts with the largest error", EXPERT_COLUMNS, experts)
    if levels.routing:
        output.table("Routing", ROUTING_COLUMNS, routing_rows(levels.routing))
    if levels.text is not None:
        output.table("Answers", ANSWER_COLUMNS, answer_rows(levels.text))
    if models is not None:
        compute = f"{models.dtype} on {models.device}, activations {models.activations}"
        output.facts("Protocol", {"tokens": models.protocol, "compute": compute})


def raise_failure(report: VerifyReport, *, strict: bool) -> None:
    """End with exit code 3 where the verification failed, or where it warns and warnings are to fail."""
    if report.verdict is Verdict.FAIL or (strict and report.verdict is Verdict.WARN):
        found = report.reasons[0] + (f" and {len(report.reasons) - 1} more" if len(report.reasons) > 1 else "")
        raise VerificationFailed(f"{report.candidate} is not what {report.source} was", found=found)


def decoder(folder: Path) -> "Decode | None":
    """Return what turns token ids into text for a report; None without a tokenizer."""
    from runtime.engine.tokenizer import Tokenizer

    try:
        return Tokenizer.open(folder).decode
    except Glm4MoeError:
        return None
