"""Split a conversion by output shard over processes and machines that share the destination folder.

No process talks to another one: each writes its own shards and its own journal, and the one that finds all shards done
when it has finished its own also writes index, config and manifest.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from converters.checkpoint.plan import Shard
from converters.errors import UsageError

_PART = re.compile(r"([1-9]\d{0,4})/([1-9]\d{0,4})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Part:
    """Part `index` of `count`, counted from 1."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> "Part":
        """Read `2/8`.

        Raises:
            UsageError: it is not of that form, or the part is beyond the count.
        """
        match = _PART.fullmatch(text)
        if match is None or int(match[1]) > int(match[2]):
            raise UsageError("--part", expected="i/n with i from 1 to n, such as 2/8", found=repr(text))
        return cls(int(match[1]), int(match[2]))

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Part | None":
        """Return the part that torchrun gives this process by RANK and WORLD_SIZE, or None outside of it."""
        if "TORCHELASTIC_RUN_ID" not in environment:
            return None
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return cls(rank + 1, world_size) if world_size > 1 else None

    @property
    def suffix(self) -> str:
        """What tells this part's state files from the others'."""
        return f"-{self.index}-of-{self.count}"

    def shards(self, shards: Sequence[Shard]) -> Sequence[Shard]:
        """Return every count-th shard, so that parts have alike amounts of dense, MoE and MTP layers."""
        return shards[self.index - 1 :: self.count]


def suffix_of(part: Part | None) -> str:
    """Return the suffix of the state files of a part, or of the whole."""
    return part.suffix if part else ""
