"""Shards that are written together, and which of their units can share what they read.

The ranks of tensor parallelism take columns of the same rows, or the same rows whole; read for each of them, a source
would be read once a rank.
"""

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby, zip_longest
from typing import TypeVar

from converters.checkpoint.plan import Shard, Unit

T = TypeVar("T")


def batches(shards: Sequence[Shard]) -> Iterator[list[Shard]]:
    """Yield runs of shards that belong to one batch; a shard without batch is one by itself."""
    numbered = enumerate(shards)
    for _, run in groupby(numbered, key=lambda item: (item[1].batch is None and item[0], item[1].batch)):
        yield [shard for _, shard in run]


def shared_reads(shards: Sequence[Shard], runs: Sequence[T]) -> list[list[tuple[Unit, T]]]:
    """Return the units of a batch, those together that need the same rows, in the order of the first shard's units.

    Args:
        shards: the batch.
        runs: what stands for each shard, returned beside its units.
    """
    groups: dict[Hashable, list[tuple[Unit, T]]] = {}
    for row in zip_longest(*(shard.units for shard in shards)):
        for index, unit in enumerate(row):
            if unit is not None:
                key = _rows_read(unit) if len(shards) > 1 else None
                groups.setdefault((unit.outputs[0].name, index) if key is None else key, []).append((unit, runs[index]))
    return list(groups.values())


def _rows_read(unit: Unit) -> Hashable | None:
    """Return what must be equal for two units to be made of the same blocks; None if the unit shares with none."""
    sources = unit.sources
    is_simple = len(unit.outputs) == 1 and unit.outputs[0].grain == 1 and sources and not unit.group
    if not is_simple or any(rows.right is not None or rows.columns != sources[0].columns for rows in sources):
        return None
    return unit.transform, tuple((rows.name, rows.start, rows.stop, rows.beside) for rows in sources)


def all_columns(unit: Unit) -> Unit:
    """Return the unit with all columns of its rows."""
    return replace(unit, sources=tuple(replace(rows, columns=None) for rows in unit.sources))
