"""Two checkpoints held against each other by headers and config alone: is everything there, in a form that is declared?

Each side is first checked against its own config (names, shapes, dtypes, companions) in the layout that it has, then
official tensor by official tensor against the other. No tensor data is read.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from pathlib import Path
from typing import Any

from converters.checkpoint.dtypes import BY_CONFIG_NAME
from converters.compare_files import compare_files
from converters.compare_side import Held, Side
from converters.config import CONFIG_FILE, Glm4MoeConfig
from converters.findings import Finding, fail, warn
from converters.inspect.quantized import FORMAT_CHECKS
from converters.inspect.report import inspect_folder
from converters.schema import DtypePolicy, Tensor
from converters.shard.source import is_sharded
from converters.source import LAYOUT_KEY

# what a conversion may change in config.json
ALLOWED_CONFIG_KEYS = frozenset({"quantization_config", "torch_dtype", "dtype", "transformers_version", LAYOUT_KEY})
# read through Glm4MoeConfig, which knows that both spellings of a field mean the same
_RESPELLED_KEYS = frozenset({"rope_parameters", "rope_scaling", "num_mtp_layers"})
# how the names of formats begin, finest first
_BY_COARSENESS = ("int8", "fp8", "nvfp4", "int4")


class Outcome(StrEnum):
    """What became of an official tensor of the source. REPACKED: the same values or codes, in another layout."""

    SAME = "same"
    REPACKED = "repacked"
    CAST = "cast"
    QUANTIZED = "quantized"
    DEQUANTIZED = "dequantized"
    DROPPED = "dropped"
    MISSING = "missing"


@dataclass(frozen=True, slots=True)
class StructureReport:
    """What the headers and configs of two checkpoints say.

    Attributes:
        outcomes: number of source tensors (scales not counted) per outcome; they add up to all of them.
        mtp: `present`, `dropped` or `absent` (the source has none).
        config_changes: (key, source value, candidate value) of the keys that a conversion may change.
        schemes: what the candidate's codes are that the source's weights became, each once.
        quantizes_inputs: engines that follow the candidate's config quantize activations too.
    """

    source: str
    candidate: str
    findings: tuple[Finding, ...]
    outcomes: dict[Outcome, int]
    mtp: str
    config_changes: tuple[tuple[str, Any, Any], ...]
    schemes: tuple[str, ...] = ()
    quantizes_inputs: bool = True

    @property
    def scheme(self) -> str:
        """Return which conversion this is, a key of the limits of the levels above.

        Of several formats the coarsest counts. Another layout is an identity.
        """
        if self.outcomes.get(Outcome.QUANTIZED):
            kinds = [kind for kind in _BY_COARSENESS if any(name.startswith(kind) for name in self.schemes)]
            kind = kinds[-1] if kinds else "fp8"
            return kind if self.quantizes_inputs or kind == "fp8" else f"{kind}-weight-only"
        if self.outcomes.get(Outcome.DEQUANTIZED):
            return "dequantized"
        return "cast" if self.outcomes.get(Outcome.CAST) else "identity"


def compare_structure(source: Path, candidate: Path) -> StructureReport:
    """Compare two checkpoint folders by headers, config and the files beside the weights.

    Raises:
        InputError: a folder that is no readable checkpoint; a tensor that is wrong or missing is a finding instead.
    """
    reference, converted = Side.open("source", source), Side.open("candidate", candidate)
    outcomes: Counter[Outcome] = Counter()
    schemes: dict[str, None] = {}
    findings = [
        *reference.findings(),
        *converted.findings(),
        *_pair_findings(reference, converted, outcomes, schemes),
        *_mtp_findings(reference, converted),
        *_config_findings(reference, converted),
        *(_format_findings(candidate) if converted.declared and not is_sharded(candidate) else ()),
        *compare_files(source, candidate, is_dequantized=reference.is_modelopt and not converted.is_modelopt),
    ]
    return StructureReport(
        source=str(source),
        candidate=str(candidate),
        findings=tuple(sorted(findings, key=lambda finding: finding.severity)),
        outcomes=dict(outcomes),
        mtp=_mtp_state(reference, converted),
        config_changes=tuple(
            (key, reference.raw_config.get(key), converted.raw_config.get(key))
            for key in sorted(ALLOWED_CONFIG_KEYS)
            if reference.raw_config.get(key) != converted.raw_config.get(key)
        ),
        schemes=tuple(schemes),
        quantizes_inputs=converted.declared is None or converted.declared.quantizes_inputs,
    )


def _pair_findings(
    reference: Side, converted: Side, outcomes: Counter[Outcome], schemes: dict[str, None]
) -> Iterator[Finding]:
    """Account for every official tensor of the source, and for what the candidate has beyond them."""
    found: dict[Finding, None] = {}
    for tensor in reference.schema.tensors.values():
        before, after = reference.held(tensor), converted.held(tensor)
        if before is None:
            continue
        if after is not None:
            outcome = _outcome(before, after)
            if outcome is Outcome.QUANTIZED and after.scheme is not None:
                schemes[after.scheme] = None
            # one stored tensor may hold many official ones, and is named once
            found |= dict.fromkeys(_dtype_findings(tensor, outcome, (before, after), (reference, converted)))
        elif tensor.layer == reference.schema.mtp_layer is not None and not converted.schema.has_mtp:
            outcome = Outcome.DROPPED
        else:
            outcome = Outcome.MISSING
            # a tensor that the candidate's own config asks for is listed already
            if tensor.name not in converted.schema.tensors:
                found[fail(converted.subject(tensor.name), "as in the source", "nothing")] = None
        outcomes[outcome] += 1
    yield from found
    for name, tensor in converted.schema.tensors.items():
        held = None if name in reference.schema.tensors else converted.held(tensor)
        if held is not None:
            yield fail(converted.subject(held.places[0].stored.name), "no such tensor, as in the source", held.dtype)
    yield from _cache_scale_findings(reference, converted)


def _outcome(before: Held, after: Held) -> Outcome:
    if (before.dtype, before.scheme) == (after.dtype, after.scheme):
        return Outcome.SAME if before.where == after.where else Outcome.REPACKED
    if before.is_plain == after.is_plain:
        return Outcome.CAST
    return Outcome.QUANTIZED if before.is_plain else Outcome.DEQUANTIZED


def _dtype_findings(
    tensor: Tensor, outcome: Outcome, held: tuple[Held, Held], sides: tuple[Side, Side]
) -> Iterator[Finding]:
    """Check that a dtype changed only where the candidate's config says so."""
    (reference, converted), (before, after) = sides, (held[0].dtype, held[1].dtype)
    subject, target = converted.subject(held[1].places[0].stored.name), BY_CONFIG_NAME[converted.config.dtype]
    if tensor.spec.dtype is DtypePolicy.KEEP_FP32 and before == "F32" and after != "F32":
        yield fail(subject, "F32, as in the source: a rounded correction bias changes the choice of experts", after)
    elif outcome is Outcome.CAST and not held[1].is_plain:
        yield fail(subject, f"{before} ({held[0].scheme}), as in the source", f"{after} ({held[1].scheme})")
    elif outcome is Outcome.DEQUANTIZED and after != target:
        yield fail(subject, f"{target}, the dtype of its config", after)
    elif outcome is Outcome.CAST:
        if after != target:
            yield fail(subject, f"{before} as in the source, or {target} as in its config", after)
        elif converted.config.dtype == reference.config.dtype:
            yield warn(subject, f"{before}, as in the source", f"{after}, the dtype of both configs")


