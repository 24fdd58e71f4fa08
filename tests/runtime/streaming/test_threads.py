"""Threads that compute: fewer where reading takes the time, and as many as before afterwards."""

import pytest
import torch

from runtime.streaming.options import StreamOptions
from runtime.streaming.threads import FEW_ROWS, computing_threads


@pytest.fixture
def threads(monkeypatch):
    """The number of threads, which this process's own is not changed for."""
    found = [4]
    monkeypatch.setattr(torch, "get_num_threads", lambda: found[-1])
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    return found


@pytest.mark.parametrize(
    ("num_rows", "options", "expected"),
    [
        (FEW_ROWS, StreamOptions(), 3),
        (FEW_ROWS, StreamOptions(workers=3), 1),
        (FEW_ROWS, StreamOptions(workers=9), 1),
        (FEW_ROWS + 1, StreamOptions(), 4),
        (1, StreamOptions(deterministic=True), 4),
        (1, StreamOptions(device="cuda"), 4),
    ],
)
def test_readers_keep_a_core_each_while_rows_are_few(threads, num_rows, options, expected):
    with computing_threads(num_rows, options):
        assert threads[-1] == expected
    assert threads[-1] == 4


def test_an_error_leaves_no_trace(threads):
    with pytest.raises(ZeroDivisionError), computing_threads(1, StreamOptions()):
        raise ZeroDivisionError
    assert threads == [4, 3, 4]
