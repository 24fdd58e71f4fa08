"""quantize on a GPU beside the CPU, kernels alone and whole commands, in one run on one machine.

    PYTHONPATH=. python benchmarks/quantize_gpu.py SCRATCH [--experts 32] [--rounds 3] [--workers 16]

Needs a CUDA GPU. Every kernel is first held against its torch twin on the block that is timed, and every result against
the one of the CPU, byte for byte: nothing is reported of a pair that differs. Kernels are timed on a block that is on
the GPU already, beside a copy of as many bytes; commands read, copy, hash and write as well. Makes a synthetic
GLM-4.5-Air checkpoint under SCRATCH and writes benchmarks/results/quantize_gpu.json.
"""

import argparse
import hashlib
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.measure import Sample, environment, interleave, summarize, write_result
from converters.quant.scheme import Arithmetic, ScaleSearch
from converters.transforms.quantize import (
    QuantizeFp8Block,
    QuantizeFp8Channel,
    QuantizeFp8Tensor,
    QuantizeInt8,
    QuantizeInt8Packed,
    QuantizeNvfp4,
)
from converters.transforms.rows import RowTransform
from runtime.kernels.quantize import prepare

RESULT = Path(__file__).resolve().parent / "results" / "quantize_gpu.json"
GLM4MOE = (sys.executable, "-m", "glm4moe_cli")
SCHEMES = {
    "fp8": ("--scheme", "fp8"),
    "fp8-block": ("--scheme", "fp8-block"),
    "int8": ("--scheme", "int8"),
    "int8-weight-only": ("--scheme", "int8-weight-only", "--group-size", "128"),
    "nvfp4-weight-only": ("--scheme", "nvfp4-weight-only"),
    "nvfp4-weight-only, mse": ("--scheme", "nvfp4-weight-only", "--scale-search", "mse"),
}
_FLOAT32 = Arithmetic.FLOAT32
KERNELS: dict[str, RowTransform] = {
    "fp8": QuantizeFp8Channel(_FLOAT32),
    "fp8 tensor": QuantizeFp8Tensor(_FLOAT32),
    "fp8-block": QuantizeFp8Block(_FLOAT32),
    "int8": QuantizeInt8(_FLOAT32),
    "int8-weight-only": QuantizeInt8Packed(_FLOAT32, 128),
    "nvfp4": QuantizeNvfp4(_FLOAT32),
    "nvfp4, mse": QuantizeNvfp4(_FLOAT32, ScaleSearch.MSE),
}
# as many as do not fit into the cache of a GPU together
NUM_BLOCKS, ROWS, COLUMNS = 8, 8192, 4096


def milliseconds(work: Callable[[int], object], repeats: int = 20) -> float:
    """Return the median time of one call, by events on the GPU; calls take a number that goes round the blocks."""
    for number in range(NUM_BLOCKS):
        work(number)
    times = []
    for number in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work(number % NUM_BLOCKS)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def time_kernels() -> dict[str, dict[str, float]]:
    """Return time and source GB/s of each kernel, and of copying the block.

    Raises:
        SystemExit: a kernel makes other bytes than its twin.
    """
    generator = torch.Generator().manual_seed(0)
    cpu_RC = (torch.randn(ROWS, COLUMNS, generator=generator) * 0.02).bfloat16()
    blocks = [cpu_RC.cuda() for _ in range(NUM_BLOCKS)]
    largest_11 = cpu_RC.abs().max().float().view(1, 1)
    copies = [torch.empty_like(block) for block in blocks]
    work: dict[str, Callable[[int], object]] = {"copy": lambda number: copies[number].copy_(blocks[number])}
    for name, transform in KERNELS.items():
        launches = [prepare(transform, block, largest_11) for block in blocks]
        first = launches[0]
        assert first is not None, name
        for ours, theirs in zip(first.run(), transform(cpu_RC, largest_11), strict=True):
            if not torch.equal(ours.cpu().view(torch.uint8), theirs.contiguous().view(torch.uint8)):
                raise SystemExit(f"{name}: the kernel makes other bytes than the CPU")
        work[name] = lambda number, launches=launches: launches[number].run()
    found = {}
    for name, call in work.items():
        time_ms = milliseconds(call)
        found[name] = {"ms": time_ms, "source_gb_per_s": cpu_RC.nbytes / time_ms / 1e6}
    return found


def commands(src: Path, workers: int) -> dict[str, Callable[[Path], Sequence[str]]]:
    """Return command lines by scheme and device: functions of the destination."""
    found: dict[str, Callable[[Path], Sequence[str]]] = {}
    for name, options in SCHEMES.items():
        for device in ("cpu", "cuda"):
            more = (*options, "--device", device, "--workers", str(workers), "-q")
            found[f"{name}: {device}"] = lambda dst, more=more: (*GLM4MOE, "quantize", str(src), str(dst), *more)
    return found


def check_results(src: Path, scratch: Path, workers: int) -> None:
    """Compare the results of both devices; this also compiles the kernels.

    Raises:
        SystemExit: they differ.
    """
    found: dict[str, dict[str, str]] = {}
    for name, command in commands(src, workers).items():
        dst = scratch / "checked"
        subprocess.run(command(dst), check=True)
        digests = {}
        for path in sorted(path for path in dst.iterdir() if path.is_file()):
            with path.open("rb") as file:
                digests[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
        shutil.rmtree(dst)
        scheme = name.partition(":")[0]
        if found.setdefault(scheme, digests) != digests:
            raise SystemExit(f"{scheme}: the results of the two devices differ")


def times_faster(samples: dict[str, list[Sample]]) -> dict[str, float]:
    """Return for each scheme how often the time on the GPU goes into that on the CPU, round by round."""
    return {
        name: statistics.median(
            cpu.wall_s / gpu.wall_s for cpu, gpu in zip(samples[f"{name}: cpu"], samples[f"{name}: cuda"], strict=True)
        )
        for name in SCHEMES
    }


def main() -> None:
    """Check, measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=16)
    args = parser.parse_args()
    result: dict[str, Any] = {"environment": {**environment(), "triton": triton.__version__}}
    result["gpu"] = torch.cuda.get_device_name()
    result["block"] = {"dtype": "bfloat16", "rows": ROWS, "columns": COLUMNS}
    result["kernels"] = time_kernels()
    src = args.scratch / "src"
    shutil.rmtree(src, ignore_errors=True)
    make = (sys.executable, "benchmarks/synthetic.py", str(src), "--experts", str(args.experts))
    made = subprocess.run([*make, "--shard-bytes", "1000000000"], capture_output=True, text=True, check=True)
    check_results(src, args.scratch, args.workers)
    samples = interleave(commands(src, args.workers), args.scratch, args.rounds)
    result["workers"], result["rounds"], result["source_bytes"] = args.workers, args.rounds, int(made.stdout)
    result["times_faster"] = times_faster(samples)
    result["runs"] = summarize(samples, int(made.stdout), "fp8: cpu")
    write_result(RESULT, result)
    shutil.rmtree(src)


if __name__ == "__main__":
    main()
