"""Tens of thousands of experts are cut alike: the units of one are those of all others, under other names."""

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from converters.checkpoint.plan import OutputTensor, SourceRows, Unit
from converters.formats.weights import Use
from converters.layout import Place, Stored
from converters.schema import Role
from converters.shard.units import SliceUnits


@dataclass(frozen=True, slots=True)
class SliceOutputs:
    """What is written of a slice: its units, the bytes of their outputs, and the ranks that have it."""

    ranks: tuple[int, ...]
    units: list[Unit]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Pattern:
    """What was made of the first tensor of a kind; `sources` are the names of all that it is made of."""

    stored: Stored
    sources: list[str]
    slices: list[SliceOutputs]


@dataclass(slots=True)
class AlikeUnits:
    """Makes the units of tensors; of experts that differ by nothing but their names, those of the first.

    Args:
        planner: whose source they come from.
        make: makes the units of a tensor's slices, with the ranks of each.
        kind: of an expert, all that decides how `make` cuts it, besides its place and its format in the source.
    """

    planner: SliceUnits
    make: Callable[[Stored], list[tuple[tuple[int, ...], list[Unit]]]]
    kind: Callable[[Stored], Hashable]
    _patterns: dict[Hashable, _Pattern | None] = field(default_factory=dict)

    def of(self, stored: Stored) -> list[SliceOutputs]:
        """Return what is written of each slice of a tensor; see `SliceUnits.units` for what is raised."""
        parts = self.planner.parts(stored)
        tensor = stored.elements[0][0].tensor
        # what planning reads, as the stated shape of a packed weight, it reads of each
        is_read = self.planner.dequantize or any(part.use is Use.SHAPE for part in parts)
        if tensor.spec.role is not Role.EXPERT or stored.stack is not None or is_read:
            return self._made(stored)
        suffixes = [part.suffix for part in parts]
        places = [
            place for piece in stored.elements[0] for place in self.planner.source.stored_layout.places(piece.tensor)
        ]
        sources = [place.stored.part(suffix) for place in places for suffix in suffixes]
        lies = tuple(map(self._place_key, places)), tuple(map(sources.index, sources))
        key = self.kind(stored), tensor.spec.name, stored.shape, lies
        if key not in self._patterns:
            made = self._made(stored)
            is_equal = all(not unit.equals for own in made for unit in own.units)
            # values that have to be equal were read, too
            self._patterns[key] = _Pattern(stored, sources, made) if is_equal else None
            return made
        pattern = self._patterns[key]
        return self._made(stored) if pattern is None else _renamed(pattern, stored, suffixes, sources)

    def _place_key(self, place: Place) -> Hashable:
        own, piece = place.stored, place.piece
        found = self.planner.source.weights[own.name].format
        return place.element, place.row, piece.rows, piece.columns, own.stack, own.rows, own.columns, found

    def _made(self, stored: Stored) -> list[SliceOutputs]:
        outputs: dict[tuple[OutputTensor, ...], tuple[OutputTensor, ...]] = {}
        found = []
        for ranks, made in self.make(stored):
            # of hundreds of thousands of outputs, those of all ranks are alike
            units = [replace(unit, outputs=outputs.setdefault(unit.outputs, unit.outputs)) for unit in made]
            found.append(SliceOutputs(ranks, units, sum(unit.nbytes for unit in units)))
        return found


def _renamed(pattern: _Pattern, stored: Stored, suffixes: Sequence[str], sources: Sequence[str]) -> list[SliceOutputs]:
    """Return what a pattern is for another tensor."""
    names = {pattern.stored.part(suffix): stored.part(suffix) for suffix in suffixes}
    read = dict(zip(pattern.sources, sources, strict=True))
    outputs: dict[int, tuple[OutputTensor, ...]] = {}
    found = []
    for own in pattern.slices:
        units = []
        for unit in own.units:
            if id(unit.outputs) not in outputs:
                outputs[id(unit.outputs)] = tuple(replace(output, name=names[output.name]) for output in unit.outputs)
            rows = tuple([_moved(rows, read) for rows in unit.sources])
            units.append(Unit(outputs[id(unit.outputs)], rows, unit.transform))
        found.append(SliceOutputs(own.ranks, units, own.nbytes))
    return found


def _moved(rows: SourceRows, names: Mapping[str, str]) -> SourceRows:
    assert not rows.beside, rows
    right = rows.right if rows.right is None else _moved(rows.right, names)
    return SourceRows(names[rows.name], rows.start, rows.stop, rows.columns, (), right, rows.is_shared)
