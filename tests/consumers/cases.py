"""Results of `quantize`, one for every scheme and format, of a random model whose widths suit all of them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from builders import small_checkpoint

from converters.job import run
from converters.pipeline import RunOptions
from converters.quant.choice import QuantizeOptions, choose
from converters.quant.scheme import SCHEMES_BY_FORMAT, Format, MtpPolicy
from converters.quant.stats import CalibrationStats
from converters.quantize import plan_quantize
from converters.source import open_source
from runtime.calibrate.options import CalibrateOptions
from runtime.calibrate.run import CalibrationJob
from runtime.calibrate.text import CalibrationText

VOCABULARY = 128
# multiples of 128 everywhere, and more than one block in each direction
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
}
MTP_LAYER = 3
IDS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))


@dataclass(frozen=True)
class Case:
    """A quantization: its name in test ids, and its options."""

    name: str
    scheme: str
    format: Format = Format.COMPRESSED_TENSORS
    options: dict[str, Any] = field(default_factory=dict)


def cases() -> dict[str, Case]:
    found = [Case(f"{scheme}, {kind}", scheme, kind) for kind, names in SCHEMES_BY_FORMAT.items() for scheme in names]
    ct = Format.COMPRESSED_TENSORS
    found += [
        *(Case(f"int8-weight-only g{g}", "int8-weight-only", ct, {"group_size": g}) for g in ("32", "64", "128")),
        Case("mixed", "experts=nvfp4-weight-only,shared-experts=int8,attention=fp8", ct),
        Case("fp8, kv-cache", "fp8", ct, {"kv_cache": "fp8"}),
        Case("fp8-static, kv-cache, modelopt", "fp8-static", Format.MODELOPT, {"kv_cache": "fp8"}),
        Case("nvfp4, mtp", "nvfp4", ct, {"mtp": MtpPolicy.QUANTIZE}),
        Case("nvfp4, mtp, modelopt", "nvfp4", Format.MODELOPT, {"mtp": MtpPolicy.QUANTIZE}),
        Case("nvfp4-weight-only, mtp experts", "nvfp4-weight-only", ct, {"mtp": MtpPolicy.QUANTIZE_EXPERTS}),
    ]
    return {case.name: case for case in found}


CASES = cases()


def random_source(folder: Path) -> Path:
    """Write the unquantized model; tame weights, so that its logits tell more than the largest of them."""
    return small_checkpoint(folder, mtp_copies=False, **SIZES)


def random_stats(folder: Path) -> CalibrationStats:
    """Return the statistics of random tokens."""
    generator = torch.Generator().manual_seed(3)
    windows = tuple(tuple(torch.randint(0, VOCABULARY, (64,), generator=generator).tolist()) for _ in range(4))
    with open_source(folder) as source:
        text = CalibrationText(windows, ({"sha256": "0" * 64},), sum(map(len, windows)))
        return CalibrationJob(source, text, CalibrateOptions()).run()


def engines_of(src: Path, case: Case, stats: CalibrationStats) -> tuple[str, ...]:
    """Return the engines that the plan names."""
    options = QuantizeOptions(scheme=case.scheme, format=case.format, **case.options)
    with open_source(src) as source:
        needed = stats if choose(source.schema, options).needs_stats else None
        return plan_quantize(source, options.with_stats(needed)).engines


def quantized(src: Path, dst: Path, case: Case, stats: CalibrationStats | None) -> Path:
    """Quantize into a new folder and return it; statistics are only taken where they are needed."""
    options = QuantizeOptions(scheme=case.scheme, format=case.format, **case.options)
    with open_source(src) as source:
        needed = stats if choose(source.schema, options).needs_stats else None
        run(plan_quantize(source, options.with_stats(needed)), dst, RunOptions(1), lambda _: None)
    return dst
