"""Layer-by-layer verification beside one read of both checkpoints and beside its own products, on real layer shapes.

    PYTHONPATH=. python benchmarks/verify.py SCRATCH [--model GLM-4.6] [--experts 24] [--tokens 16 1024] [--rounds 2]

Makes a synthetic checkpoint of a released model's layer shapes and vocabulary with one dense layer, one MoE layer of
fewer experts and the MTP layer, and its FP8 copy, under SCRATCH: 12 GB. For each number of tokens both are compared in
a child process, every level, in windows of 256. Beside it both are read once, file by file, with what the kernel has
cached of either dropped before each run; and the products of the run's linear layers are timed as plain fp32 products
of torch, each shape by itself, its seconds times how often it occurs; scores of attention are left out. With few tokens
reading is what counts, with many computing: a run is held against the larger of both. It reads only some rows of the
embedding and no expert that no token goes to, so it is also held against the read of as many bytes. Writes
benchmarks/results/verify.json: these seconds and the ratio, round by round, arithmetic in GFLOP/s of the run and of the
plain products, peak memory beside the plan, and the plan of the whole model from headers.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import environment, run_once, write_result

RESULT = Path(__file__).resolve().parent / "results" / "verify.json"
PLANNED_TOKENS = 4096
CONTEXT_LENGTH = 256
# more tokens than this are run once: computing counts, and takes long
FEW_TOKENS = 64
# of a weight whose product is timed; a head is timed in part
MATMUL_ROWS = 16384
# rows, out and in features of a product
Shape = tuple[int, int, int]
READ = """
import pathlib, sys
buffer = bytearray(16 << 20)
for folder in sys.argv[1:]:
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
"""


def file_bytes(*folders: Path) -> int:
    """Return the bytes of the weight files of some folders."""
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def evict(*folders: Path) -> None:
    """Drop what the kernel has cached of the files, so that they are read from the disk."""
    for path in (path for folder in folders for path in folder.glob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def count_products() -> Counter[Shape]:
    """Count the products of linear layers from now on, in this process."""
    from runtime.model import linear

    shapes, products = Counter[Shape](), linear.products

    def counted(weight: Any, scale: Any, inputs: Any) -> Any:
        shapes.update((len(rows), *weight.shape) for rows in inputs)
        return products(weight, scale, inputs)

    linear.products = counted
    return shapes


def compare(source: Path, candidate: Path, num_tokens: int, output: Path) -> None:
    """Compare two checkpoints on random tokens and write what it took, and the shapes of its products."""
    import torch

    from converters.config import Glm4MoeConfig
    from runtime.streaming.options import StreamOptions
    from runtime.verify.streamed import planned
    from runtime.verify.tokens import EncodedText
    from runtime.verify.windows import plan_windows

    vocab_size = Glm4MoeConfig.from_folder(source).vocab_size
    ids = torch.randint(vocab_size, (num_tokens,), generator=torch.Generator().manual_seed(0)).tolist()
    text = EncodedText(tuple(ids), plan_windows(num_tokens, context_length=min(CONTEXT_LENGTH, num_tokens)))
    shapes = count_products()
    with planned(source, candidate, text, StreamOptions()) as job:
        found = job.run()
        assert found.spent is not None
        took = {"spent": asdict(found.spent), "plan": asdict(job.memory), "peak": job.memory.peak_bytes}
    output.write_text(json.dumps({**took, "products": [[*shape, count] for shape, count in shapes.items()]}))


def multiply(products: list[list[int]], output: Path) -> None:
    """Write the seconds that plain fp32 products of these rows, out and in features and counts take."""
    import torch
    import torch.nn.functional as F

    weights: dict[tuple[int, int], torch.Tensor] = {}
    seconds = 0.0
    for rows, num_out, width, count in sorted(products, key=lambda product: product[1:3]):
        part = min(num_out, MATMUL_ROWS)
        if (part, width) not in weights:
            weights = {(part, width): torch.randn(part, width)}
        given, took = torch.randn(rows, width), []
        with torch.inference_mode():
            F.linear(given, weights[part, width])
            while len(took) < 2:
                begin = time.perf_counter()
                F.linear(given, weights[part, width])
                took.append(time.perf_counter() - begin)
        seconds += min(took) * count * num_out / part
    output.write_text(json.dumps(seconds))


def plan_whole(model: str, scratch: Path) -> dict[str, Any]:
    """Return the plan for a released model and its FP8 copy, from headers whose data is a hole."""
    from converters.config import Glm4MoeConfig
    from converters.schema import expand
    from runtime.streaming.options import StreamOptions
    from runtime.verify.streamed import planned
    from runtime.verify.tokens import EncodedText
    from runtime.verify.windows import plan_windows
    from tests.converters.inspect.fakes import config_of, official, per_channel, quantized_config

    config = config_of(model)
    own = {"mtp_copies": model != "GLM-4.6"}
    schema = expand(Glm4MoeConfig.from_hf(config), **own)
    source = official(scratch / "plan-source", config, **own)
    coded = per_channel(schema, "F32")
    candidate = official(scratch / "plan-fp8", quantized_config(config, schema), stored=coded, **own)
    text = EncodedText(tuple(range(PLANNED_TOKENS)), plan_windows(PLANNED_TOKENS, context_length=512))
    with planned(source, candidate, text, StreamOptions()) as job:
        found = {"tokens": PLANNED_TOKENS, "read_bytes": job.read_bytes, "peak_bytes": job.memory.peak_bytes}
        plan = asdict(job.memory)
    shutil.rmtree(source)
    shutil.rmtree(candidate)
    return {**found, "plan": plan}


def measure(source: Path, candidate: Path, num_tokens: int, rounds: int, scratch: Path) -> dict[str, Any]:
    """Return seconds of the read, the plain products and the comparison, round by round, and what the latter took."""
    child = (sys.executable, "benchmarks/verify.py", str(scratch))
    runs, spent = [], dict[str, Any]()
    for _ in range(rounds):
        evict(source, candidate)
        read = run_once((sys.executable, "-c", READ, str(source), str(candidate)))
        evict(source, candidate)
        ours = run_once((*child, "--compare", str(num_tokens)))
        spent = json.loads((scratch / "spent.json").read_text())
        run_once((*child, "--multiply"))
        plain_s = json.loads((scratch / "multiply.json").read_text())
        larger = max(read.wall_s, plain_s)
        seconds, share = spent["spent"]["seconds"], spent["spent"]["bytes_read"] / file_bytes(source, candidate)
        ratios = {
            "ratio_to_read": seconds / read.wall_s,
            "ratio_to_read_of_own_bytes": seconds / (read.wall_s * share),
            "ratio": seconds / larger,
        }
        runs.append({"read": asdict(read), "verify": asdict(ours), "products_s": plain_s, **ratios, **spent["spent"]})
        print(num_tokens, runs[-1], flush=True)
    flops = 2.0 * sum(rows * num_out * width * count for rows, num_out, width, count in spent["products"])
    keys = ("seconds", "products_s", "ratio_to_read", "ratio_to_read_of_own_bytes")
    medians = {key: statistics.median(run[key] for run in runs) for key in keys}
    ratios = [run["ratio"] for run in runs]
    return {
        "read_s": statistics.median(run["read"]["wall_s"] for run in runs),
        **medians,
        "ratio_to_larger": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
        "products_tflop": flops / 1e12,
        "gflop_per_s": {"run": flops / 1e9 / medians["seconds"], "plain": flops / 1e9 / medians["products_s"]},
        "peak_mib": max(run["verify"]["peak_bytes"] for run in runs) / 2**20,
        "planned_mib": spent["peak"] / 2**20,
        "plan": spent["plan"],
        "runs": runs,
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--model", default="GLM-4.6")
    parser.add_argument("--experts", type=int, default=24)
    parser.add_argument("--vocab-size", type=int, default=151_552)
    parser.add_argument("--tokens", type=int, nargs="+", default=[16, 1024])
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--keep", action="store_true", help="use checkpoints that are there, and leave them")
    parser.add_argument("--add", action="store_true", help="add to the committed result, of the same checkpoints")
    parser.add_argument("--compare", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--multiply", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, candidate = args.scratch / "src", args.scratch / "fp8"
    if args.compare:
        compare(source, candidate, args.compare, args.scratch / "spent.json")
        return
    if args.multiply:
        multiply(json.loads((args.scratch / "spent.json").read_text())["products"], args.scratch / "multiply.json")
        return
    if not args.keep:
        make = ("benchmarks/synthetic.py", str(source), "--model", args.model, "--experts", str(args.experts))
        subprocess.run([sys.executable, *make, "--vocab-size", str(args.vocab_size)], check=True)
        quantize = ("-m", "glm4moe_cli", "quantize", str(source), str(candidate), "--scheme", "fp8", "-q")
        subprocess.run([sys.executable, *quantize], check=True)
    sizes = [file_bytes(folder) for folder in (source, candidate)]
    result: dict[str, Any] = {
        "environment": environment(),
        "model": args.model,
        "experts": args.experts,
        "bytes": dict(zip(("source", "candidate"), sizes, strict=True)),
        "whole_model": plan_whole(args.model, args.scratch),
        "tokens": {},
    }
    if args.add:
        before = json.loads(RESULT.read_text())
        same = ("environment", "model", "experts", "bytes")
        if {key: before[key] for key in same} != {key: result[key] for key in same}:
            raise SystemExit(f"{RESULT} is of other checkpoints or versions")
        result["tokens"] = before["tokens"]
    for num_tokens in args.tokens:
        rounds = args.rounds if num_tokens <= FEW_TOKENS else 1
        result["tokens"][str(num_tokens)] = measure(source, candidate, num_tokens, rounds, args.scratch)
        write_result(RESULT, result)
    if not args.keep:
        shutil.rmtree(source)
        shutil.rmtree(candidate)


if __name__ == "__main__":
    main()
