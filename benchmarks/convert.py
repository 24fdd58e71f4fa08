"""convert and quantize beside `cp -r` and plain safetensors load and save, on real layer shapes, in one run.

    PYTHONPATH=. python benchmarks/convert.py SCRATCH [--experts 64] [--rounds 3] [--shard-bytes 2000000000 8000000000]

Makes a synthetic GLM-4.5-Air checkpoint (6.54 GB with 64 experts) for each shard size under SCRATCH, runs everything
interleaved, and writes benchmarks/results/convert.json, by shard size and by what is done before each run about the
page cache and free memory (`measure.STATES`): medians, spread, ratios to cp, peak memory. A checkpoint larger than the
machine's memory, as real ones are, with --experts 320 --states "source not in page cache" --only "cp -r"
"cp -r, synced" convert "shard --tp 8" --result convert_large.json.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.measure import STATES, environment, interleave_states, summarize, write_result

RESULTS = Path(__file__).resolve().parent / "results"
# what a short script without a streaming writer does: one shard in memory at a time
SAFETENSORS_COPY = """
import sys, pathlib
from safetensors.torch import load_file, save_file
src, dst = map(pathlib.Path, sys.argv[1:])
dst.mkdir()
for path in src.glob("*.safetensors"):
    save_file(load_file(path), dst / path.name, metadata={"format": "pt"})
"""


def commands(src: Path) -> dict[str, Callable[[Path], Sequence[str]]]:
    """Return what is measured, by name: a function from the destination to the command line."""
    glm4moe = (sys.executable, "-m", "glm4moe_cli")
    return {
        "cp -r": lambda dst: ("cp", "-r", str(src), str(dst)),
        # what is written here is synced before it has its name; a plain cp may leave all of it in memory
        "cp -r, synced": lambda dst: ("sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(src), str(dst)),
        "safetensors load and save": lambda dst: (sys.executable, "-c", SAFETENSORS_COPY, str(src), str(dst)),
        "convert": lambda dst: (*glm4moe, "convert", str(src), str(dst), "-q"),
        "convert --layout packed": lambda dst: (*glm4moe, "convert", str(src), str(dst), "-q", "--layout", "packed"),
        "convert --dtype float16": lambda dst: (*glm4moe, "convert", str(src), str(dst), "-q", "--dtype", "float16"),
        "shard --tp 8": lambda dst: (*glm4moe, "shard", str(src), str(dst), "-q", "--tp", "8"),
        "quantize --scheme fp8": lambda dst: (*glm4moe, "quantize", str(src), str(dst), "-q", "--scheme", "fp8"),
        "glm4moe --help": lambda dst: (*glm4moe, "--help"),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shard-bytes", type=int, nargs="+", default=[1_000_000_000, 8_000_000_000])
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--only", nargs="+", help="names of the commands to run; the first is the baseline")
    parser.add_argument("--result", default="convert.json", help="file under benchmarks/results")
    args = parser.parse_args()
    result: dict = {"environment": environment(), "rounds": args.rounds, "shard_sizes": {}}
    for shard_bytes in args.shard_bytes:
        src = args.scratch / "src"
        shutil.rmtree(src, ignore_errors=True)
        # in a child: what this process ever held would count as the peak of every child it starts
        make = (sys.executable, "benchmarks/synthetic.py", str(src), "--experts", str(args.experts))
        made = subprocess.run([*make, "--shard-bytes", str(shard_bytes)], capture_output=True, text=True, check=True)
        num_bytes = int(made.stdout)
        chosen = commands(src)
        chosen = {name: chosen[name] for name in args.only or chosen}
        found = interleave_states(chosen, [src], args.scratch, args.rounds, args.states)
        result["source_bytes"] = num_bytes
        result["shard_sizes"][str(shard_bytes)] = {
            state: summarize(samples, num_bytes, next(iter(chosen))) for state, samples in found.items()
        }
        write_result(RESULTS / args.result, result)
    shutil.rmtree(args.scratch / "src")


if __name__ == "__main__":
    main()
