"""Plant one fault, verify, diagnose, and hold what comes out against what was planted."""

import json
import shutil
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from quantized import DIALECTS
from quantized_from import plain_modules
from safetensors.torch import load_file, save_file

from converters.compare import StructureReport, compare_structure
from converters.convert import ConvertOptions, plan_convert
from converters.diagnosis.cause import Cause
from converters.diagnosis.diagnose import diagnose_folders
from converters.errors import InputError
from converters.findings import Finding, Severity
from converters.job import run
from converters.numerics.fp8 import quantize_block
from converters.pipeline import RunOptions
from converters.quant.certificate import Certificate
from converters.quant.certify import CertifyOptions, certify_folders
from converters.quant.scheme import Arithmetic
from converters.source import open_source
from tests.faults.planted.copies import BF16, FP8, SHARDED, SHARDED_FP8, TINY, Copies, Copy, schema, shard
from tests.faults.planted.faults import Fault

REFUSED, STRUCTURE, WEIGHTS = "refused", "structure", "weights"
_WHOLE = {SHARDED: BF16, SHARDED_FP8: FP8}
_BLOCK = 128


@dataclass(frozen=True)
class Verified:
    """What the levels that need no model say of two folders.

    Attributes:
        level: the first that found something; empty if none did.
        severity: of the worst finding; `refused` where a folder is not opened at all.
    """

    level: str
    severity: str
    structure: StructureReport | None
    weights: Certificate | None
    findings: tuple[Finding, ...]
    causes: tuple[Cause, ...]


@dataclass(frozen=True)
class Outcome:
    """What was made of a fault in one copy."""

    fault: Fault
    form: str
    verified: Verified
    is_named: bool
    cause: Cause | None
    seconds: float

    @property
    def is_caught(self) -> bool:
        return bool(self.verified.level)


def verify(source: Path, candidate: Path, workers: int = 1) -> Verified:
    """Run the levels as the command does: weights only where the structure is sound; then the diagnosis."""
    try:
        structure = compare_structure(source, candidate)
    except InputError as error:
        refusal = Finding(Severity.FAIL, error.subject, error.expected, error.found)
        return Verified(REFUSED, REFUSED, None, None, (refusal,), diagnose_folders(source, candidate))
    findings, weights = structure.findings, None
    if all(finding.severity is Severity.WARN for finding in findings):
        weights = certify_folders(source, candidate, CertifyOptions(workers), lambda _: lambda _: None)
        findings += weights.findings
    level = STRUCTURE if structure.findings else WEIGHTS if findings else ""
    severity = str(min((finding.severity for finding in findings), default=""))
    return Verified(
        level, severity, structure, weights, findings, diagnose_folders(source, candidate, structure, weights)
    )


def outcome(copies: Copies, fault: Fault, form: str, folder: Path) -> Outcome:
    """Plant a fault and see what a verification makes of it."""
    begin = time.perf_counter()
    copy = copies.get(_WHOLE.get(form, form))
    expected = set(fault.plant(copy))
    try:
        source, damaged = _PATHS[fault.path](copies, copy, form, folder)
        verified = verify(source, damaged)
    finally:
        shutil.rmtree(folder)
    cause = next((one for one in verified.causes if _is_expected(fault, expected, one)), None)
    is_named = cause is not None or _names_it(fault, expected, verified)
    return Outcome(fault, form, verified, is_named, cause, time.perf_counter() - begin)


def _is_expected(fault: Fault, expected: set[str], cause: Cause) -> bool:
    if cause.code is not fault.code:
        return False
    return set(cause.tensors) == expected if expected else fault.subject in cause.subject


def _names_it(fault: Fault, expected: set[str], verified: Verified) -> bool:
    """Return whether the findings alone name what was damaged, and nothing else."""
    if not expected:
        return any(fault.subject in finding.subject for finding in verified.findings)
    named = {name for finding in verified.findings for name in schema().tensors if _is_about(finding.subject, name)}
    return named == expected


