"""quantize beside llm-compressor's `model_free_ptq`, on real layer shapes, in one run, with the same workers.

    PYTHONPATH=. python benchmarks/quantize.py SCRATCH --peer VENV/bin/python [--experts 64] [--rounds 3] [--workers 2]

The peer has a virtual environment of its own: `pip install torch==2.13.0`, then `pip install llmcompressor==0.14.0.1`.
Makes a synthetic GLM-4.5-Air checkpoint under SCRATCH, runs everything interleaved, and writes
benchmarks/results/quantize.json: seconds, source MB per second and per CPU-second, peak memory, ratios to the peer.
The floor of a scheme is reading the source and writing as many bytes as the result has, synced, and nothing else.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Sample, environment, interleave, summarize, write_result

RESULT = Path(__file__).resolve().parent / "results" / "quantize.json"
GLM4MOE = (sys.executable, "-m", "glm4moe_cli")
# our options, and the preset of the peer that writes the same format
SCHEMES: dict[str, tuple[tuple[str, ...], str | None]] = {
    "fp8": (("--scheme", "fp8"), "FP8_DYNAMIC"),
    # the dense layers of GLM-4.5-Air are not whole blocks wide; the peer stops there
    "fp8-block": (("--scheme", "attention=fp8-block,experts=fp8-block,shared-experts=fp8-block"), None),
    "int8": (("--scheme", "int8"), "INT8"),
    # the peer's W8A16 has groups of 128 columns, and it stops at those layers too
    "int8-weight-only": (("--scheme", "int8-weight-only"), None),
    "nvfp4-weight-only": (("--scheme", "nvfp4-weight-only", "--scale-search", "none"), "NVFP4A16"),
    "nvfp4-weight-only, mse": (("--scheme", "nvfp4-weight-only", "--scale-search", "mse"), None),
}
PEER = """
import sys
from llmcompressor import model_free_ptq
model_free_ptq(
    model_stub=sys.argv[1], save_directory=sys.argv[2], scheme=sys.argv[3], max_workers=int(sys.argv[4]), device="cpu",
    ignore=[r"re:.*mlp\\.gate$", "lm_head", "model.embed_tokens", r"re:.*eh_proj$", r"re:.*embed_tokens$"],
)
"""
FLOOR = """
import os, pathlib, sys
src, dst, left = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), int(sys.argv[3])
dst.mkdir()
buffer = memoryview(bytearray(8 << 20))
with open(dst / "out", "wb", buffering=0) as out:
    for path in sorted(src.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                left -= out.write(buffer[: min(count, left)])
    while left > 0:
        left -= out.write(buffer[: min(len(buffer), left)])
    os.fsync(out.fileno())
"""


def result_bytes(src: Path, options: Sequence[str]) -> int:
    """Return how many bytes a quantization writes."""
    command = (*GLM4MOE, "quantize", str(src), str(src.parent / "none"), "--dry-run", "--json", *options)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(json.loads(done.stdout)["result"]["plan"]["output_bytes"])


def commands(src: Path, peer: str, workers: int, names: Sequence[str]) -> dict[str, Callable[[Path], Sequence[str]]]:
    """Return what is measured, by name: a function from the destination to the command line."""
    found: dict[str, Callable[[Path], Sequence[str]]] = {}
    for name in names:
        options, preset = SCHEMES[name]
        ours = (*GLM4MOE, "quantize", str(src))
        more = (*options, "--workers", str(workers), "-q")
        found[name] = lambda dst, ours=ours, more=more: (*ours, str(dst), *more)
        floor = (sys.executable, "-c", FLOOR, str(src))
        size = str(result_bytes(src, options))
        found[f"{name}: floor"] = lambda dst, floor=floor, size=size: (*floor, str(dst), size)
        if preset:
            script = (peer, "-c", PEER, str(src))
            tail = (preset, str(workers))
            found[f"{name}: llm-compressor"] = lambda dst, script=script, tail=tail: (*script, str(dst), *tail)
    return found


def ratios(samples: dict[str, list[Sample]]) -> dict[str, dict[str, float]]:
    """Return for each scheme how often the peer's time ours goes into, by the wall and by the CPU, round by round."""
    found: dict[str, dict[str, float]] = {}
    for name, runs in samples.items():
        if ":" in name:
            continue
        floors = samples[f"{name}: floor"]
        facts = {"wall_over_floor": statistics.median(a.wall_s / b.wall_s for a, b in zip(runs, floors, strict=True))}
        peers = samples.get(f"{name}: llm-compressor", [])
        if peers:
            pairs = list(zip(peers, runs, strict=True))
            facts["times_faster"] = statistics.median(a.wall_s / b.wall_s for a, b in pairs)
            facts["times_less_cpu"] = statistics.median(a.cpu_s / b.cpu_s for a, b in pairs)
            facts["times_less_memory"] = statistics.median(a.peak_bytes / b.peak_bytes for a, b in pairs)
        found[name] = facts
    return found


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--schemes", nargs="+", default=list(SCHEMES), choices=list(SCHEMES))
    args = parser.parse_args()
    src = args.scratch / "src"
    shutil.rmtree(src, ignore_errors=True)
    make = (sys.executable, "benchmarks/synthetic.py", str(src), "--experts", str(args.experts))
    made = subprocess.run([*make, "--shard-bytes", "1000000000"], capture_output=True, text=True, check=True)
    samples = interleave(commands(src, args.peer, args.workers, args.schemes), args.scratch, args.rounds)
    result: dict[str, Any] = {"environment": environment(), "workers": args.workers, "rounds": args.rounds}
    result["peer"] = "llmcompressor 0.14.0.1 model_free_ptq"
    result["source_bytes"] = int(made.stdout)
    result["ratios"] = ratios(samples)
    result["runs"] = summarize(samples, int(made.stdout), f"{args.schemes[0]}: floor")
    write_result(RESULT, result)
    shutil.rmtree(src)


if __name__ == "__main__":
    main()
