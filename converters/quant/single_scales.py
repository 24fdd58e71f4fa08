"""Scales that are one value each: none of them is compared by weights alone, and a wrong one is silent in engines."""

from math import prod
from pathlib import Path

from converters.checkpoint.index import CheckpointIndex
from converters.checkpoint.reader import CheckpointReader
from converters.findings import Finding
from converters.inspect.checks import check_values
from converters.inspect.content import ContentScan
from converters.inspect.logical import SCALES
from converters.inspect.quantized import check_globals
from converters.inspect.report import inspect_folder


def single_scale_findings(candidate: Path) -> tuple[Finding, ...]:
    """Return what is wrong with the scales of whole tensors, of inputs and of the KV cache.

    That is: no positive finite value; not shared by weights that engines multiply as one; an input scale of exactly 1,
    which is what writers leave where no calibration ran.
    """
    report = inspect_folder(candidate, "")
    single = [one for one in report.view.tensors.values() if one.suffix in SCALES and prod(one.shape) == 1]
    if not single:
        return ()
    index = CheckpointIndex(candidate, dict(report.survey.entries), tuple(report.survey.file_bytes))
    with CheckpointReader(index) as reader:
        contents = list(ContentScan(reader, False, True, lambda _: None).run(single))
    found = [*check_values(contents), *check_globals(contents)]
    return tuple(Finding(one.check.severity, f"candidate: {one.subject}", one.expected, one.found) for one in found)
