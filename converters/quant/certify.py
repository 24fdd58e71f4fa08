"""The weights of two checkpoints held against each other, element by element, in any layout and format.

Both are read once, block by block, by several threads; see `halfstep` for what a data-free format must fulfil.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from threading import Event
from typing import Any

from converters.checkpoint.manifest import read_manifest
from converters.errors import ResourceError
from converters.pipeline import DEFAULT_MAX_MEMORY, Stop, single_threaded_ops
from converters.quant.certificate import Certificate, TensorFigures
from converters.quant.halfstep import Division, is_right_tensor_scale
from converters.quant.judge import Pair, Rounding, judge_tensor, scale_limit, scale_roundoff
from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.quant.single_scales import single_scale_findings
from converters.quant.tiles import Tile, row_bytes, tiles
from converters.schema import Tensor
from converters.shard.source import is_sharded
from converters.shard.whole import open_whole
from converters.source import Source
from converters.workers import start_pool

_TASKS_PER_THREAD = 16
_ON_GRID = "gptq"


@dataclass(frozen=True, slots=True)
class CertifyOptions:
    """How to run: threads, 0 meaning one per core, and the bytes that all blocks in flight may take together."""

    workers: int = 0
    max_memory: int = DEFAULT_MAX_MEMORY

    @property
    def num_workers(self) -> int:
        """Threads."""
        return self.workers or len(os.sched_getaffinity(0))


def certify_folders(
    source: Path, candidate: Path, options: CertifyOptions, on_start: Callable[[int], Callable[[int], None]]
) -> Certificate:
    """Compare all weights of a candidate with those of its source.

    Args:
        source: what it was made from, in any layout and format.
        candidate: the result.
        options: threads and memory.
        on_start: gets the bytes to be read and returns what is told of those just read, from any thread.
    Raises:
        InputError: one of them cannot be opened or read.
        ResourceError: max_memory does not hold a block for each thread.
    """
    with open_whole(source) as before, open_whole(candidate) as after:
        pairs = pair_up(before, after, read_manifest(candidate))
        found = certify(pairs, options, on_start(sum(map(pair_bytes, pairs))))
        is_whole = after.is_quantized and not is_sharded(candidate)
        scales = single_scale_findings(candidate) if is_whole else ()
        return replace(found, findings=(*found.findings, *scales))


def pair_up(before: Source, after: Source, manifest: Mapping[str, Any] | None) -> list[Pair]:
    """Return the official tensors that both sides have, in the order of the table."""
    made = _transforms(manifest)
    return [
        Pair(tensor, tiles(before, tensor), pieces, _rounding(made, pieces[0]))
        for name, tensor in after.schema.tensors.items()
        if name in before.schema.tensors
        for pieces in (tiles(after, tensor),)
    ]


def _transforms(manifest: Mapping[str, Any] | None) -> dict[str, Mapping[str, Any]]:
    """Return what made each tensor, as its manifest says."""
    if manifest is None:
        return {}
    # of what is cut for ranks, none is told
    found = {name: tensor.get("transform") for name, tensor in manifest["tensors"].items()}
    return {name: transform for name, transform in found.items() if isinstance(transform, Mapping)}


def _rounding(made: Mapping[str, Mapping[str, Any]], tile: Tile) -> Rounding:
    """Return what the manifest says of how codes were chosen; without one, whatever a writer may have done."""
    names = (tile.stored.part(part.suffix) for part in tile.format.parts)
    transform = next((made[name] for name in names if name in made), {})
    is_narrow = transform.get("arithmetic") == Arithmetic.COMPRESSED_TENSORS
    return Rounding(
        searched=transform.get("search", ScaleSearch.MSE) != ScaleSearch.NONE,
        on_grid=_ON_GRID in str(transform.get("name", "")),
        division=Division.WEIGHT_DTYPE if is_narrow and len(tile.scales) == 1 else Division.FLOAT32,
    )


def pair_bytes(pair: Pair) -> int:
    """Return the bytes of weights and codes that one pass over a pair reads; scales are not counted."""
    return sum(tile.num_rows * row_bytes(tile) for tile in (*pair.before, *pair.after))


def certify(pairs: Sequence[Pair], options: CertifyOptions, on_bytes: Callable[[int], None]) -> Certificate:
    """Compare pairs; see `certify_folders`."""
    _check_memory(pairs, options)
    stop = Event()

    def judge(pair: Pair) -> TensorFigures:
        def on_block() -> None:
            if stop.is_set():
                raise Stop

        figures = judge_tensor(pair, on_block)
        on_bytes(pair_bytes(pair))
        return figures

    figures: dict[str, TensorFigures] = {}
    with single_threaded_ops():
        pool = start_pool(options.num_workers, "certify")
        try:
            ordered = iter(sorted(pairs, key=_place))
            while portion := list(islice(ordered, options.num_workers * _TASKS_PER_THREAD)):
                figures |= {found.tensor: found for found in pool.map(judge, portion)}
        finally:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
    checked = _with_tensor_scales(pairs, figures)
    findings = tuple(finding for found in checked for finding in found.findings())
    return Certificate(tuple(checked), findings, sum(map(pair_bytes, pairs)))


def _place(pair: Pair) -> tuple[str, int]:
    """Return where the candidate's data lies, so that disks are read forwards."""
    tile = pair.after[0]
    suffix = tile.format.parts[0].suffix
    file, entry = tile.source.reader.index.entries[tile.stored.part(suffix)]
    return file, entry.begin


def _check_memory(pairs: Sequence[Pair], options: CertifyOptions) -> None:
    """Refuse a limit that the largest block of every thread together does not fit.

    Raises:
        ResourceError: with the memory that it takes.
    """
    largest = max(pairs, key=lambda pair: pair.working_bytes, default=None)
    if largest is None:
        return
    needed = largest.working_bytes * options.num_workers
    if needed > options.max_memory:
        raise ResourceError(
            "--max-memory",
            expected=f"at least {needed} bytes, for {largest.tensor.name}",
            found=f"{options.max_memory}",
            next_step="Raise it or use fewer workers.",
        )


def _with_tensor_scales(pairs: Sequence[Pair], figures: Mapping[str, TensorFigures]) -> list[TensorFigures]:
    """Return the figures with the judgement on scales for whole tensors, which weights of a fused group may share."""
    groups: dict[object, float] = {}
    for pair in pairs:
        key = _group(pair.tensor)
        groups[key] = max(groups.get(key, 0.0), figures[pair.tensor.name].amax)
    return [_with_tensor_scale(pair, figures[pair.tensor.name], groups[_group(pair.tensor)]) for pair in pairs]


def _group(tensor: Tensor) -> object:
    fuse = tensor.spec.fuse
    return (tensor.layer, tensor.expert, tensor.spec.role, fuse.group) if fuse else tensor.name


def _with_tensor_scale(pair: Pair, found: TensorFigures, group_amax: float) -> TensorFigures:
    scale = found.tensor_scale
    if scale is None:
        return found
    roundoff, limits = scale_roundoff(pair), scale_limit(pair.after[0])
    amaxes = dict.fromkeys((group_amax, found.amax))
    if any(is_right_tensor_scale(amax, scale, limit, roundoff) for amax in amaxes for limit in limits):
        return replace(found, scales=found.scales + 1)
    first = found.first_scale or f"{scale:.6g} for the whole tensor, whose group has a magnitude of {group_amax:.6g}"
    return replace(found, scales=found.scales + 1, wrong_scales=found.wrong_scales + 1, first_scale=first)
