"""Fifty conversions with nothing wrong: layouts, formats, schemes, dtypes, sizes of shards, ranks, threads."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builders import small_checkpoint
from quantized import SIZES

from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quant.scheme import Arithmetic, Format, MtpPolicy, Preset, ScaleSearch
from converters.quantize import QuantizeOptions, plan_quantize
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts
from converters.shard.naming import ShardLayout
from converters.shard.plan import ShardOptions, plan_merge, plan_shard
from converters.shard.source import open_sharded
from converters.source import open_source
from tests.faults.planted.copies import TINY

Made = tuple[Path, Path]
_MODEL: dict[str, Any] = {**SIZES, "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 2}


@dataclass(frozen=True)
class Clean:
    """A conversion: what it is called, how to make source and result in a folder, and threads of the comparison."""

    label: str
    make: Callable[[Path], Made]
    workers: int = 1


def clean_runs() -> tuple[Clean, ...]:
    return (*_repacked(), *_quantized(), *_restored(), *_cut(), *_of_the_fixture())


def small(folder: Path, **changes: Any) -> Path:
    return small_checkpoint(folder / "source", num_shards=1, **{**_MODEL, **changes})


def convert(source: Path, to: Path, **options: Any) -> Path:
    with open_source(source) as opened:
        run(plan_convert(opened, ConvertOptions(**options)), to, RunOptions(1), lambda _: None)
    return to


def quantize(source: Path, to: Path, **options: Any) -> Path:
    with open_source(source) as opened:
        run(plan_quantize(opened, QuantizeOptions(**options)), to, RunOptions(1), lambda _: None)
    return to


def cut(source: Path, to: Path, mapping: ParallelMapping, files: ShardLayout = ShardLayout.RANK) -> Path:
    with open_source(source) as opened:
        run(plan_shard(opened, ShardOptions(mapping=mapping, files=files)), to, RunOptions(1), lambda _: None)
    return to


def merge(source: Path, to: Path) -> Path:
    with open_sharded(source) as opened:
        run(plan_merge(opened), to, RunOptions(1), lambda _: None)
    return to


def _one(label: str, make: Callable[[Path, Path], Path], workers: int = 1, **model: Any) -> Clean:
    """Return a run on a random model of its own seed."""

    def both(folder: Path) -> Made:
        source = small(folder, **model)
        return source, make(source, folder / "made")

    return Clean(label, both, workers)


def _repacked() -> Iterator[Clean]:
    for layout in Layout:
        yield _one(f"layout {layout}", lambda s, d, how=layout: convert(s, d, layout=how))
    for size in (10_000, 1 << 30):
        yield _one(f"shards of {size} bytes", lambda s, d, how=size: convert(s, d, max_shard_bytes=how))
    for dtype in ("float32", "float16"):
        yield _one(f"dtype {dtype}", lambda s, d, how=dtype: convert(s, d, dtype=how))
    yield _one("packed and float32", lambda s, d: convert(s, d, layout=Layout.PACKED, dtype="float32"), workers=2)
    yield _one("without copies of the head", lambda s, d: convert(s, d, max_shard_bytes=30_000), mtp_copies=False)
    yield _one("without an MTP layer", convert, num_nextn_predict_layers=0, mtp=False)


def _quantized() -> Iterator[Clean]:
    for scheme in ("fp8", "int8", "int8-weight-only", "nvfp4-weight-only"):
        for arithmetic in (Arithmetic.FLOAT32, Arithmetic.COMPRESSED_TENSORS):
            label = f"{scheme}, computed as {arithmetic}"
            yield _one(label, lambda s, d, o={"scheme": scheme, "arithmetic": arithmetic}: quantize(s, d, **o))
    for scheme in ("fp8", "nvfp4-weight-only"):
        options = {"scheme": scheme, "format": Format.MODELOPT}
        yield _one(f"{scheme}, ModelOpt", lambda s, d, o=options: quantize(s, d, **o))
    for preset in (Preset.EXPERTS_ONLY, Preset.MLP_ONLY):
        options = {"scheme": "fp8", "preset": preset}
        yield _one(f"fp8, {preset}", lambda s, d, o=options: quantize(s, d, **o), workers=3)
    for mtp in (MtpPolicy.KEEP, MtpPolicy.QUANTIZE, MtpPolicy.QUANTIZE_EXPERTS):
        options = {"scheme": "nvfp4-weight-only", "mtp": mtp, "search": ScaleSearch.NONE}
        yield _one(f"nvfp4-weight-only, MTP layer {mtp}", lambda s, d, o=options: quantize(s, d, **o))
    grouped = {"scheme": "int8-weight-only", "group_size": "32", "preset": Preset.EXPERTS_ONLY}
    yield _one("int8-weight-only in groups of 32", lambda s, d: quantize(s, d, **grouped))
    mixed = "experts=nvfp4-weight-only,attention=fp8"
    yield _one("experts in 4 bits, attention in FP8", lambda s, d: quantize(s, d, scheme=mixed))


def _restored() -> Iterator[Clean]:
    for scheme in ("fp8", "int8", "nvfp4-weight-only"):

        def make(folder: Path, scheme: str = scheme) -> Made:
            quantized = quantize(small(folder), folder / "quantized", scheme=scheme)
            return quantized, convert(quantized, folder / "made", dequantize=True)

        yield Clean(f"{scheme} restored to weights", make)

    def repacked(folder: Path) -> Made:
        quantized = quantize(small(folder), folder / "quantized", scheme="fp8")
        return quantized, convert(quantized, folder / "made", layout=Layout.PACKED)

    yield Clean("fp8 packed", repacked)


def _cut() -> Iterator[Clean]:
    mappings = {
        "tp 2": ParallelMapping(tp=2),
        "tp 4, ep 4": ParallelMapping(tp=4, ep=4),
        "tp 2, ep 2, in turns": ParallelMapping(tp=2, ep=2, placement=Placement.ROUND_ROBIN),
        "tp 2, ep 2, redundant experts": ParallelMapping(tp=2, ep=2, redundant_experts=2),
        "tp 2, pp 2": ParallelMapping(tp=2, pp=2),
        "tp 4, ep 2, shared expert on all": ParallelMapping(tp=4, ep=2, shared_experts=SharedExperts.REPLICATE),
    }
    for label, mapping in mappings.items():
        yield _one(f"cut for {label}", lambda s, d, how=mapping: cut(s, d, how))
    files = ShardLayout.TENSORRT_LLM
    yield _one("cut for tp 2, TensorRT-LLM", lambda s, d: cut(s, d, mappings["tp 2"], files))
    yield _one("cut and merged", lambda s, d: merge(cut(s, d.with_name("cut"), mappings["tp 4, ep 4"]), d))
    for scheme in ("fp8", "nvfp4-weight-only"):

        def of_quantized(source: Path, to: Path, scheme: str = scheme) -> Path:
            return cut(quantize(source, to.with_name("quantized"), scheme=scheme), to, ParallelMapping(tp=2, ep=2))

        yield _one(f"{scheme}, cut for tp 2, ep 2", of_quantized, intermediate_size=96)

    def of_packed(source: Path, to: Path) -> Path:
        return cut(convert(source, to.with_name("packed"), layout=Layout.PACKED), to, ParallelMapping(tp=2, ep=2))

    yield _one("packed, cut for tp 2, ep 2", of_packed, workers=2)


def _of_the_fixture() -> Iterator[Clean]:
    for scheme in ("fp8", "int8", "nvfp4-weight-only"):
        yield _tiny(f"fixture, {scheme}", scheme=scheme)
    blocks = {"scheme": "attention=fp8-block,dense=fp8-block"}
    yield _tiny("fixture, fp8-block", **blocks)
    yield _tiny("fixture, fp8-block, ModelOpt", **blocks, format=Format.MODELOPT)
    yield Clean("fixture, fused", lambda folder: (TINY, convert(TINY, folder / "made", layout=Layout.FUSED)), 2)
    yield Clean(
        "fixture, cut for tp 2, ep 2", lambda folder: (TINY, cut(TINY, folder / "made", ParallelMapping(tp=2, ep=2)))
    )


def _tiny(label: str, **options: Any) -> Clean:
    return Clean(label, lambda folder: (TINY, quantize(TINY, folder / "made", **options)))
