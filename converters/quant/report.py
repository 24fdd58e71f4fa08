"""The certificate as a file: every tensor with its error, for whoever publishes a checkpoint, and for its card."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from converters.checkpoint.writer import write_file
from converters.config import read_json
from converters.errors import InputError
from converters.quant.certificate import Certificate, TensorFigures

REPORT_FILE = "weights.json"
SCHEMA = "glm4moe.weights/1"
_MAX_REPORT_BYTES = 256 << 20


def certificate_json(certificate: Certificate, names: Mapping[str, str]) -> dict[str, Any]:
    """Return a certificate without its tensors, but for the worst of them.

    Args:
        certificate: what was found.
        names: what it is about: the folders.
    """
    return {
        "schema": SCHEMA,
        **names,
        "tensors_compared": len(certificate.tensors),
        "findings": [asdict(finding) for finding in certificate.findings],
        "schemes": [asdict(summary) for summary in certificate.summaries],
        "worst": [_tensor_json(figures) for figures in certificate.worst],
    }


def _tensor_json(figures: TensorFigures) -> dict[str, Any]:
    values = {**asdict(figures), "sqnr_db": figures.sqnr_db}
    return {name: _finite(value) for name, value in values.items() if value not in ("", None)}


def _finite(value: Any) -> Any:
    # JSON has no infinities; the command line spells them alike
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def report_path(path: Path) -> Path:
    """Return the file that a report is written to: the path itself if it is a JSON file, else one in that folder."""
    return path if path.suffix == ".json" else path / REPORT_FILE


def write_report(path: Path, certificate: Certificate, names: Mapping[str, str]) -> Path:
    """Write the report, one tensor a line, and return its file; equal certificates give equal bytes.

    Raises:
        ResourceError: the file cannot be written.
    """
    file = report_path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(certificate_json(certificate, names), indent=1, ensure_ascii=False)
    lines = ",\n".join(f"  {json.dumps(_tensor_json(figures))}" for figures in certificate.tensors)
    write_file(file, f'{head[:-2]},\n "tensors": [\n{lines}\n ]\n}}\n'.encode())
    return file


def read_report(path: Path) -> dict[str, Any]:
    """Return a report that `write_report` wrote.

    Raises:
        InputError: it is none.
    """
    report = read_json(report_path(path), _MAX_REPORT_BYTES)
    if report.get("schema") != SCHEMA or not isinstance(report.get("tensors"), list):
        raise InputError(str(report_path(path)), expected=f"a report of the form {SCHEMA}", found="something else")
    return report
