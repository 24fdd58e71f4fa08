"""A checkpoint folder as it would be uncut: whoever compares two of them need not know which is cut for ranks."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from converters.checkpoint.dtypes import itemsize
from converters.checkpoint.header import TensorEntry
from converters.checkpoint.reader import CheckpointReader
from converters.errors import InputError
from converters.formats.weights import Part, Use, WeightFormat, cells
from converters.layout import Stored, StoredLayout
from converters.shard.source import ShardedSource, is_sharded, open_sharded
from converters.source import Source, open_source


def open_whole(folder: Path) -> Source:
    """Open a checkpoint folder, whole or cut for ranks.

    What is read is not held against the digests in a manifest: that is a level of its own, and a comparison says more
    about tensors that are not what was written than that they are not.

    Raises:
        InputError, ConfigError: see `open_source` and `open_sharded`.
    """
    if not is_sharded(folder):
        return open_source(folder)
    sharded = open_sharded(folder)
    return replace(sharded, reader=CheckpointReader(sharded.reader.index))


def merged_entries(source: ShardedSource) -> dict[str, TensorEntry]:
    """Return the headers that the uncut checkpoint would have, by name; their places mean nothing.

    Blocks are counted from the whole: a slice that is cut inside of one has its scales in a merge that cannot be.

    Raises:
        InputError: slices of one tensor are stored in several formats.
    """
    layout = StoredLayout(source.schema, source.tensor_layout)
    entries = [entry for whole in layout.stored.values() for entry in _whole_entries(source, whole)]
    for name, places in source.scale_places.items():
        first = source.reader.entry(places[0][0])
        heads = source.config.num_key_value_heads
        shape = (heads, *first.shape[1:]) if len(first.shape) > 1 else first.shape
        entries.append(replace(first, name=name, shape=shape))
    return {entry.name: entry for entry in entries}


def _whole_entries(source: ShardedSource, whole: Stored) -> Iterator[TensorEntry]:
    found = _format(source, whole)
    for part in found.parts:
        shape = _shape(whole, part)
        nbytes = itemsize(part.dtype)
        for extent in shape:
            nbytes *= extent
        yield TensorEntry(whole.part(part.suffix), part.dtype, shape, 0, nbytes)


def _shape(whole: Stored, part: Part) -> tuple[int, ...]:
    if part.use is Use.SHAPE:
        return (2,) if whole.stack is None else (3,)
    rows, columns = cells(whole.rows, part.grain[0]), cells(whole.columns, part.grain[1])
    return part.form.shape(whole.stack, rows, columns)


def _format(source: ShardedSource, whole: Stored) -> WeightFormat:
    """Return the format that all slices of a tensor have."""
    formats: dict[tuple[tuple[str, str], ...], WeightFormat] = {}
    for piece in (piece for pieces in whole.elements for piece in pieces):
        for place in source.stored_layout.places(piece.tensor):
            found = source.weights[place.stored.name].format
            formats.setdefault(tuple((part.suffix, part.dtype) for part in found.parts), found)
    if len(formats) > 1:
        shown = " and ".join(found.name for found in formats.values())
        raise InputError(f"tensor {whole.name}", expected="one format on all ranks", found=shown)
    return next(iter(formats.values()))
