"""What a plan asks of weights that are not there yet: few requests, several at a time, and the bytes of the file."""

import threading
from pathlib import Path

import pytest
from builders import small_checkpoint

from converters.checkpoint.index import scan_checkpoint
from converters.checkpoint.reader import CheckpointReader, Span
from converters.remote import REQUESTS_AT_ONCE
from converters.staged import Request, StagedReader, together


def test_near_ranges_of_a_file_are_one_request():
    wanted = [
        Request("b", 10, 20),
        Request("a", 40_000, 40_010),
        Request("a", 0, 100),
        Request("a", 50, 60),
        Request("a", 32_868, 33_000),
        Request("a", 72_779, 72_780),
    ]
    requests, members = together(wanted)
    # 32768 bytes apart are near, 32769 are not
    assert requests == [Request("a", 0, 40_010), Request("a", 72_779, 72_780), Request("b", 10, 20)]
    assert members == [[2, 3, 4, 1], [5], [0]]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return small_checkpoint(tmp_path / "source", num_shards=4)


def spans_of(reader: CheckpointReader) -> list[Span]:
    """Return the beginning and the end of every tensor, in an order of no file."""
    found = []
    for name in reversed(reader.names):
        size = reader.entry(name).nbytes
        found += [Span(name, size - size // 3, size), Span(name, 0, min(size, 5))]
    return found


def test_spans_have_the_bytes_of_the_file(folder: Path):
    def peek(file: str, begin: int, end: int) -> bytes:
        asked.append((file, begin, end))
        return (folder / file).read_bytes()[begin:end]

    asked: list[tuple[str, int, int]] = []
    with CheckpointReader.open(folder) as plain, StagedReader(scan_checkpoint(folder), folder, peek) as staged:
        spans = spans_of(plain)
        expected = plain.read_spans(spans)
        assert staged.read_spans(spans) == expected
        assert staged.read_spans([]) == []
        assert len(asked) < len(spans) / 10
        for file in staged.index.files:
            staged.admit(file)
        staged.end_peeking()
        before = len(asked)
        assert staged.read_spans(spans) == expected
        assert len(asked) == before


def test_several_requests_are_under_way_at_once(folder: Path):
    meeting = threading.Barrier(REQUESTS_AT_ONCE // 2, timeout=20)

    def peek(file: str, begin: int, end: int) -> bytes:
        # passes only when the requests for all four files are here
        meeting.wait()
        return (folder / file).read_bytes()[begin:end]

    with StagedReader(scan_checkpoint(folder), folder, peek) as staged:
        firsts = {staged.index.entries[name][0]: name for name in staged.names}
        assert len(firsts) == REQUESTS_AT_ONCE // 2
        assert [len(data) for data in staged.read_spans([Span(name, 0, 2) for name in firsts.values()])] == [2] * 4


def test_a_request_that_fails_ends_the_others(folder: Path):
    def peek(file: str, begin: int, end: int) -> bytes:
        raise OSError(file)

    with StagedReader(scan_checkpoint(folder), folder, peek) as staged, pytest.raises(OSError, match="model-"):
        staged.read_spans(spans_of(staged))
