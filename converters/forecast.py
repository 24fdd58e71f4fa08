"""What a conversion will take: bytes, disk, memory, time at a measured rate, and what the result fits."""

import hashlib
import time
from dataclasses import dataclass

from converters.blocks import Scratch
from converters.checkpoint.plan import Unit
from converters.conversion import Conversion
from converters.inspect.parallel import parallel_report
from converters.layout import Layout, detect_layout
from converters.pipeline import Run, RunOptions, made_blocks, single_threaded_ops
from converters.schema import COMPANIONS

SAMPLE_BYTES = 8 << 20
# layouts and schemes that engines load as they are; from their own loaders
_ENGINES = {
    Layout.SPLIT: ("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    Layout.PACKED: ("transformers", "vLLM"),
    Layout.FUSED: (),
    Layout.FUSED_SHARED: (),
}


@dataclass(frozen=True, slots=True)
class Forecast:
    """Figures of a run. `seconds` covers reading, computing and hashing; a slower disk's writing comes on top.

    It is None where the weights are fetched as it goes.

    `tensor_parallel_sizes` is empty where groups of columns share scales; `inspect` tells the sizes of such a result.
    """

    read_bytes: int
    write_bytes: int
    peak_disk_bytes: int
    seconds: float | None
    tensor_parallel_sizes: tuple[int, ...]
    engines: tuple[str, ...]


def forecast(conversion: Conversion, options: RunOptions, *, can_measure: bool = True) -> Forecast:
    """Return the figures; reads at most SAMPLE_BYTES for each kind of transform in the plan.

    Args:
        conversion: the planned job.
        options: its threads and memory.
        can_measure: whether the weights are there to try the transforms on.
    """
    plan = conversion.plan
    # where scales are shared along the columns, what fits depends on each width; `inspect` tells it of the result
    scales = (e for shard in plan.shards for e in shard.entries if e.name.rpartition(".")[2] in COMPANIONS)
    has_groups = any(len(entry.shape) == 2 and entry.shape[1] > 1 for entry in scales)
    report = parallel_report(conversion.source.config, 1, is_quantized=False)
    with single_threaded_ops():
        rates = plan.bytes_by_transform if can_measure else {}
        seconds = sum(nbytes * _seconds_per_byte(conversion, options, name) for name, nbytes in rates.items())
    return Forecast(
        read_bytes=conversion.source_bytes,
        write_bytes=plan.file_bytes,
        peak_disk_bytes=plan.file_bytes,
        seconds=seconds / options.num_workers if can_measure else None,
        tensor_parallel_sizes=() if has_groups else tuple(fit.size for fit in report.tensor if fit.fits),
        engines=_ENGINES[detect_layout(conversion.source.config, plan.weight_map).layout],
    )


def _seconds_per_byte(conversion: Conversion, options: RunOptions, transform: str) -> float:
    """Run a transform on some rows of its largest unit, without writing, and return seconds per output byte."""
    units = [u for shard in conversion.plan.shards for u in shard.units if u.transform.name == transform]
    largest = max(units, key=_nbytes)
    run = Run(conversion.source.reader, options, lambda _: None, scratch=Scratch())
    digest, made, start = hashlib.sha256(), 0, time.perf_counter()
    for _, blocks in made_blocks(largest, run, digest):
        made += sum(block.numel() * block.element_size() for block in blocks)
        if made >= SAMPLE_BYTES:
            break
    return (time.perf_counter() - start) / made if made else 0.0


def _nbytes(unit: Unit) -> int:
    return unit.nbytes
