"""shard, merge and reshard beside `cp -r` of the same checkpoint, on real layer shapes, in one run.

    PYTHONPATH=. python benchmarks/shard.py SCRATCH [--experts 64] [--rounds 3]

Makes a synthetic GLM-4.5-Air checkpoint (6.54 GB with 64 experts) under SCRATCH, shards it once for what starts from
shards, runs everything interleaved, and writes benchmarks/results/shard.json: medians, spread, ratios to cp, peak
memory, by what is done before each run about page cache and free memory (`measure.STATES`); whether the merged
checkpoint has the content digest of the original; bytes of each rank for released models. A checkpoint larger than the
machine's memory, as real ones are, with --experts 240 --rounds 2 --states "source not in page cache" --result
shard_large.json.
"""

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import STATES, environment, interleave_states, summarize, write_result
from converters.shard.mapping import ParallelMapping
from converters.shard.planner import plan_ranks
from converters.source import open_source
from tests.converters.inspect.fakes import config_of, official

RESULTS = Path(__file__).resolve().parent / "results"
GLM4MOE = (sys.executable, "-m", "glm4moe_cli")
RELEASED = ("GLM-4.5", "GLM-4.5-Air", "GLM-4.6", "GLM-4.7")
MAPPINGS = {"tp8": {"tp": 8}, "tp8 ep8": {"tp": 8, "ep": 8}, "tp4 pp2": {"tp": 4, "pp": 2}}


def commands(src: Path, cut: Path) -> dict[str, Callable[[Path], Sequence[str]]]:
    """Return what is measured, by name: a function from the destination to the command line."""

    def shard(of: Path, *options: str) -> Callable[[Path], Sequence[str]]:
        return lambda dst: (*GLM4MOE, "shard", str(of), str(dst), "-q", *options)

    return {
        "cp -r": lambda dst: ("cp", "-r", str(src), str(dst)),
        # what is written here is synced before it has its name; a plain cp may leave all of it in memory
        "cp -r, synced": lambda dst: ("sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', str(src), str(dst)),
        "shard --tp 8": shard(src, "--tp", "8"),
        "shard --tp 8 --ep 8": shard(src, "--tp", "8", "--ep", "8"),
        "shard --merge, from tp 8": shard(cut, "--merge"),
        "shard --reshard, tp 8 to tp 4 pp 2": shard(cut, "--reshard", "--tp", "4", "--pp", "2"),
    }


def content_hash(folder: Path) -> str:
    """Return what `inspect --hash` says of a folder."""
    done = subprocess.run([*GLM4MOE, "inspect", str(folder), "--hash", "--json"], capture_output=True, check=True)
    return json.loads(done.stdout)["result"]["content_sha256"]


def rank_bytes(scratch: Path) -> dict[str, Any]:
    """Return the bytes of weights that each rank of the released models holds, from their headers."""
    found: dict[str, Any] = {}
    for model in RELEASED:
        own = {"mtp_copies": model != "GLM-4.6", "mtp_file": model == "GLM-4.7"}
        folder = official(scratch / model, config_of(model), **own)
        with open_source(folder) as source:
            plans = {name: plan_ranks(source, ParallelMapping(**sizes)) for name, sizes in MAPPINGS.items()}
        found[model] = {
            name: {"stages": plan.mapping.stages, "weight_bytes": [rank.weight_bytes for rank in plan.ranks]}
            for name, plan in plans.items()
        }
        shutil.rmtree(folder)
    return found


def prepare(scratch: Path, experts: int) -> tuple[int, bool]:
    """Make the checkpoint and its shards; return its bytes, and whether merged shards have its content digest."""
    src, cut, back = (scratch / name for name in ("src", "cut", "back"))
    for folder in (src, cut, back):
        shutil.rmtree(folder, ignore_errors=True)
    # in a child: what this process ever held would count as the peak of every child it starts
    make = (sys.executable, "benchmarks/synthetic.py", str(src), "--experts", str(experts))
    num_bytes = int(subprocess.run(make, capture_output=True, text=True, check=True).stdout)
    subprocess.run([*GLM4MOE, "shard", str(src), str(cut), "--tp", "8", "-q"], check=True)
    subprocess.run([*GLM4MOE, "shard", str(cut), str(back), "--merge", "-q"], check=True)
    same = content_hash(src) == content_hash(back)
    shutil.rmtree(back)
    return num_bytes, same


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scratch", type=Path)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--states", nargs="+", choices=STATES, default=list(STATES))
    parser.add_argument("--result", default="shard.json", help="file under benchmarks/results")
    args = parser.parse_args()
    src, cut = args.scratch / "src", args.scratch / "cut"
    num_bytes, same = prepare(args.scratch, args.experts)
    found = interleave_states(commands(src, cut), [src, cut], args.scratch, args.rounds, args.states)
    for folder in (src, cut):
        shutil.rmtree(folder)
    result = {
        "environment": environment(),
        "rounds": args.rounds,
        "source_bytes": num_bytes,
        "merged_has_the_digest_of_the_original": same,
        "runs": {state: summarize(samples, num_bytes, "cp -r") for state, samples in found.items()},
        "released_models": rank_bytes(args.scratch),
    }
    write_result(RESULTS / args.result, result)


if __name__ == "__main__":
    main()
