"""What a conversion will take: bytes, disk, memory, time at a measured rate, and what the result fits."""

import time
from dataclasses import dataclass

from converters.blocks import as_bytes
from converters.checkpoint.content_digest import new_hasher
from converters.checkpoint.plan import Unit
from converters.conversion import Conversion
from converters.copying import begin
from converters.digests import SourceDigest, is_plain_copy
from converters.formats.declared import MODELOPT_FILE, QUANTIZATION_KEY
from converters.inspect.parallel import parallel_report
from converters.layout import Layout, detect_layout
from converters.pipeline import Run, RunOptions, single_threaded_ops
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

    `peak_disk_bytes` holds, beside what is written, the old result that an update replaces when it is done.

    `engines` is empty where nothing is known of any, and `engines_note` says why.

    `tensor_parallel_sizes` is empty where groups of columns share scales; `inspect` tells the sizes of such a result.
    """

    read_bytes: int
    write_bytes: int
    peak_disk_bytes: int
    seconds: float | None
    tensor_parallel_sizes: tuple[int, ...]
    engines: tuple[str, ...]
    engines_note: str


def forecast(
    conversion: Conversion, options: RunOptions, *, can_measure: bool = True, replaced_bytes: int = 0
) -> Forecast:
    """Return the figures; reads at most SAMPLE_BYTES for each kind of transform in the plan.

    Args:
        conversion: the planned job.
        options: its threads and memory.
        can_measure: whether the weights are there to try the transforms on.
        replaced_bytes: size of the old result that an update replaces.
    """
    plan = conversion.plan
    # where scales are shared along the columns, what fits depends on each width; `inspect` tells it of the result
    scales = (e for shard in plan.shards for e in shard.entries if e.name.rpartition(".")[2] in COMPANIONS)
    has_groups = plan.distribution is not None or any(len(e.shape) == 2 and e.shape[1] > 1 for e in scales)
    engines, note = _engines(conversion)
    report = parallel_report(conversion.source.config, 1, is_quantized=False)
    with single_threaded_ops(unit for shard in plan.shards for unit in shard.units):
        rates = plan.bytes_by_transform if can_measure else {}
        seconds = sum(nbytes * _seconds_per_byte(conversion, options, name) for name, nbytes in rates.items())
    return Forecast(
        read_bytes=conversion.source_bytes,
        write_bytes=plan.file_bytes,
        peak_disk_bytes=plan.file_bytes + replaced_bytes,
        seconds=seconds / options.num_workers if can_measure else None,
        tensor_parallel_sizes=() if has_groups else tuple(fit.size for fit in report.tensor if fit.fits),
        engines=engines,
        engines_note=note,
    )


def _engines(conversion: Conversion) -> tuple[tuple[str, ...], str]:
    """Return what is known to load the result; if nothing is, in words why."""
    if conversion.engines is not None:
        return conversion.engines, "not known"
    layout = detect_layout(conversion.source.config, conversion.plan.weight_map).layout
    files = (*conversion.passthrough, *conversion.generated)
    if QUANTIZATION_KEY not in conversion.config and MODELOPT_FILE not in files:
        return _ENGINES[layout], "this tool only; convert it back with --layout split"
    if layout is Layout.SPLIT:
        return (), "what loads this quantization format; its codes are copied as they are"
    return (), "not known for quantized weights in this layout; --layout split is what engines load"


def _seconds_per_byte(conversion: Conversion, options: RunOptions, transform: str) -> float:
    """Run a transform on some rows of its largest unit, without writing, and return seconds per output byte."""
    units = [u for shard in conversion.plan.shards for u in shard.units if u.transform.name == transform]
    largest = max(units, key=_nbytes)
    run = Run(conversion.source.reader, options, lambda _: None, conversion.plan.digest)
    digest, made, start = new_hasher(run.digest), 0, time.perf_counter()
    for _, blocks in begin(largest, run, None if is_plain_copy(largest) else SourceDigest()).blocks():
        for block in blocks:
            data = as_bytes(block, run.cuts)
            digest.update(data)
            made += len(data)
        if made >= SAMPLE_BYTES:
            break
    return (time.perf_counter() - start) / made if made else 0.0


def _nbytes(unit: Unit) -> int:
    return unit.nbytes