def _is_about(subject: str, name: str) -> bool:
    module = name.removesuffix("weight")
    return subject.endswith(name) or (module != name and f"tensor {module}weight" in subject)


def _write(copies: Copies, copy: Copy, form: str, folder: Path) -> tuple[Path, Path]:
    written = copy.write(folder / "whole")
    return TINY, shard(written, folder / "cut") if form in _WHOLE else written


def _restore(copies: Copies, copy: Copy, form: str, folder: Path) -> tuple[Path, Path]:
    """Restore a quantized copy to weights, and forget the scales of some."""
    quantized, restored = copies.get(FP8), folder / "restored"
    source = quantized.write(folder / "quantized")
    with open_source(source) as opened:
        run(plan_convert(opened, ConvertOptions(dequantize=True)), restored, RunOptions(1), lambda _: None)
    (file,) = restored.glob("*.safetensors")
    tensors = load_file(file)
    for name in _mtp_weights():
        tensors[name] = quantized.tensors[name].to(torch.bfloat16)
    save_file(tensors, file)
    return source, restored


def _mtp_weights() -> list[str]:
    from tests.faults.planted.faults import MTP, expert

    return expert(MTP, 0)


def _cut_in_block(copies: Copies, copy: Copy, form: str, folder: Path) -> tuple[Path, Path]:
    """Cut codes of 384 columns in two, and their three blocks of scales as far as each half reaches."""
    cut = shard(copies.get(BF16).write(folder / "whole"), folder / "cut")
    names = set(_dense_downs())
    weights = {name: quantize_block(copy_weight(copies, name), Arithmetic.FLOAT32) for name in names}
    manifest = json.loads((cut / "glm4moe-manifest.json").read_text())
    for file, facts in manifest["shards"].items():
        tensors = load_file(cut / file)
        for name, (codes, scales) in weights.items():
            half = codes.shape[1] // 2
            first = facts["rank"] * half
            tensors[name] = codes[:, first : first + half].contiguous()
            blocks = slice(first // _BLOCK, -(-(first + half) // _BLOCK))
            tensors[f"{name}_scale"] = scales[:, blocks].to(torch.bfloat16).contiguous()
        save_file(tensors, cut / file)
        facts["bytes"] = (cut / file).stat().st_size
        _record(manifest["tensors"], tensors, facts["rank"])
    (cut / "glm4moe-manifest.json").write_text(json.dumps(manifest))
    block: dict[str, Any] = json.loads(json.dumps(DIALECTS["ct-fp8-block"].config))
    block["config_groups"]["group_0"]["weights"]["block_structure"] = [_BLOCK, _BLOCK]
    kept = [t.module for t in schema().tensors.values() if len(t.shape) == 2 and t.name not in names]
    assert set(plain_modules(schema())) < set(kept)
    config = json.loads((cut / "config.json").read_text())
    (cut / "config.json").write_text(json.dumps({**config, "quantization_config": {**block, "ignore": kept}}))
    return TINY, cut


def _record(recorded: dict[str, Any], tensors: dict[str, torch.Tensor], rank: int) -> None:
    """Record a rank's tensors, as whoever wrote them would."""
    for name, value in tensors.items():
        digest = sha256(value.view(torch.uint8).numpy().tobytes() if value.dim() else value.numpy().tobytes())
        facts = recorded.setdefault(name, {"dtype": "", "shape": [], "slices": []})
        others = [part for part in facts["slices"] if part["ranks"] != [rank]]
        facts["slices"] = [*others, {"ranks": [rank], "sha256": digest.hexdigest()}]


def copy_weight(copies: Copies, name: str) -> torch.Tensor:
    """Return an undamaged weight."""
    return copies.get(BF16).tensors[name]


def _dense_downs() -> list[str]:
    from tests.faults.planted.faults import FAULTS

    (fault,) = (fault for fault in FAULTS if fault.path == "cut")
    return fault.plant(Copy({}, {}, {}))


_PATHS = {"": _write, "restored": _restore, "cut": _cut_in_block}
