"""The report of `inspect`: one pass over headers and config, and over the data only if asked."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint.index import MTP_FILE, CheckpointIndex
from converters.checkpoint.reader import CheckpointReader
from converters.inspect.catalog import CheckFinding
from converters.inspect.logical import LogicalView, logical_view
from converters.inspect.parallel import ParallelReport, parallel_report
from converters.inspect.quantization import Quantization, describe, read_declaration
from converters.inspect.quantized import quantized_findings
from converters.inspect.slots import join_slots
from converters.inspect.structure import Structure, compare_with_config
from converters.inspect.survey import Survey, survey
from converters.inspect.totals import DtypeRow, Totals, census, count
from converters.inspect.variant import MtpFacts, Variant, detect_variant


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What can be said only with a config that is understood."""

    variant: Variant
    mtp: MtpFacts
    quantization: Quantization
    totals: Totals
    parallel: ParallelReport


@dataclass(frozen=True, slots=True)
class InspectReport:
    """What a checkpoint is and what is wrong with it.

    Attributes:
        label: the folder or hub id, as the user named it.
        model: None where config.json cannot be used.
        missing: official tensors that are nowhere, with why.
        digest: of the content, where asked for; None otherwise, and where a file cannot be read.
        values_checked: the data was read and looked at.
    """

    label: str
    survey: Survey
    view: LogicalView
    model: ModelFacts | None
    structure: Structure | None
    census: tuple[DtypeRow, ...]
    findings: tuple[CheckFinding, ...]
    digest: str | None = None
    values_checked: bool = False

    @property
    def missing(self) -> dict[str, str]:
        """Official tensors that are nowhere, with why."""
        return self.structure.missing if self.structure else {}

    @property
    def unexpected(self) -> tuple[str, ...]:
        """Stored tensors that the config does not ask for."""
        return self.structure.unexpected if self.structure else ()

    @property
    def fatal(self) -> tuple[CheckFinding, ...]:
        """Findings that make the checkpoint corrupt or incomplete."""
        return tuple(finding for finding in self.findings if finding.is_fatal)

    def to_json(self, *, tensors: bool = False) -> dict[str, Any]:
        """Return the report as plain values; every stored tensor too, if asked."""
        model = asdict(self.model) if self.model else {}
        found: dict[str, Any] = {
            "checkpoint": self.label,
            "finished": not self.fatal,
            "layout": self.view.layout,
            **model,
            "dtypes": [asdict(row) for row in self.census],
            "files": self.survey.file_bytes,
            "findings": [_finding_json(finding) for finding in self.findings],
            "missing": self.missing,
            "unexpected": list(self.unexpected),
            "values_checked": self.values_checked,
            "content_sha256": self.digest,
        }
        if tensors:
            found["tensors"] = [
                {"name": name, "dtype": e.dtype, "shape": list(e.shape), "bytes": e.nbytes, "file": file}
                for name, (file, e) in self.survey.entries.items()
            ]
        return found


def _finding_json(finding: CheckFinding) -> dict[str, Any]:
    check = finding.check
    return {
        "number": check.number,
        "severity": check.severity.value,
        "title": check.title,
        "subject": finding.subject,
        "expected": finding.expected,
        "found": finding.found,
        "reason": check.reason,
        "remedy": check.remedy,
    }


def inspect_folder(folder: Path, label: str) -> InspectReport:
    """Return the report of a folder from its headers and JSON files alone.

    Raises:
        SecurityError: see `survey`.
    """
    found = survey(folder)
    view = logical_view(found.entries, found.config, found.unreadable)
    rows = census(entry for _, entry in found.entries.values())
    if found.config is None or view.stored is None:
        return InspectReport(label, found, view, None, None, rows, _ordered(found.findings))
    declared = read_declaration(found.raw_config, folder)
    join_slots(view, declared.schemes)
    structure = compare_with_config(view.stored, view, found.unreadable, declared)
    mtp = mtp_facts(found, structure, view)
    quantization = describe(structure.modules, structure.schema.tensors, declared, found.raw_config)
    model = ModelFacts(
        variant=detect_variant(found.config, mtp, has_correction_bias=structure.schema.has_router_bias),
        mtp=mtp,
        quantization=quantization,
        totals=count(structure, view, rows, declared),
        parallel=parallel_report(found.config, quantization.group_size, is_quantized=quantization.modules > 0),
    )
    quantized = quantized_findings(structure.layout, structure.modules, declared)
    findings = _ordered([*found.findings, *structure.findings, *quantized])
    return InspectReport(label, found, view, model, structure, rows, findings)


def _ordered(findings: list[CheckFinding]) -> tuple[CheckFinding, ...]:
    return tuple(sorted(findings, key=lambda finding: (finding.check.severity, finding.check.number)))


def mtp_facts(found: Survey, structure: Structure, view: LogicalView) -> MtpFacts:
    """Return how the MTP layer is shipped."""
    layer = structure.schema.mtp_layer
    tensors = [
        tensor
        for tensor in view.tensors.values()
        if layer is not None and tensor.parsed is not None and tensor.parsed.layer == layer
    ]
    files = {found.entries[piece.stored][0] for tensor in tensors for piece in tensor.pieces}
    return MtpFacts(
        layer,
        structure.schema.has_mtp_copies,
        files == {MTP_FILE},
        len(tensors),
        sum(tensor.nbytes for tensor in tensors),
    )


def scan_content(
    report: InspectReport, *, want_hash: bool, want_values: bool, on_bytes: Callable[[int], None]
) -> InspectReport:
    """Return the report with the content digest and the findings on values; reads all data once.

    Args:
        report: what the headers say.
        want_hash: compute the digest; there is none if a file of the checkpoint cannot be read.
        want_values: look for NaN, Inf, constant tensors and bad scales.
        on_bytes: called with the bytes just read, from several threads.
    """
    from converters.inspect.checks import check_values
    from converters.inspect.content import ContentScan, content_digest
    from converters.inspect.quantized import check_globals

    entries: Mapping[str, Any] = report.survey.entries
    index = CheckpointIndex(report.survey.folder, dict(entries), tuple(report.survey.file_bytes))
    with CheckpointReader(index) as reader:
        contents = list(ContentScan(reader, want_hash, want_values, on_bytes).run(report.view.tensors.values()))
    is_whole = not (report.survey.unreadable or report.view.misfits or any(content.error for content in contents))
    values = [*check_values(contents), *check_globals(contents)] if want_values else []
    return InspectReport(
        report.label,
        report.survey,
        report.view,
        report.model,
        report.structure,
        report.census,
        _ordered([*report.findings, *values]),
        digest=content_digest(contents) if want_hash and is_whole else None,
        values_checked=want_values,
    )
