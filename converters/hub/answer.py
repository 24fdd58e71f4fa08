"""What the headers of an HTTP answer say of the bytes that follow."""

from collections.abc import Iterator, Mapping

from converters.hub.fetch import Answer

_CONTENT_RANGE_UNIT = "bytes "


def read_answer(status: int, chain: list[Mapping[str, str]], chunks: Iterator[bytes]) -> Answer:
    """Read the headers of an answer and of the redirects that led to it.

    The hub's own redirect states commit and digest (X-Linked-Etag); the storage behind it has etags of its own.
    """
    headers = chain[-1]
    commits = [part["X-Repo-Commit"] for part in chain if "X-Repo-Commit" in part]
    etags = [part["X-Linked-Etag"] for part in chain if "X-Linked-Etag" in part]
    begin, total = _content_range(headers.get("Content-Range", "")) if status == 206 else (0, _length(headers))
    encoding = headers.get("Content-Encoding", "identity").lower()
    etag = etags[0] if etags else headers.get("ETag")
    return Answer(begin, total, encoding, etag, commits[0] if commits else None, chunks)


def _content_range(value: str) -> tuple[int, int | None]:
    """Return first byte and whole size of `bytes 0-9/100`; -1 for a range that cannot be read."""
    span, _, total = value.removeprefix(_CONTENT_RANGE_UNIT).partition("/")
    begin = span.partition("-")[0]
    return int(begin) if begin.isdecimal() else -1, int(total) if total.isdecimal() else None


def _length(headers: Mapping[str, str]) -> int | None:
    value = headers.get("Content-Length", "")
    return int(value) if value.isdecimal() else None
