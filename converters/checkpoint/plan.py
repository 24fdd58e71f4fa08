"""The output plan: every file, tensor and byte offset, known before any data is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from math import lcm, prod
from typing import TYPE_CHECKING, Any, Protocol

from converters.checkpoint.content_digest import Algorithm
from converters.checkpoint.dtypes import itemsize
from converters.checkpoint.header import TensorEntry, build_header, num_rows
from converters.quant.quality import TensorQuality
from converters.transforms.rows import RowTransform

if TYPE_CHECKING:
    from converters.checkpoint.journal import ShardRecord


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor to be written.

    `grain` says how many source rows one of its steps stands for: 1 for codes or a scale per row, 128 for scales of
    blocks of 128 rows, 0 if all of it is made at once, with the first rows.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    grain: int = 1

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def rows(self) -> int:
        """Rows of the tensor seen as a matrix; see `num_rows`."""
        return num_rows(self.shape)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return self.nbytes // max(1, self.rows)

    def offset(self, row: int, num_rows: int) -> int:
        """Return where what is made of source rows from `row` on begins, of num_rows in all; row is a whole step."""
        assert (self.grain and row % self.grain == 0) or row == 0, (self, row)
        steps = -(-num_rows // (self.grain or num_rows or 1))
        return row // (self.grain or 1) * (self.nbytes // max(1, steps))


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns [start, stop) of the `width` that a row has."""

    start: int
    stop: int
    width: int


@dataclass(frozen=True, slots=True)
class Beside:
    """Rows of another tensor that the transform needs: row `start + (offset + i) // span` belongs to source row i."""

    name: str
    start: int
    offset: int
    span: int

    def row(self, index: int) -> int:
        """Return the row that belongs to a source row, counted from the first."""
        return self.start + (self.offset + index) // self.span


@dataclass(frozen=True, slots=True)
class SourceRows:
    """Rows [start, stop) of a source tensor seen as a matrix; see `num_rows`.

    Attributes:
        columns: only these columns of what the transform makes of them; None: all.
        beside: what the transform gets with them, row for row.
        right: as many rows of another tensor, whose transformed columns are appended.
        is_shared: the same rows are also the source of another output, because one value stands for several weights.
    """

    name: str
    start: int
    stop: int
    columns: Columns | None = None
    beside: tuple[Beside, ...] = ()
    right: "SourceRows | None" = None
    is_shared: bool = False

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.stop - self.start

    @property
    def is_whole(self) -> bool:
        """Whether the rows alone are what is read, all columns of them."""
        return self.columns is None and not self.beside and self.right is None

    @property
    def num_reads(self) -> int:
        """Number of tensors that are read at once: these rows', those beside them, those to the right."""
        return 1 + len(self.beside) + (self.right.num_reads if self.right is not None else 0)

    def reads(self) -> "Iterator[tuple[str, int, int]]":
        """Yield name, start and stop of all rows that are read: these, those beside them, those to the right."""
        yield self.name, self.start, self.stop
        for beside in self.beside:
            yield beside.name, beside.row(0), beside.row(self.rows - 1) + 1
        if self.right is not None:
            yield from self.right.reads()

    def as_json(self) -> dict[str, Any]:
        """Return name, start and stop, and the other attributes where they say something."""
        facts: dict[str, Any] = {"name": self.name, "start": self.start, "stop": self.stop}
        if self.columns is not None:
            facts["columns"] = asdict(self.columns)
        if self.beside:
            facts["beside"] = [asdict(beside) for beside in self.beside]
        return facts if self.right is None else {**facts, "right": self.right.as_json()}


@dataclass(frozen=True, slots=True)
class Unit:
    """Outputs that are made together, row for row, from the same source rows.

    Row r of the concatenated sources makes row r of every output, or a part of it where an output's grain is not 1;
    without sources the transform knows the output.

    Attributes:
        equals: source rows that hold the same values as the sources, or that the transform knows; they are not read.
        group: the sources of all weights that share one scale, own rows included. Their largest magnitude is found
            before the first block, and the transform gets it last, as fp32 (1, 1). Empty: it needs none.
        quality: errors of codes that are copied; None: they are measured as they are made, or there are none.
    """

    outputs: tuple[OutputTensor, ...]
    sources: tuple[SourceRows, ...]
    transform: RowTransform
    equals: tuple[SourceRows, ...] = ()
    group: tuple[SourceRows, ...] = ()
    quality: TensorQuality | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all outputs."""
        return sum([output.nbytes for output in self.outputs])

    @property
    def num_rows(self) -> int:
        """Source rows."""
        return sum([source.rows for source in self.sources])

    @property
    def grain(self) -> int:
        """Blocks of source rows must be multiples of this, but for the last."""
        return lcm(*[output.grain or 1 for output in self.outputs])

    @property
    def working_bytes(self) -> float:
        """Memory in use per source byte: the transform's, and a copy of what is cut out or put side by side."""
        is_copied = any(rows.columns is not None or rows.right is not None for rows in self.sources)
        return self.transform.working_bytes + is_copied

    def reads(self) -> "Iterator[tuple[str, int, int]]":
        """Yield name, start and stop of all rows that are read, those of the group included."""
        for rows in (*self.sources, *self.group):
            yield from rows.reads()


