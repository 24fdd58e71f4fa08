"""Hints to the kernel while a shard is written: which bytes, in which order; and that nothing depends on them."""

import ctypes
import os
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest

from converters.checkpoint import write_behind
from converters.checkpoint.plan import OutputTensor, Shard, Unit
from converters.checkpoint.write_behind import WriteBehind, merged
from converters.checkpoint.writer import ShardWriter
from converters.transforms.rows import Copy


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What the kernel is told, with batches of 100 bytes of which three may be on their way."""
    told: list[tuple[str, int, int]] = []

    def start(_: int, begin: int, size: int, flags: int) -> int:
        assert flags == 2  # SYNC_FILE_RANGE_WRITE: does not wait, and takes no error away
        told.append(("start", begin, begin + size))
        return 0

    def advise(_: int, begin: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_DONTNEED
        told.append(("drop", begin, begin + size))

    monkeypatch.setattr(write_behind, "BATCH_BYTES", 100)
    monkeypatch.setattr(write_behind, "BEHIND_BYTES", 300)
    monkeypatch.setattr(write_behind, "_start_writing", lambda: start)
    monkeypatch.setattr(os, "posix_fadvise", advise)
    return told


def test_batches_are_started_at_once_and_dropped_when_others_followed(hints: list[tuple[str, int, int]]) -> None:
    behind = WriteBehind(7)
    behind.wrote(0, 60)
    assert hints == []
    behind.wrote(500, 540)
    assert hints == [("start", 0, 60), ("start", 500, 540)]
    for begin in range(60, 460, 50):
        behind.wrote(begin, begin + 50)
    started = [(60, 160), (160, 260), (260, 360), (360, 460)]
    assert [hint for hint in hints[2:] if hint[0] == "start"] == [("start", *span) for span in started]
    assert [hint for hint in hints if hint[0] == "drop"] == [("drop", 0, 60), ("drop", 500, 540), ("drop", 60, 160)]


def test_merged_spans_cover_the_same_bytes() -> None:
    chosen = Random(0)
    for _ in range(200):
        spans = [(begin, begin + chosen.randint(1, 9)) for begin in chosen.choices(range(60), k=chosen.randint(1, 12))]
        found = merged(spans)
        assert {at for span in found for at in range(*span)} == {at for span in spans for at in range(*span)}
        assert all(left[1] < right[0] for left, right in pairwise(found))


@pytest.mark.parametrize("fault", ["", "no such call", "refused"])
def test_a_file_is_the_same_whatever_becomes_of_the_hints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """On a real file, with the real calls, or where the C library or the file system has none."""
    monkeypatch.setattr(write_behind, "BATCH_BYTES", 4096)
    monkeypatch.setattr(write_behind, "BEHIND_BYTES", 8192)

    def refused(*_: Any) -> None:
        raise OSError(22, "Invalid argument")

    start = write_behind._start_writing
    start.cache_clear()
    if fault == "no such call":
        monkeypatch.setattr(ctypes, "CDLL", lambda _: object())
    if fault == "refused":
        monkeypatch.setattr(os, "posix_fadvise", refused)
    data = Random(1).randbytes(100_000)
    output = OutputTensor("x", "U8", (1000, 100))
    shard = Shard("model.safetensors", (Unit((output,), (), Copy()),))
    writer = ShardWriter(tmp_path, shard)
    writer.open()
    for begin in range(0, len(data), 1000):
        writer.write("x", begin, memoryview(data)[begin : begin + 1000])
    writer.finish()
    start.cache_clear()
    assert (tmp_path / "model.safetensors").read_bytes() == shard.header + data
