"""Run command lines with faults, and judge what they leave: never a wrong file under a final name."""

import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from converters.checkpoint.manifest import MANIFEST_FILE
from converters.errors import Glm4MoeError
from converters.source import open_source
from glm4moe_cli import main

ROOT = Path(__file__).resolve().parents[2]
KILLED = -9
ONE_AT_A_TIME = threading.Lock()
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended.

    Exit code or minus the signal; seconds from its first point to its end; points passed; reads, if they are followed;
    what it printed.
    """

    code: int
    seconds: float
    points: int
    reads: int
    text: str


class Runner:
    """A client of `forker`."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.faults.forker"]
        # one thread each: a fork of a process with threads would inherit their locks
        environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        environment["OPENBLAS_NUM_THREADS"] = "1"
        environment.pop("HF_HUB_OFFLINE", None)
        self._process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def __call__(self, args: list[str], folder: Path, **request: Any) -> Ended:
        """Run `glm4moe *args`; `folder` is the output, below which calls count as points."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"args": args, "folder": str(folder), **request}) + "\n")
        return Ended(**json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the server."""
        self._process.communicate()


def digests(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file by its path in the folder, hidden ones too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if not path.is_dir()
    }


@dataclass(frozen=True)
class Job:
    """A command line into a folder, and the files that it must leave there."""

    runner: Runner
    command: tuple[str, ...]
    src: Path
    dst: Path
    expected: dict[str, str]

    def run(self, *more: str, **request: Any) -> Ended:
        """Run the command, with a fault if the request says so."""
        command, *options = self.command
        return self.runner([command, str(self.src), str(self.dst), *options, *more], self.dst, **request)

    def check_unfinished(self) -> bool:
        """Check that whatever stands under a final name is right, and that nobody takes a part for the whole.

        Returns:
            Whether all is there that a loader needs.
        """
        found = digests(self.dst) if self.dst.exists() else {}
        final = {name: digest for name, digest in found.items() if not name.startswith(".")}
        assert final.items() <= self.expected.items()
        is_whole = self.expected.keys() - final.keys() <= {MANIFEST_FILE}
        assert accepted(self.dst) == is_whole, sorted(final)
        assert is_whole or not accepted_by_transformers(self.dst), sorted(final)
        return is_whole

    def check_finished(self, ended: Ended) -> None:
        """Check that a run reached the end and left exactly the expected bytes and nothing else."""
        assert ended.code == 0, ended.text
        assert digests(self.dst) == self.expected

    def finish(self, **request: Any) -> None:
        """Run the same command again to its end, check the result, and clear it away."""
        self.check_finished(self.run(**request) if request else self._run_here())
        self.clear()

    def finish_apart(self) -> None:
        """Do as `finish` does, in a fork: what several threads do at once may not share stdout."""
        self.check_finished(self.run())
        self.clear()

    def _run_here(self) -> Ended:
        """Run the command in this process, which spares a fork: undisturbed, it makes no difference."""
        command, *options = self.command
        with io.StringIO() as text, redirect_stdout(text), redirect_stderr(text):
            code = main.run([command, str(self.src), str(self.dst), *options])
            return Ended(code, 0.0, 0, 0, text.getvalue())

    def clear(self) -> None:
        """Remove the output."""
        shutil.rmtree(self.dst, ignore_errors=True)


def make_job(runner: Runner, command: tuple[str, ...], src: Path, work: Path) -> Job:
    """Return a job with the files of an undisturbed run as what is expected."""
    job = Job(runner, command, src, work / "dst", {})
    ended = job.run()
    assert ended.code == 0, ended.text
    job.expected.update(digests(job.dst))
    job.clear()
    return job


def each_point(job: Job, lanes: Sequence[Runner], disturb: Callable[[Job, int], T | None], step: int = 1) -> list[T]:
    """Disturb runs at points 1, 1 + step and so on, on all lanes at once, until a run ends before its point.

    Args:
        disturb: gets a job with a folder of its own and the point; returns None for a run that ended before it.
    Returns:
        What it returned for each point that was reached, in any order.
    """
    points, results, over = itertools.count(1, step), list[T](), threading.Event()

    def work(number: int) -> None:
        own = Job(lanes[number], job.command, job.src, job.dst.with_name(f"{job.dst.name}-{number}"), job.expected)
        while not over.is_set():
            try:
                result = disturb(own, next(points))
            except BaseException:
                over.set()
                raise
            over.set() if result is None else results.append(result)

    with ThreadPoolExecutor(len(lanes)) as pool:
        list(pool.map(work, range(len(lanes))))
    return results


def accepted(folder: Path) -> bool:
    """Tell whether our own gate takes the folder for a whole checkpoint."""
    try:
        open_source(folder).reader.close()
    except Glm4MoeError:
        return False
    return True


def accepted_by_transformers(folder: Path) -> bool:
    """Tell whether transformers loads a model from the folder."""
    # its modules load what they name when it is asked for, and not for two threads at once
    with ONE_AT_A_TIME:
        from transformers import AutoModelForCausalLM

        try:
            AutoModelForCausalLM.from_pretrained(folder)
        except (OSError, ValueError):
            return False
        return True
