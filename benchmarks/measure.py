"""Run commands side by side and keep wall time, CPU time and peak memory: interleaved rounds, medians and spread.

Files that are read may be in the page cache, as after a download, or not, as of a checkpoint larger than the memory:
`STATES` has what brings them there, by the name that results give the state; the first leaves things as they come.
"""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
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


# in a child: what this process ever held would count as the peak of every child it starts
TOUCH_FREE_MEMORY = """
import mmap
facts = dict(line.split(":") for line in open("/proc/meminfo"))
free = int(facts["MemFree"].split()[0]) << 10
mmap.mmap(-1, max(free - (1 << 30), 1 << 20), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE)
"""


def touch_free_memory() -> None:
    """Use the free memory once, so that what runs next does not pay for it.

    A virtual machine hands back memory that it frees, and getting it from its host again costs the next user up to a
    second a GB: the same `cp -r` of 6.5 GB took 2 s where memory was at hand, and from 4 to 11 s as it came.
    """
    subprocess.run((sys.executable, "-c", TOUCH_FREE_MEMORY), check=True)


def as_it_comes(_: Sequence[Path]) -> None:
    """Prepare nothing: what the command before has left of the source and of free memory is what there is."""


def with_source_cached(folders: Sequence[Path]) -> None:
    """Bring the source into the page cache, and have memory at hand for the copy."""
    read_files(folders)
    touch_free_memory()


def with_source_dropped(folders: Sequence[Path]) -> None:
    """Take the source out of the page cache, and have memory at hand for both."""
    drop_files(folders)
    touch_free_memory()


STATES: dict[str, Callable[[Sequence[Path]], None]] = {
    "as it comes": as_it_comes,
    "source in page cache": with_source_cached,
    "source not in page cache": with_source_dropped,
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
    """Run every command once a round into an empty folder, so that the machine's noise falls on all alike.

    Each round begins with another command.
    """
    names = list(commands)
    samples: dict[str, list[Sample]] = {name: [] for name in names}
    for round_number in range(rounds):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            target = scratch / "out"
            shutil.rmtree(target, ignore_errors=True)
            samples[name].append(run_once(commands[name](target), prepare))
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
    """Run every command in each of some STATES, as `interleave` does; return its samples by state and name.

    Args:
        commands: see `interleave`.
        sources: the folders that commands read.
        scratch: where they write.
        rounds: how often.
        states: keys of STATES.
    """
    found: dict[str, dict[str, list[Sample]]] = {}
    for state in states:
        print(state, flush=True)
        found[state] = interleave(commands, scratch, rounds, partial(STATES[state], sources))
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
