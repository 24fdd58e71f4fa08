"""The certificate as JSON has it, without its tensors but for the worst of them."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from converters.quant.certificate import Certificate, TensorFigures

SCHEMA = "glm4moe.weights/1"


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
