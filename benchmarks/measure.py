"""Run commands side by side and keep wall time, CPU time and peak memory: interleaved rounds, medians and spread.

Files that are read may be in the page cache, as after a download, or not, as of a checkpoint larger than the memory:
`STATES` has what brings them there, by the name that results give the state.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "safetensors", "numpy")


@dataclass(frozen=True)
class Sample:
    """One run: seconds of wall clock and of CPU, and the child's peak resident memory in bytes."""

    wall_s: float
    cpu_s: float
    peak_bytes: int


def read_files(folders: Sequence[Path]) -> None:
    """Bring every file of some folders into the page cache."""
    buffer = bytearray(8 << 20)
    for path in (path for folder in folders for path in sorted(folder.iterdir())):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def drop_files(folders: Sequence[Path]) -> None:
    """Take every file of some folders out of the page cache; only what is synced goes."""
    for path in (path for folder in folders for path in folder.iterdir()):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


STATES: dict[str, Callable[[Sequence[Path]], None]] = {
    "source in page cache": read_files,
    "source not in page cache": drop_files,
}


def run_once(command: Sequence[str], prepare: Callable[[], None] = lambda: None) -> Sample:
    """Run a command to its end in a child process, after `prepare`; its output is dropped, a failure raises."""
    os.sync()
    prepare()
    start = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    wall = time.monotonic() - start
    if child.returncode:
        raise subprocess.CalledProcessError(child.returncode, command)
    return Sample(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def interleave(
    commands: dict[str, Callable[[Path], Sequence[str]]],
    scratch: Path,
    rounds: int,
    prepare: Callable[[], None] = lambda: None,
) -> dict[str, list[Sample]]:
    """Run every command once a round into an empty folder, so that the machine's noise falls on all alike."""
    samples: dict[str, list[Sample]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            target = scratch / "out"
            shutil.rmtree(target, ignore_errors=True)
            samples[name].append(run_once(command(target), prepare))
            print(name, samples[name][-1], flush=True)
            shutil.rmtree(target, ignore_errors=True)
    return samples


def interleave_states(
    commands: dict[str, Callable[[Path], Sequence[str]]],
    sources: Sequence[Path],
    scratch: Path,
    rounds: int,
    states: Collection[str] = tuple(STATES),
) -> dict[str, dict[str, list[Sample]]]:
    """Run every command in each of some STATES once a round; return its samples by state and name.

    Args:
        commands: see `interleave`.
        sources: the folders that commands read.
        scratch: where they write.
        rounds: how often.
        states: keys of STATES.
    """
    found: dict[str, dict[str, list[Sample]]] = {state: {name: [] for name in commands} for state in states}
    for _ in range(rounds):
        for state in states:
            prepare = STATES[state]
            print(state, flush=True)
            for name, samples in interleave(commands, scratch, 1, partial(prepare, sources)).items():
                found[state][name] += samples
    return found


def summarize(samples: dict[str, list[Sample]], num_bytes: int, baseline: str) -> dict[str, Any]:
    """Return medians, spreads and the ratio of wall times to the baseline's, round by round."""
    result = {}
    for name, runs in samples.items():
        walls = [run.wall_s for run in runs]
        ratios = [run.wall_s / base.wall_s for run, base in zip(runs, samples[baseline], strict=True)]
        result[name] = {
            "wall_s": {"median": statistics.median(walls), "min": min(walls), "max": max(walls)},
            "ratio_to_baseline": {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)},
            "source_mb_per_s": num_bytes / 1e6 / statistics.median(walls),
            "source_mb_per_cpu_s": num_bytes / 1e6 / statistics.median(run.cpu_s for run in runs),
            "peak_mib": max(run.peak_bytes for run in runs) / 2**20,
            "runs": [asdict(run) for run in runs],
        }
    return result


def environment() -> dict[str, Any]:
    """Return what a reader needs to judge the figures: machine and versions."""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def write_result(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON document."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
