"""Small quantizations for tests: a checkpoint whose widths suit every scheme, its statistics, and the run."""

import json
from pathlib import Path
from typing import Any

from builders import small_checkpoint

from converters.job import JobOptions, Outcome, run
from converters.pipeline import RunOptions
from converters.quant.choice import QuantizeOptions
from converters.quant.identity import model_digest
from converters.quant.scheme import SCHEMES, Arithmetic, Format, MtpPolicy, Preset, ScaleSearch, scheme_info
from converters.quant.stats import CalibrationStats
from converters.quantize import plan_quantize
from converters.schema import DtypePolicy
from converters.source import open_source

# columns in whole blocks of 128, rows of k and v not
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "moe_intermediate_size": 128,
    "intermediate_size": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 24,
    "n_routed_experts": 2,
    "num_hidden_layers": 2,
}

# options that are not plain text
KINDS = {"format": Format, "arithmetic": Arithmetic, "search": ScaleSearch, "preset": Preset, "mtp": MtpPolicy}


def checkpoint(folder: Path, **changes: Any) -> Path:
    """Write a random checkpoint of SIZES, with an MTP layer."""
    return small_checkpoint(folder, **{**SIZES, **changes})


def statistics(folder: Path) -> CalibrationStats:
    """Return made-up statistics of a checkpoint: another value for every module."""
    with open_source(folder) as source:
        tensors = source.schema.tensors.values()
        modules = [tensor.module for tensor in tensors if tensor.spec.dtype is DtypePolicy.QUANTIZABLE]
        layers = range(source.config.num_hidden_layers + 1)
        return CalibrationStats(
            input_amax={module: 3.0 + number / 64 for number, module in enumerate(modules)},
            key_amax={layer: 20.0 + layer for layer in layers},
            value_amax={layer: 7.0 + layer for layer in layers},
            tokens=dict.fromkeys(modules, 100),
            filled={},
            provenance={"model_digest": model_digest(source)},
        )


def options_for(src: Path, scheme: str, **options: Any) -> QuantizeOptions:
    """Return options, with statistics where the scheme asks for them."""
    names = [pair.partition("=")[2] or pair for pair in scheme.split(",")]
    if options.get("kv_cache") or any(name in SCHEMES and scheme_info(name).has_input_scale for name in names):
        options.setdefault("stats", statistics(src))
    for name, kind in KINDS.items():
        if options.get(name) is not None:
            options[name] = kind(options[name])
    return QuantizeOptions(scheme=scheme, **options)


def quantize(src: Path, dst: Path, scheme: str, how: JobOptions | None = None, **options: Any) -> Outcome:
    """Quantize a folder into another."""
    with open_source(src) as source:
        plan = plan_quantize(source, options_for(src, scheme, **options))
        return run(plan, dst, RunOptions(2, 1 << 22), lambda _: None, how)


def block_of(folder: Path) -> dict[str, Any]:
    """Return quantization_config."""
    return json.loads((folder / "config.json").read_text())["quantization_config"]
