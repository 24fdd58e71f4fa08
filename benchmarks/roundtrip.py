"""Layout round trips on a large checkpoint: equal content digests, byte-identical tensors, seconds and peak memory.

    PYTHONPATH=. python benchmarks/roundtrip.py SRC SCRATCH

SRC is a checkpoint in the split layout, e.g. of benchmarks/synthetic.py. Goes from it to every other layout and back,
compares `inspect --hash` at each stop and every tensor's sha256 with the source's, and writes
benchmarks/results/roundtrip.json.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from benchmarks.measure import environment, run_once, write_result
from converters.checkpoint.index import scan_checkpoint
from converters.checkpoint.reader import CheckpointReader

RESULT = Path(__file__).resolve().parent / "results" / "roundtrip.json"
LAYOUTS = ("packed", "fused-shared", "fused")
GLM4MOE = (sys.executable, "-m", "glm4moe_cli")


def content_hash(folder: Path) -> str:
    """Return what `inspect --hash` says of a folder."""
    done = subprocess.run([*GLM4MOE, "inspect", str(folder), "--hash", "--json"], capture_output=True, check=True)
    return json.loads(done.stdout)["result"]["content_sha256"]


def tensor_digests(folder: Path) -> dict[str, str]:
    """Return sha256 of every stored tensor's bytes."""
    digests, buffer = {}, memoryview(bytearray(1 << 23))
    with CheckpointReader(scan_checkpoint(folder)) as reader:
        for name in reader.names:
            digest, nbytes = hashlib.sha256(), reader.entry(name).nbytes
            for position in range(0, nbytes, len(buffer)):
                block = buffer[: min(len(buffer), nbytes - position)]
                reader.read_into(name, position, block)
                digest.update(block)
            digests[name] = digest.hexdigest()
    return digests


def main() -> None:
    """Run all round trips and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("src", type=Path)
    parser.add_argument("scratch", type=Path)
    args = parser.parse_args()
    there, back = args.scratch / "there", args.scratch / "back"
    expected, digests = content_hash(args.src), tensor_digests(args.src)
    result: dict = {"environment": environment(), "hash": expected, "tensors": len(digests), "round_trips": {}}
    for layout in LAYOUTS:
        for folder in (there, back):
            shutil.rmtree(folder, ignore_errors=True)
        out = run_once([*GLM4MOE, "convert", str(args.src), str(there), "-q", "--layout", layout])
        home = run_once([*GLM4MOE, "convert", str(there), str(back), "-q", "--layout", "split"])
        result["round_trips"][layout] = {
            "hash_equal": content_hash(there) == expected == content_hash(back),
            "tensors_byte_identical": tensor_digests(back) == digests,
            "there": asdict(out),
            "back": asdict(home),
        }
        print(layout, result["round_trips"][layout], flush=True)
        write_result(RESULT, result)
    for folder in (there, back):
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
