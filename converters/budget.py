"""Which source files have to lie on the disk at once, if they are fetched, converted and removed as it goes.

A source file comes before the first output shard that needs it and goes after the last one is journalled; none is
fetched twice. Files come in the order in which they are first needed, and further ones ahead of time as far as the
budget reaches: what is held is then always among what the shards under way need, or before it, so nothing waits for
room that nobody gives back.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from converters.checkpoint.plan import Shard
from converters.checkpoint.reader import CheckpointReader
from converters.errors import ResourceError

STAGING_FOLDER = "source"
# what file systems give out, and what a file in flight takes for the record of its progress
BLOCK_BYTES = 4096


def on_disk(num_bytes: int) -> int:
    """Return the disk space of a file of so many bytes."""
    return -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(frozen=True)
class StagingPlan:
    """What the output shards need of the source.

    Attributes:
        needs: the source files of each output shard, by its name, in the order of writing.
        sizes: bytes of every source file.
        base_bytes: disk space of what is held all the time: headers and the files around the weights.
    """

    needs: dict[str, frozenset[str]]
    sizes: Mapping[str, int]
    base_bytes: int

    @classmethod
    def of(
        cls, shards: Sequence[Shard], reader: CheckpointReader, sizes: Mapping[str, int], base_bytes: int
    ) -> "StagingPlan":
        """Look up the files that each shard reads."""
        needs = {shard.file: source_files(shard, reader) for shard in shards}
        return cls(needs, sizes, base_bytes)

    @cached_property
    def files(self) -> tuple[str, ...]:
        """All needed files in the order in which they are fetched."""
        return tuple(dict.fromkeys(file for files in self.needs.values() for file in sorted(files)))

    @property
    def fetch_bytes(self) -> int:
        """Bytes of all needed files, each counted once."""
        return sum(self.sizes[file] for file in self.files)

    @property
    def least_bytes(self) -> int:
        """The least budget that works: the most that is held at once when nothing is fetched ahead of time."""
        last = {file: number for number, files in enumerate(self.needs.values()) for file in files}
        held, most = set[str](), 0
        for number, files in enumerate(self.needs.values()):
            held = {file for file in held if last[file] >= number} | files
            most = max(most, sum(map(self.charge, held)))
        return self.base_bytes + most

    def charge(self, file: str) -> int:
        """Return the disk space that a file takes, from the moment at which its fetching begins."""
        return on_disk(self.sizes[file]) + BLOCK_BYTES

    def held_bytes(self, budget: int) -> int:
        """Return the most that is held at once under a budget, with what is fetched ahead of time."""
        return min(budget, self.base_bytes + sum(map(self.charge, self.files)))

    def first_files(self, budget: int) -> tuple[str, ...]:
        """Return the files that are fetched before any is removed."""
        held = self.base_bytes
        for count, file in enumerate(self.files):
            held += self.charge(file)
            if held > budget:
                return self.files[:count]
        return self.files

    def check(self, budget: int) -> None:
        """Refuse a budget that is too small for some output shard.

        Raises:
            ResourceError: with the least budget that works.
        """
        if self.least_bytes > budget:
            raise ResourceError(
                "--disk-budget",
                expected=f"at least {self.least_bytes} bytes",
                found=f"{budget}",
                next_step="Raise it, or lower --max-shard-size: smaller output files need fewer source files at once.",
            )


def source_files(shard: Shard, reader: CheckpointReader) -> frozenset[str]:
    """Return the source files that an output shard is made from."""
    reads = (name for unit in shard.units for name, *_ in unit.reads())
    return frozenset(reader.index.entries[name][0] for name in reads)
