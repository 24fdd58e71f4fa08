"""A folder on a fast disk: a case writes and syncs some hundred small files."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory where possible."""
    if not os.access("/dev/shm", os.W_OK):
        yield tmp_path
        return
    folder = Path(tempfile.mkdtemp(prefix="glm4moe-shard-", dir="/dev/shm"))
    yield folder
    shutil.rmtree(folder)