@dataclass(frozen=True)
class Shard:
    """One output file: its units, its leading bytes, and the place of each tensor.

    Attributes:
        rank: the process that the file is for, where every process has files of its own.
        batch: shards with one number, which stand side by side, are written together: rows that several of them need
            are read once. None: the shard is written by itself.
    """

    file: str
    units: tuple[Unit, ...]
    rank: int | None = None
    batch: int | None = None

    def key(self, name: str) -> str:
        """Return what tells a tensor of this file from all others of the plan."""
        return name if self.rank is None else f"{self.rank}/{name}"

    @cached_property
    def _built(self) -> tuple[bytes, tuple[TensorEntry, ...]]:
        return _header(tuple([output for unit in self.units for output in unit.outputs]))

    @property
    def header(self) -> bytes:
        """Length prefix and JSON, exactly as they stand at the start of the file."""
        return self._built[0]

    @property
    def entries(self) -> tuple[TensorEntry, ...]:
        """Tensors in the order of their data."""
        return self._built[1]

    @property
    def file_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(entry.nbytes for entry in self.entries)


# files of ranks that have the same slices of the same tensors, one after the other, have the same header
@lru_cache(maxsize=1)
def _header(outputs: tuple[OutputTensor, ...]) -> tuple[bytes, tuple[TensorEntry, ...]]:
    # wide dtypes first keeps every tensor aligned to its own element size; the sort is stable
    ordered = sorted(outputs, key=lambda output: -itemsize(output.dtype))
    return build_header([(output.name, output.dtype, output.shape) for output in ordered])


class Distribution(Protocol):
    """How tensors are distributed over ranks, as a manifest records it."""

    def as_json(self) -> dict[str, Any]:
        """Return what holds for all tensors."""

    def tensors(self, shards: "Sequence[Shard]", done: "Mapping[str, ShardRecord]") -> dict[str, Any]:
        """Return, for each tensor, its slices with the ranks that have them and their digests."""


@dataclass(frozen=True)
class OutputPlan:
    """All shards of a conversion.

    Attributes:
        shards: in the order of writing.
        dropped: source tensors that are left out, with the reason.
        distribution: over ranks, if each has files of its own.
        digest: by which its tensors are recorded.
    """

    shards: tuple[Shard, ...]
    dropped: dict[str, str] = field(default_factory=dict)
    distribution: Distribution | None = None
    digest: Algorithm = Algorithm.SHA256

    @cached_property
    def weight_map(self) -> dict[str, str]:
        """Tensor name to file name, in order of names; of files for ranks, the rank stands before the name."""
        pairs = {shard.key(entry.name): shard.file for shard in self.shards for entry in shard.entries}
        return dict(sorted(pairs.items()))

    @property
    def num_tensors(self) -> int:
        """Number of tensors in all files."""
        return sum(len(shard.entries) for shard in self.shards)

    @property
    def files(self) -> set[str]:
        """Names of all shards."""
        return {shard.file for shard in self.shards}

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data: what the index calls total_size."""
        return sum(entry.nbytes for shard in self.shards for entry in shard.entries)

    @property
    def file_bytes(self) -> int:
        """Bytes of all files, headers included."""
        return sum(shard.file_bytes for shard in self.shards)

    @cached_property
    def source_names(self) -> set[str]:
        """Source tensors that are read."""
        return {name for shard in self.shards for unit in shard.units for name, *_ in unit.reads()}

    @cached_property
    def bytes_by_transform(self) -> dict[str, int]:
        """Output bytes by the name of the transform that makes them."""
        totals: dict[str, int] = {}
        for shard in self.shards:
            for unit in shard.units:
                totals[unit.transform.name] = totals.get(unit.transform.name, 0) + unit.nbytes
        return totals
