"""Whether a plan loses nothing: each row of each source tensor has one place in it, or is dropped by name."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from converters.checkpoint.header import TensorEntry
from converters.checkpoint.plan import Columns, OutputPlan, SourceRows
from converters.errors import InputError


def check_complete(plan: OutputPlan, entries: Iterable[TensorEntry]) -> None:
    """Check that every row of every source tensor has one place in a plan, or that the tensor is dropped by name.

    Tensors that only stand beside others, as scales do that are consumed, count as a whole.

    Raises:
        InputError: a source tensor is unaccounted for.
    """
    units = [unit for shard in plan.shards for unit in shard.units]
    used = covered_rows(rows for unit in units for rows in (*unit.sources, *unit.equals))
    read = plan.source_names
    for entry in entries:
        if entry.name in plan.dropped:
            assert entry.name not in used, entry
        elif entry.name not in used and entry.name not in read:
            raise InputError(f"tensor {entry.name}", expected="a place in the plan", found="none")
        elif entry.name in used and not used[entry.name].is_tiled(entry.rows):
            raise InputError(f"tensor {entry.name}", expected="one place for each row", found=str(used[entry.name]))
    names: dict[int | None, set[str]] = {}
    for shard in plan.shards:
        names.setdefault(shard.rank, set()).update(entry.name for entry in shard.entries)
    assert sum(map(len, names.values())) == plan.num_tensors, "two outputs with one name"


@dataclass(slots=True)
class Coverage:
    """Which rows of a tensor are used, as columns of each range of rows."""

    columns: dict[tuple[int, int], list[Columns | None]] = field(default_factory=dict)
    is_shared: bool = False

    def is_tiled(self, num_rows: int) -> bool:
        """Return whether all rows are used, and, unless values are shared, each column of each row once."""
        position = 0
        for (start, stop), columns in sorted(self.columns.items()):
            is_gap = start > position if self.is_shared else start != position
            if is_gap or not self._is_row_tiled(columns):
                return False
            position = max(position, stop)
        return position == num_rows

    def _is_row_tiled(self, columns: list[Columns | None]) -> bool:
        cuts = sorted((cut.start, cut.stop, cut.width) for cut in columns if cut is not None)
        if not cuts or self.is_shared:
            return self.is_shared or len(columns) == 1
        starts, stops = [cut[0] for cut in cuts], [cut[1] for cut in cuts]
        return len(cuts) == len(columns) and starts == [0, *stops[:-1]] and stops[-1] == cuts[0][2]


def covered_rows(sources: Iterable[SourceRows]) -> dict[str, Coverage]:
    """Return what source rows cover of each tensor."""
    used: dict[str, Coverage] = {}
    for rows in sources:
        part: SourceRows | None = rows
        while part is not None:
            if part.name not in used:
                used[part.name] = Coverage()
            coverage = used[part.name]
            coverage.columns.setdefault((part.start, part.stop), []).append(part.columns)
            coverage.is_shared |= part.is_shared
            part = part.right
    return used
