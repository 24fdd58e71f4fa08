"""Digests of what a unit was made from and of what it made; the one place that decides which ones those are.

A unit that copies its source byte for byte shares its output's sha256: those bytes are hashed once. All others have
XXH3, which is thirty times as fast: it has to notice that a source changed, not to withstand who wants it unnoticed.
A result has sha256; what is a rank's also has XXH3, so that a merge proves what it reads for next to nothing.
"""

import hashlib
from typing import Protocol

import xxhash

from converters.checkpoint.journal import TensorRecord
from converters.checkpoint.plan import Unit
from converters.transforms.rows import Copy


def is_plain_copy(unit: Unit) -> bool:
    """Return whether a unit's one output is what is read for it, byte for byte."""
    return isinstance(unit.transform, Copy) and all(source.is_whole for source in unit.sources)


def shared_digest(sha256: str) -> str:
    """Return the source digest of an output that is its source, from the output's sha256 in hex."""
    return f"sha256:{sha256}"


class Hasher(Protocol):
    """What hashlib and xxhash have in common."""

    def update(self, data: memoryview, /) -> None:
        """Take in more bytes."""

    def hexdigest(self) -> str:
        """Return the digest of all bytes so far."""


def new_hasher(algorithm: str) -> Hasher:
    """Return what hashes by `sha256`, or by `xxh3` with 128 bits."""
    return hashlib.sha256() if algorithm == "sha256" else xxhash.xxh3_128()


class SourceDigest:
    """Takes all that decides a unit's outputs, in the order of `source_digest_of`; `text` is the digest of it."""

    def __init__(self, unit: Unit) -> None:
        self._algorithm = "sha256" if is_plain_copy(unit) else "xxh3"
        self._digest = new_hasher(self._algorithm)

    @property
    def text(self) -> str:
        """Algorithm and digest, `xxh3:<128 bits in hex>` or `sha256:<hex>`."""
        return f"{self._algorithm}:{self._digest.hexdigest()}"

    def update(self, data: memoryview, /) -> None:
        """Take in more bytes."""
        self._digest.update(data)


class OutputDigest:
    """Takes the bytes of an output as they are written.

    Args:
        unit: what makes it.
        is_of_rank: whether it is written into a file for a rank.
    """

    def __init__(self, unit: Unit, *, is_of_rank: bool) -> None:
        self._is_copy = is_plain_copy(unit)
        self._sha256 = new_hasher("sha256")
        self._xxh3 = new_hasher("xxh3") if is_of_rank else None

    def update(self, data: memoryview, /) -> None:
        """Take in more bytes."""
        self._sha256.update(data)
        if self._xxh3 is not None:
            self._xxh3.update(data)

    def record(self, source: SourceDigest | None) -> TensorRecord:
        """Return what is recorded of the output; what is its source byte for byte shares its digest."""
        sha256 = self._sha256.hexdigest()
        xxh3 = None if self._xxh3 is None else self._xxh3.hexdigest()
        if self._is_copy:
            return TensorRecord(sha256, shared_digest(sha256), xxh3=xxh3)
        assert source is not None, sha256
        return TensorRecord(sha256, source.text, xxh3=xxh3)
