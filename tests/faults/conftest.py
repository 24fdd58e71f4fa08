"""What the fault tests share: the server that runs commands, a folder on a fast disk, and small jobs."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from builders import small_checkpoint

from tests.faults.harness import Job, Runner, make_job

COMMANDS = {
    "convert": ("convert", "--max-shard-size", "10kB", "--workers", "1"),
    "quantize": ("quantize", "--scheme", "fp8", "--max-shard-size", "6kB", "--workers", "1"),
}
TINY = {"num_hidden_layers": 1, "n_routed_experts": 2, "hidden_size": 32, "intermediate_size": 32, "head_dim": 8}


@pytest.fixture(scope="session")
def runner() -> Iterator[Runner]:
    """The server that runs commands."""
    server = Runner()
    yield server
    server.close()


@pytest.fixture(scope="session")
def second_runner() -> Iterator[Runner]:
    """Another server, for a run beside the first."""
    server = Runner()
    yield server
    server.close()


@pytest.fixture
def lanes(runner: Runner, second_runner: Runner) -> tuple[Runner, ...]:
    """Servers for runs that have nothing to do with each other, at once."""
    return runner, second_runner


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory where possible: thousands of runs sync hundreds of thousands of files."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="glm4moe-faults-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def src(work: Path) -> Path:
    """A complete checkpoint of about 60 kB in three shards."""
    return small_checkpoint(work / "src", num_shards=3, mtp_copies=False, **TINY)


@pytest.fixture(params=COMMANDS)
def job(request: pytest.FixtureRequest, runner: Runner, src: Path, work: Path) -> Job:
    """Each of the two commands that write checkpoints."""
    return make_job(runner, COMMANDS[request.param], src, work)
