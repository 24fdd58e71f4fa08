"""TERM, USR1 and INT end a run soon, with their exit codes, and what it did is kept."""

import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import small_checkpoint

from tests.faults.harness import KILLED, ROOT, Job
from tests.faults.points import PATIENCE_SECONDS

CODES = {"SIGTERM": 75, "SIGUSR1": 75, "SIGINT": 130}
MOMENTS = 8


@pytest.mark.parametrize("name", CODES)
def test_signal_at_random_moments(job: Job, name: str, tally: Callable[[str], None]) -> None:
    moments = random.Random(name)
    for _ in range(MOMENTS):
        # each write takes a little longer, and the end waits for the signal
        points = {"delay": 0.002, "hold": ".config.json."}
        ended = job.run(points=points, signals=[(1, moments.uniform(0, 0.1), name)])
        assert ended.code == CODES[name], ended.text
        assert "Run the same command again to go on from here." in ended.text
        assert "Traceback" not in ended.text
        job.check_unfinished()
        job.finish()
    tally(f"signals: {job.command[0]} got {name} at {MOMENTS} random moments: exit {CODES[name]}, resumed, 0 wrong")


@pytest.mark.parametrize("name", CODES)
def test_signal_at_points_of_all_kinds(job: Job, name: str, tally: Callable[[str], None]) -> None:
    """From the first lock to the last removal; the signal comes in the middle of the call."""
    last, tried = job.run().points, 0
    job.clear()
    for at in range(1, last, 11):
        ended = job.run(points={"at": at, "action": name})
        assert ended.code == CODES[name], (at, ended.text)
        assert "Traceback" not in ended.text
        job.check_unfinished()
        job.finish()
        tried += 1
    tally(f"signals: {job.command[0]} got {name} at {tried} points: exit {CODES[name]}, resumed, 0 wrong")


@pytest.mark.parametrize("name", CODES)
def test_signal_does_not_wait_for_a_slow_disk(job: Job, name: str) -> None:
    """Of all that would be left to do only a small part is done; each write takes 0.05 s."""
    whole = job.run("--max-memory", "4096B").points
    job.clear()
    at = whole // 6
    ended = job.run("--max-memory", "4096B", points={"delay": 0.05, "at": at, "action": name})
    assert ended.code == CODES[name]
    assert ended.points - at < (whole - at) // 3
    job.finish()


@pytest.mark.parametrize("name", CODES)
def test_signal_while_finished_shards_are_proved(job: Job, work: Path, name: str) -> None:
    """All that was done is read again first; of a real checkpoint that takes many minutes."""
    last = job.run().points
    job.clear()
    assert job.run(points={"at": last - 14, "action": "kill"}).code == KILLED
    shutil.copytree(job.dst, work / "unfinished")
    whole = job.run(reading={"folder": str(job.dst / "model")}).reads
    job.clear()
    shutil.copytree(work / "unfinished", job.dst)
    ended = job.run(reading={"folder": str(job.dst / "model"), "delay": 0.05, "at": 3, "fault": name})
    assert ended.code == CODES[name]
    assert ended.reads < whole // 2
    job.finish()


@pytest.mark.parametrize("name", CODES)
def test_second_signal_spoils_nothing(job: Job, name: str) -> None:
    moments = random.Random(name)
    for again in (1, 2, 4, 8):
        ended = job.run(points={"at": moments.randint(20, 100), "action": name, "again": again})
        assert ended.code == CODES[name], ended.text
        job.check_unfinished()
        job.finish()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_program_as_installed_ends_soon_and_resumes(tmp_path: Path, name: str) -> None:
    """A process of its own, with the interpreter's own end: no thread may keep it alive."""
    src = small_checkpoint(tmp_path / "src", vocab_size=10_000, hidden_size=480, num_shards=1)
    dst = tmp_path / "dst"
    args = ["convert", str(src), str(dst), "--max-shard-size", "200kB", "-q", "--dtype", "float32", "--workers", "1"]
    # the end waits for the signal, so that it cannot come too late
    code = f"""
import sys, time
from converters import job
from glm4moe_cli.main import main
def held(task):
    time.sleep({PATIENCE_SECONDS})
job._commit = held
sys.argv = ["glm4moe", *{args!r}]
main()
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not list(dst.glob("*.safetensors")):
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.Signals[name])
    _, error = process.communicate()
    assert process.returncode == CODES[name], error
    assert error.count("\n") == 1
    assert not (dst / "config.json").exists()
    assert not list(dst.glob(".*.partial"))
    assert subprocess.run([sys.executable, "-m", "glm4moe_cli", *args], cwd=ROOT).returncode == 0
    assert (dst / "config.json").exists()
