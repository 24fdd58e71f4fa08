"""Shared fixtures: paths of the committed data, and a small complete checkpoint."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from builders import small_checkpoint

# inner threads of small operations only wait for each other, and for whoever else uses the machine
torch.set_num_threads(1)
# a job in the background of a shell ignores Ctrl-C, and so would every program that a test starts and interrupts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
TALLY = pytest.StashKey[list[str]]()


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Take a line of counts, to be printed at the end of the test run."""
    return request.config.stash.setdefault(TALLY, []).append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print the counts that tests reported."""
    lines = config.stash.get(TALLY, [])
    if lines:
        terminalreporter.section("counts")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(scope="session")
def fixtures_dir() -> Path:
    """The committed fixtures."""
    return ROOT / "fixtures"


@pytest.fixture(scope="session")
def tiny() -> Path:
    """The trained checkpoint. Read-only."""
    return ROOT / "fixtures" / "tiny"


@pytest.fixture(scope="session")
def held_out() -> Path:
    """Text that the trained checkpoint never saw."""
    return ROOT / "fixtures" / "tiny_heldout.txt"


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A complete random checkpoint in two shards, its MTP layer with copies of embedding and head."""
    return small_checkpoint(tmp_path / "small")
