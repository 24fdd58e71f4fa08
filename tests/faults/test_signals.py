"""TERM, USR1 and INT end a run soon, with their exit codes, and what it did is kept."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import small_checkpoint

from tests.faults.harness import KILLED, Job

CODES = {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}
MOMENTS = 8
SOON_SECONDS = 2.0


@pytest.mark.parametrize("name", CODES)
def test_signal_at_random_moments(job: Job, name: str, tally: Callable[[str], None]) -> None:
    moments = random.Random(name)
    for _ in range(MOMENTS):
        # each write takes a little longer, so that there is time for a signal
        ended = job.run(points={"delay": 0.002}, signals=[(1, moments.uniform(0, 0.1), name)])
        assert ended.code == CODES[name], ended.text
        assert "Run the same command again to go on from here." in ended.text
        assert "Traceback" not in ended.text
        job.check_unfinished()
        job.finish()
    tally(f"signals: {job.command[0]} got {name} at {MOMENTS} random moments: exit {CODES[name]}, resumed, 0 wrong")


@pytest.mark.parametrize("name", CODES)
def test_signal_does_not_wait_for_a_slow_disk(job: Job, name: str) -> None:
    """Ten times as long as is allowed would be left to do: each write takes 0.2 s."""
    slow = {"points": {"delay": 0.2}, "reading": {"folder": str(job.src), "delay": 0.05}}
    ended = job.run("--max-memory", "4096B", **slow, signals=[(10, 0.3, name)])
    assert ended.code == CODES[name]
    assert 0 < ended.stopped_after < SOON_SECONDS
    job.finish()


@pytest.mark.parametrize("name", CODES)
def test_signal_while_finished_shards_are_proved(job: Job, name: str) -> None:
    """All that was done is read again first; of a real checkpoint that takes many minutes."""
    last = job.run().points
    job.clear()
    assert job.run(points={"at": last - 14, "action": "kill"}).code == KILLED
    slow = {"reading": {"folder": str(job.dst), "delay": 0.1}}
    ended = job.run(**slow, signals=[(1, 0.6, name)])
    assert ended.code == CODES[name]
    assert ended.stopped_after < SOON_SECONDS
    job.finish()


@pytest.mark.parametrize("name", CODES)
def test_second_signal_spoils_nothing(job: Job, name: str) -> None:
    moments = random.Random(name)
    for _ in range(4):
        pair = [(20, moments.uniform(0, 0.05), name), (0, moments.uniform(0, 0.02), name)]
        ended = job.run(points={"delay": 0.005}, signals=pair)
        assert ended.code == CODES[name], ended.text
        job.check_unfinished()
        job.finish()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_program_as_installed_ends_soon_and_resumes(tmp_path: Path, name: str) -> None:
    """A process of its own, with the interpreter's own end: no thread may keep it alive."""
    src = small_checkpoint(tmp_path / "src", vocab_size=60_000, hidden_size=480)
    dst = tmp_path / "dst"
    command = [sys.executable, "-m", "glm4moe_cli", "convert", str(src), str(dst), "--max-shard-size", "1MB", "-q"]
    process = subprocess.Popen([*command, "--dtype", "float32"], stderr=subprocess.PIPE, text=True)
    while not list(dst.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.002)
    start = time.monotonic()
    os.kill(process.pid, signal.Signals[name])
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - start < SOON_SECONDS
    assert process.returncode == CODES[name], error
    assert error.count("\n") == 1
    assert not (dst / "config.json").exists()
    assert not list(dst.glob(".*.partial"))