def _cache_scale_findings(reference: Side, converted: Side) -> Iterator[Finding]:
    """Check that a candidate that is still quantized has the scales of the KV cache, where it has the weights."""
    # the dialects hang them on different modules
    owners = set(converted.cache_scales.values())
    for name, owner in reference.cache_scales.items():
        if converted.declared and owner in converted.schema.tensors and owner not in owners:
            yield fail(converted.subject(name), "as in the source", "nothing")


def _format_findings(candidate: Path) -> Iterator[Finding]:
    """Yield what engines would stumble over in a quantized candidate; what it shares with its own source too."""
    for found in inspect_folder(candidate, "").findings:
        if found.check in FORMAT_CHECKS:
            yield Finding(found.check.severity, f"candidate: {found.subject}", found.expected, found.found)


def _mtp_state(reference: Side, converted: Side) -> str:
    if not reference.schema.has_mtp:
        return "absent"
    return "present" if converted.schema.has_mtp else "dropped"


def _mtp_findings(reference: Side, converted: Side) -> Iterator[Finding]:
    for side in (reference, converted):
        announced = side.config.num_nextn_predict_layers > 0
        if announced and not side.schema.has_mtp and not (side is converted and reference.schema.has_mtp):
            yield warn(f"{side.label}: MTP layer", "present, as its config announces", "no tensor of it")
    if _mtp_state(reference, converted) != "dropped":
        return
    if converted.config.num_nextn_predict_layers:
        yield fail("candidate: MTP layer", "present, or num_nextn_predict_layers 0", "dropped, but still announced")
    else:
        yield warn("candidate: MTP layer", "present, as in the source", "dropped, as its config declares")


def _config_findings(reference: Side, converted: Side) -> Iterator[Finding]:
    """Compare what the model is (fail), then the keys that this tool does not read (warn)."""
    names = {field.name for field in fields(Glm4MoeConfig)}
    dropped = not converted.schema.has_mtp and converted.config.num_nextn_predict_layers == 0
    for name in sorted(names - {"dtype"} - ({"num_nextn_predict_layers"} if dropped else set())):
        before, after = getattr(reference.config, name), getattr(converted.config, name)
        if before != after:
            yield fail(f"candidate: {CONFIG_FILE}: {name}", _show(before), _show(after))
    others = reference.raw_config.keys() | converted.raw_config.keys()
    for key in sorted(others - names - _RESPELLED_KEYS - ALLOWED_CONFIG_KEYS):
        before, after = reference.raw_config.get(key), converted.raw_config.get(key)
        if before != after:
            yield warn(f"candidate: {CONFIG_FILE}: {key}", _show(before), _show(after))


def _show(value: Any) -> str:
    return "nothing" if value is None else repr(value)[:200]
