"""Digests of what a unit was made from and of what it made; the one place that decides which ones those are.

What a plan writes is known by the plan's algorithm. A unit that copies its source byte for byte shares its output's
digest: those bytes are hashed once. All others have XXH3 of what decides them: it has to notice that a source changed.
"""

from converters.checkpoint.content_digest import Algorithm, ContentDigest, new_hasher
from converters.checkpoint.journal import TensorRecord
from converters.checkpoint.plan import Unit
from converters.transforms.rows import Copy


def is_plain_copy(unit: Unit) -> bool:
    """Return whether a unit's one output is what is read for it, byte for byte."""
    return isinstance(unit.transform, Copy) and all(source.is_whole for source in unit.sources)


class SourceDigest:
    """Takes all that decides a unit's outputs, in the order of `source_digest_of`.

    Args:
        algorithm: another one only for what a record has by it.
    """

    def __init__(self, algorithm: Algorithm = Algorithm.XXH3) -> None:
        self._algorithm, self._hasher = algorithm, new_hasher(algorithm)

    @property
    def found(self) -> ContentDigest:
        """The digest of all bytes so far."""
        return ContentDigest(self._algorithm, self._hasher.hexdigest())

    def update(self, data: memoryview, /) -> None:
        """Take in more bytes."""
        self._hasher.update(data)


class OutputDigest:
    """Takes the bytes of an output as they are written.

    Args:
        unit: what makes it.
        algorithm: the plan's.
    """

    def __init__(self, unit: Unit, algorithm: Algorithm) -> None:
        self._is_copy, self._algorithm, self._hasher = is_plain_copy(unit), algorithm, new_hasher(algorithm)

    def update(self, data: memoryview, /) -> None:
        """Take in more bytes."""
        self._hasher.update(data)

    def record(self, source: SourceDigest | None) -> TensorRecord:
        """Return what is recorded of the output; what is its source byte for byte shares its digest."""
        content = ContentDigest(self._algorithm, self._hasher.hexdigest())
        if self._is_copy:
            return TensorRecord(content, content)
        assert source is not None, content
        return TensorRecord(content, source.found)
