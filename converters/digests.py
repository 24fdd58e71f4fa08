"""What a unit was made from, as a digest; the one place that decides which digest that is.

A unit that copies its source byte for byte shares its output's sha256: those bytes are hashed once. All others have
XXH3, which is thirty times as fast: it has to notice that a source changed, not to withstand who wants it unnoticed.
"""

import hashlib
from typing import Protocol

import xxhash

from converters.checkpoint.plan import Unit
from converters.transforms.rows import Copy


def is_plain_copy(unit: Unit) -> bool:
    """Return whether a unit's one output is what is read for it, byte for byte."""
    return isinstance(unit.transform, Copy) and all(source.is_whole for source in unit.sources)


def shared_digest(sha256: str) -> str:
    """Return the source digest of an output that is its source, from the output's sha256 in hex."""
    return f"sha256:{sha256}"


class _Hasher(Protocol):
    def update(self, data: memoryview, /) -> None: ...

    def hexdigest(self) -> str: ...


class SourceDigest:
    """Takes all that decides a unit's outputs, in the order of `source_digest_of`; `text` is the digest of it."""

    def __init__(self, unit: Unit) -> None:
        self._algorithm = "sha256" if is_plain_copy(unit) else "xxh3"
        self._digest: _Hasher = hashlib.sha256() if is_plain_copy(unit) else xxhash.xxh3_128()

    @property
    def text(self) -> str:
        """Algorithm and digest, `xxh3:<128 bits in hex>` or `sha256:<hex>`."""
        return f"{self._algorithm}:{self._digest.hexdigest()}"

    def update(self, data: memoryview, /) -> None:
        """Take in more bytes."""
        self._digest.update(data)
