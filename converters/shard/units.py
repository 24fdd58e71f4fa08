"""The units of a slice: what a rank's part of a stored tensor is made of, and its scales with it."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from converters.checkpoint.dtypes import itemsize
from converters.checkpoint.plan import OutputTensor, SourceRows, Unit
from converters.formats.weights import WHOLE, Form, Part, Use, cells
from converters.layout import Piece, Span, Stored
from converters.schema import DtypePolicy
from converters.source import Source
from converters.transforms.rows import Copy
from converters.units import UnitPlanner

# a scale of the KV cache: where it is stored, and the heads that it is for; none if one value is for all
ScalePlace = tuple[str, Span | None]


@dataclass(slots=True)
class SliceUnits(UnitPlanner):
    """Makes the units of slices, and of whole tensors out of slices.

    Args:
        scale_places: of each scale of the KV cache, by its official name.
    """

    scale_places: dict[str, tuple[ScalePlace, ...]] = field(default_factory=dict)

    def shared_units(self, stored: Stored) -> list[Unit]:
        """Return the units of a slice whose rows others have as well."""
        return [replace(unit, sources=tuple(map(_shared, unit.sources))) for unit in self.units(stored)]

    def _cache_scale_units(self, stored: Stored) -> Iterator[Unit]:
        """Yield the units of the cache's scales that hang on a tensor: those of its heads, if each has its own."""
        for piece in stored.elements[0]:
            for name in self._scales_by_owner.get(piece.tensor.name, ()):
                if self.dequantize:
                    self.dropped |= {place: "--dequantize" for place, _ in self.scale_places[name]}
                else:
                    yield self._cache_scale_unit(name, piece)

    def _cache_scale_unit(self, name: str, piece: Piece) -> Unit:
        places = self.scale_places[name]
        first = self.source.reader.entry(places[0][0])
        if places[0][1] is None:
            sources: tuple[SourceRows, ...] = (SourceRows(first.name, 0, first.rows, is_shared=True),)
            return Unit((OutputTensor(name, first.dtype, first.shape),), sources, Copy())
        size = self.source.config.head_dim
        wanted = piece.rows[0] // size, piece.rows[1] // size
        sources = tuple(
            SourceRows(place, max(heads[0], wanted[0]) - heads[0], min(heads[1], wanted[1]) - heads[0], is_shared=True)
            for place, heads in places
            if heads is not None and max(heads[0], wanted[0]) < min(heads[1], wanted[1])
        )
        return Unit((OutputTensor(name, first.dtype, (wanted[1] - wanted[0], *first.shape[1:])),), sources, Copy())

    def parts(self, stored: Stored) -> tuple[Part, ...]:
        """Return the parts that a stored tensor will have in the result."""
        place = self.source.stored_layout.places(stored.elements[0][0].tensor)[0]
        found = self.source.weights[place.stored.name].format
        if not found.is_plain:
            return (Part("", Use.CODES, self.weight_dtype, (1, 1), Form.MATRIX),) if self.dequantize else found.parts
        keeps = self.dtype is None or stored.elements[0][0].tensor.spec.dtype is DtypePolicy.KEEP_FP32
        return found.parts if keeps or self.dtype is None else (replace(found.parts[0], dtype=self.dtype),)


def _shared(rows: SourceRows) -> SourceRows:
    return replace(rows, is_shared=True, right=_shared(rows.right) if rows.right else None)


def part_shape(stored: Stored, part: Part) -> tuple[int, ...]:
    """Return the shape that a part of a stored tensor has."""
    if part.use is Use.SHAPE:
        return (len(stored.shape),)
    return part.form.shape(stored.stack, cells(stored.rows, part.grain[0]), cells(stored.columns, part.grain[1]))


def part_bytes(stored: Stored, part: Part) -> int:
    """Return the bytes of a part of a stored tensor."""
    count = itemsize(part.dtype)
    for size in part_shape(stored, part):
        count *= size
    return count


def whole_scale_places(source: Source) -> dict[str, tuple[ScalePlace, ...]]:
    """Return where the cache's scales of a source lie that is not cut."""
    heads = source.config.num_key_value_heads
    return {
        name: ((name, (0, heads) if len(source.reader.entry(name).shape) > 1 else None),)
        for name in source.cache_scales
    }


def has_copies(whole: Stored, slices: list[Stored]) -> bool:
    """Return whether slices of a tensor overlap."""
    return sum(map(_area, slices)) > _area(whole)


def _area(stored: Stored) -> int:
    return sum(
        (piece.rows[1] - piece.rows[0]) * (piece.columns[1] - piece.columns[0])
        for pieces in stored.elements
        for piece in pieces
    )


def grained(spans: list[Span], extent: int, grain: int) -> list[Span]:
    """Return rows or columns of a weight as those of a part, per stretch of `extent` rows that share nothing."""
    found: list[Span] = []
    for start, stop in spans:
        base = start // extent * cells(extent, grain)
        own = (0, 1) if grain == WHOLE else ((start % extent) // grain, cells(start % extent + stop - start, grain))
        span = base + own[0], base + own[1]
        if found and found[-1][1] == span[0]:
            found[-1] = found[-1][0], span[1]
        elif not found or found[-1] != span:
            found.append(span)
    return found
