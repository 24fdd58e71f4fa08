"""The bytes depend on source, options and version alone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from builders import small_checkpoint

from tests.faults.conftest import COMMANDS
from tests.faults.harness import ROOT, Job, digests, make_job

REVERSED_FOLDERS = """
import os, pathlib
for name in ("listdir", "scandir"):
    real = getattr(os, name)
    if name == "listdir":
        os.listdir = lambda *args, real=real: sorted(real(*args), reverse=True)
pathlib.os = os
"""
# each runs in an interpreter of its own
WORLDS = (
    {"LC_ALL": "C", "TZ": "UTC", "PYTHONHASHSEED": "0", "LANG": "C"},
    {"LC_ALL": "tr_TR.UTF-8", "TZ": "Asia/Kathmandu", "PYTHONHASHSEED": "12345", "PYTHONUTF8": "0", "COLUMNS": "20"},
)


@pytest.mark.parametrize("workers", ["1", "2", "8"])
@pytest.mark.parametrize("memory", ["40kB", "1MB", "512MB"])
def test_workers_and_memory(job: Job, workers: str, memory: str) -> None:
    job.finish()
    job.check_finished(job.run("--workers", workers, "--max-memory", memory))


def test_folder_umask_and_order_of_files(job: Job, work: Path) -> None:
    # the order in which a file system lists files is mostly that of their creation
    files = sorted(job.src.iterdir(), reverse=True)
    (work / "other").mkdir()
    for path in files:
        shutil.copy(path, work / "other" / path.name)
    moved = Job(job.runner, job.command, work / "other", work / "elsewhere", job.expected)
    moved.check_finished(moved.run(cwd=str(work), umask=0o077, prepare=[REVERSED_FOLDERS]))
    assert {path.stat().st_mode & 0o777 for path in moved.dst.iterdir()} == {0o600}


@pytest.mark.parametrize("command", COMMANDS)
def test_locale_time_zone_and_hash_seed(runner: Callable[..., object], work: Path, command: str) -> None:
    job = make_job(runner, COMMANDS[command], small_checkpoint(work / "src", num_shards=3), work)
    name, *options = job.command
    for number, world in enumerate(WORLDS):
        dst = work / f"world{number}"
        args = [sys.executable, "-m", "glm4moe_cli", name, "src", dst.name, *options, "-q"]
        environment = {**os.environ, **world, "PYTHONPATH": str(ROOT)}
        subprocess.run(args, cwd=work, env=environment, check=True)
        assert digests(dst) == job.expected
