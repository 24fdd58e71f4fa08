"""Pools whose threads start whole or not at all."""

import resource
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from converters.workers import ROOM_BYTES, check_room, start_pool

NEAR_THE_LIMIT = """
import mmap, resource, sys
from pathlib import Path
import torch
from converters.workers import start_pool
used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
limit = used + int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    with start_pool(2, "test") as pool:
        print(sum(pool.map(lambda n: int(torch.ones(n).sum()), range(100))))
except MemoryError as error:
    print(error)
"""


def test_every_thread_of_a_pool_runs_before_it_has_work() -> None:
    before = threading.active_count()
    with start_pool(3, "three") as pool:
        assert threading.active_count() == before + 3
        assert list(pool.map(abs, [-1, 2])) == [1, 2]
    assert threading.active_count() == before


def test_no_thread_is_left_where_the_last_one_finds_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, before = [], threading.active_count()

    def refuse_third() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise MemoryError

    monkeypatch.setattr("converters.workers.check_room", refuse_third)
    with pytest.raises(MemoryError):
        start_pool(3, "three")
    assert threading.active_count() == before


def test_room_is_refused_beyond_the_limit() -> None:
    check_room()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES // 2, limits[1]))
    try:
        with pytest.raises(MemoryError, match="no room for a thread"):
            check_room()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("kilobytes", [0, 2_100, 3_200, 5_300, 6_200, 7_300, 30_000, 33_000, 40_000, 400_000])
def test_pool_near_the_limit_works_or_is_refused(kilobytes: int) -> None:
    """Neither waits forever for a thread that died at its start, nor is aborted by torch."""
    command = (sys.executable, "-c", NEAR_THE_LIMIT, str(kilobytes << 10))
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout in ("4950\n", f"no room for a thread: {ROOM_BYTES >> 20} MiB\n")
