"""From one layout to another: for each stored tensor of the target, the rows of the source that it is made of.

A target tensor is a list of pieces of official tensors; each is looked up in the source's layout. What is true of the
weight is then true of its scales, each at its own grain: a scale for 128 rows moves with its 128 rows or not at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import itemgetter

from converters.checkpoint.plan import Beside, Columns, SourceRows
from converters.checkpoint.reader import CheckpointReader
from converters.errors import UsageError
from converters.formats.weights import WHOLE, Part, Use, cells
from converters.layout import Piece, Span, Stored
from converters.source import Source, StoredWeight

_DEQUANTIZE = "Add --dequantize, or keep the layout."


@dataclass(frozen=True, slots=True)
class Patch:
    """A rectangle of one element of a source tensor, in rows and columns of the weight."""

    weight: StoredWeight
    element: int
    rows: Span
    columns: Span

    @property
    def stored(self) -> Stored:
        """The source tensor."""
        return self.weight.stored

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.rows[1] - self.rows[0]

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.columns[1] - self.columns[0]

    def has_all(self, grain: tuple[int, int]) -> bool:
        """Return whether the patch has all rows or columns that one value of a part with this grain stands for."""
        all_rows = grain[0] != WHOLE or self.rows == (0, self.stored.rows)
        return all_rows and (grain[1] != WHOLE or self.columns == (0, self.stored.columns))


# patches side by side, as many rows each
Band = tuple[Patch, ...]


@dataclass(slots=True)
class Gathered:
    """Source rows of an output, and pairs of rows of which the second must equal the first and is left out."""

    sources: list[SourceRows] = field(default_factory=list)
    equal: list[tuple[SourceRows, SourceRows]] = field(default_factory=list)


def find_bands(source: Source, pieces: Sequence[Piece]) -> list[Band]:
    """Return where the pieces of a target element lie in the source, from top to bottom."""
    bands: list[Band] = []
    for piece in pieces:
        found: dict[int, list[tuple[int, Patch]]] = {}
        for place in source.stored_layout.places(piece.tensor):
            rows, columns = _overlap(place.piece.rows, piece.rows), _overlap(place.piece.columns, piece.columns)
            if rows[0] < rows[1] and columns[0] < columns[1]:
                patch = Patch(
                    source.weights[place.stored.name],
                    place.element,
                    _moved(rows, place.row - place.piece.rows[0]),
                    _moved(columns, -place.piece.columns[0]),
                )
                found.setdefault(rows[0], []).append((columns[0], patch))
        bands += [tuple(patch for _, patch in sorted(row, key=itemgetter(0))) for _, row in sorted(found.items())]
    return bands


def _overlap(left: Span, right: Span) -> Span:
    return max(left[0], right[0]), min(left[1], right[1])


def _moved(span: Span, by: int) -> Span:
    return span[0] + by, span[1] + by


def gather_part(target: Stored, elements: Sequence[Sequence[Band]], part: Part) -> Gathered:
    """Return the rows of a part of the target: the same part of everything it is made of.

    Raises:
        UsageError: a value of the part stands for rows or columns that the target separates or joins.
    """
    gathered = Gathered()
    for bands in elements:
        first: SourceRows | None = None
        top = 0
        for band in bands:
            rows = _gather_band(target, band, part, top, gathered)
            top += band[0].height
            if part.grain[0] == WHOLE and first is not None:
                _require_equal(first, rows, gathered)
            else:
                _append(gathered.sources, rows)
                first = rows
    return gathered


def _gather_band(target: Stored, band: Band, part: Part, top: int, gathered: Gathered) -> SourceRows:
    found: list[SourceRows] = []
    left = 0
    for patch in band:
        rows = _cut(target, part, 0, patch.rows, patch.stored.rows, (top, top + patch.height), target.rows)
        columns = _cut(target, part, 1, patch.columns, patch.stored.columns, (left, left + patch.width), target.columns)
        left += patch.width
        start = patch.element * cells(patch.stored.rows, part.grain[0])
        width = cells(patch.stored.columns, part.grain[1])
        found.append(
            SourceRows(
                patch.stored.part(part.suffix),
                start + rows[0],
                start + rows[1],
                None if columns == (0, width) else Columns(*columns, width),
                is_shared=not patch.has_all(part.grain),
            )
        )
    if part.grain[1] == WHOLE:
        for other in found[1:]:
            _require_equal(found[0], other, gathered)
        return found[0]
    return _chain(found)


def _cut(target: Stored, part: Part, dim: int, span: Span, extent: int, to: Span, to_extent: int) -> Span:
    """Return a span of the weight in units of the part, which must begin and end with a unit on both sides."""
    grain = part.grain[dim]
    if grain == WHOLE:
        return 0, 1
    for (start, stop), end in ((span, extent), (to, to_extent)):
        if start % grain or (stop % grain and stop != end):
            raise UsageError(
                f"tensor {target.part(part.suffix)}",
                expected=f"parts whose {('rows', 'columns')[dim]} are multiples of {grain}, which share a scale",
                found=f"{stop - start} {('rows', 'columns')[dim]}",
                next_step=_DEQUANTIZE,
            )
    return span[0] // grain, cells(span[1], grain)


def _chain(found: Sequence[SourceRows]) -> SourceRows:
    chained = found[-1]
    for rows in reversed(found[:-1]):
        chained = replace(rows, right=chained)
    return chained


def _append(sources: list[SourceRows], rows: SourceRows) -> None:
    """Append rows, or lengthen the last ones if they continue there."""
    last = sources[-1] if sources else None
    ends = (rows.name, rows.start, rows.columns, None, rows.is_shared)
    if last is not None and rows.right is None and ends == (
        last.name, last.stop, last.columns, last.right, last.is_shared,
    ):  # fmt: skip
        sources[-1] = replace(last, stop=rows.stop)
    else:
        sources.append(rows)


def _require_equal(kept: SourceRows, other: SourceRows, gathered: Gathered) -> None:
    if (kept.name, kept.start, kept.columns) != (other.name, other.start, other.columns):
        gathered.equal.append((kept, replace(other, is_shared=True)))


def gather_weights(elements: Sequence[Sequence[Band]]) -> tuple[SourceRows, ...]:
    """Return the codes of everything that a target is made of, with their scales beside them."""
    return tuple(_chain([_codes(patch) for patch in band]) for bands in elements for band in bands)


def _codes(patch: Patch) -> SourceRows:
    stored, weight_format = patch.stored, patch.weight.format
    (codes,) = weight_format.used(Use.CODES)
    beside = tuple(
        Beside(
            stored.part(part.suffix),
            patch.element * cells(stored.rows, part.grain[0]),
            patch.rows[0],
            part.grain[0] or stored.rows,
        )
        for part in weight_format.used(Use.SCALE)
    )
    start = patch.element * stored.rows
    is_all = patch.columns == (0, stored.columns)
    columns = None if is_all else Columns(*patch.columns, stored.columns)
    return SourceRows(stored.part(codes.suffix), start + patch.rows[0], start + patch.rows[1], columns, beside)


def check_equal(reader: CheckpointReader, pairs: Sequence[tuple[SourceRows, SourceRows]]) -> None:
    """Read pairs of rows and refuse the first that differs: values that one stored value would have to stand for.

    Raises:
        UsageError: with both names and values.
    """
    for kept, other in pairs:
        if _read(reader, kept) != _read(reader, other):
            raise UsageError(
                f"tensor {other.name}",
                expected=f"the values of {kept.name}, with which it would be fused",
                found="other values",
                next_step=f"They cannot share one scale. {_DEQUANTIZE}",
            )


def _read(reader: CheckpointReader, rows: SourceRows) -> bytes:
    """Return rows whose parts stand for whole columns, so that all columns are read."""
    width = reader.entry(rows.name).row_bytes
    data = bytearray(rows.rows * width)
    reader.read_into(rows.name, rows.start * width, memoryview(data))
    return bytes(data)


def patches_of(elements: Sequence[Sequence[Band]]) -> Iterator[Patch]:
    """Yield all patches."""
    return (patch for bands in elements for band in bands for patch in band)
