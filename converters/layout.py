"""Layouts: under which names, stacked or side by side, a checkpoint stores the tensors of the table.

Everything follows from the table: a fused name is the name of the fuse group, a packed one has lost its expert number,
a slot of a fused shared expert is the expert after the last routed one.

    split         the official names: one tensor per projection and expert
    packed        all experts of a layer in one tensor: (E, 2 I, H) gate above up, and (E, H, I)
    fused-shared  split, with the shared expert as experts E .. E + n_shared - 1, cut along the intermediate dim
    fused         split, with q, k, v one above the other, and gate above up, biases alike

Rows: a tensor is seen as a matrix, all dims but the last being rows; a vector is a column.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum

from converters.config import Glm4MoeConfig
from converters.errors import InputError
from converters.schema import (
    CACHE_SCALES,
    COMPANIONS,
    TABLE,
    ModelSchema,
    ParsedName,
    Role,
    Tensor,
    TensorSpec,
    numbered,
    parse,
    parsed_name,
    schema_for_parsed,
    unknown_name,
)


class Layout(StrEnum):
    """How the tensors are stored; where names fit several layouts, the first of them is meant."""

    SPLIT = "split"
    PACKED = "packed"
    FUSED_SHARED = "fused-shared"
    FUSED = "fused"


Span = tuple[int, int]
_WEIGHT = "weight"
_EXPERT = ".{expert}"


@dataclass(frozen=True, slots=True)
class Piece:
    """A rectangle of an official tensor: rows and columns [start, stop)."""

    tensor: Tensor
    rows: Span
    columns: Span


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor of a layout, were it not quantized: elements of equal shape, each made of pieces from top to bottom.

    `stack` is the number of elements along dim 0, or None if there is no such dim and one element.
    """

    name: str
    stack: int | None
    elements: tuple[tuple[Piece, ...], ...]

    @property
    def module(self) -> str:
        """What quantization configs call it."""
        return self.name.removesuffix(f".{_WEIGHT}")

    @property
    def layer(self) -> int | None:
        """The layer, or None."""
        return self.elements[0][0].tensor.layer

    @property
    def rows(self) -> int:
        """Rows of an element."""
        return sum(piece.rows[1] - piece.rows[0] for piece in self.elements[0])

    @property
    def columns(self) -> int:
        """Columns of an element."""
        return self.elements[0][0].columns[1] - self.elements[0][0].columns[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as stored when not quantized."""
        is_matrix = len(self.elements[0][0].tensor.shape) > 1
        matrix = (self.rows, self.columns) if is_matrix else (self.rows,)
        return matrix if self.stack is None else (self.stack, *matrix)

    def part(self, suffix: str) -> str:
        """Return the name of a part of its quantized form; the empty suffix is the tensor itself.

        A parameter that is called `x.weight` has a part `x.weight_scale`; one that is called `x` has `x_scale`, which
        is how transformers names the scales of packed experts.
        """
        module, _, last = self.name.rpartition(".")
        if not suffix:
            return self.name
        return f"{module}.{suffix}" if last == _WEIGHT else f"{self.name}_{suffix.removeprefix(f'{_WEIGHT}_')}"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a piece lies: element of the stored tensor, and first row within it; columns start at 0."""

    stored: Stored
    element: int
    row: int
    piece: Piece


class StoredLayout:
    """A schema in a layout: every stored tensor by name, and every official tensor's places."""

    def __init__(self, schema: ModelSchema, layout: Layout) -> None:
        self.schema = schema
        self.layout = layout
        grouped: dict[str, dict[int | None, list[Piece]]] = {}
        for tensor in schema.tensors.values():
            for name, element, piece in _homes(tensor, layout, schema.config):
                grouped.setdefault(name, {}).setdefault(element, []).append(piece)
        self.stored = {
            name: Stored(name, None if None in elements else len(elements), tuple(map(tuple, elements.values())))
            for name, elements in grouped.items()
        }
        self._places: dict[str, list[Place]] = {}
        for stored in self.stored.values():
            for index, pieces in enumerate(stored.elements):
                row = 0
                for piece in pieces:
                    self._places.setdefault(piece.tensor.name, []).append(Place(stored, index, row, piece))
                    row += piece.rows[1] - piece.rows[0]

    def places(self, tensor: Tensor) -> tuple[Place, ...]:
        """Return where the pieces of an official tensor lie; together they are the tensor."""
        return tuple(self._places[tensor.name])

    def resolve(self, name: str) -> tuple[Stored, str]:
        """Return the stored tensor that a name is, or is a part of, and the part's suffix.

        Raises:
            InputError: the layout of this model has no such tensor.
        """
        if name in self.stored:
            return self.stored[name], ""
        owner, suffix = _owner(name)
        if owner not in self.stored:
            raise InputError(f"tensor {name!r}", expected="a tensor of this model", found="none in its config")
        return self.stored[owner], suffix


def _homes(tensor: Tensor, layout: Layout, config: Glm4MoeConfig) -> Iterator[tuple[str, int | None, Piece]]:
    """Yield stored name, element and piece for each part that the layout makes of an official tensor."""
    template = _template(tensor.spec, layout)
    whole = Piece(tensor, (0, tensor.shape[0]), (0, tensor.shape[1] if len(tensor.shape) > 1 else 1))
    if layout is Layout.FUSED_SHARED and tensor.spec.role is Role.SHARED_EXPERT:
        width, first = config.moe_intermediate_size, config.n_routed_experts
        for slot in range(config.n_shared_experts):
            cut = (slot * width, (slot + 1) * width)
            is_row_cut = tensor.spec.tp_dim == 0
            piece = Piece(tensor, cut if is_row_cut else whole.rows, whole.columns if is_row_cut else cut)
            yield template.format(layer=tensor.layer, expert=first + slot), None, piece
    else:
        is_packed = layout is Layout.PACKED and tensor.spec.role is Role.EXPERT
        name = template.format(layer=tensor.layer, expert=tensor.expert)
        yield name, tensor.expert if is_packed else None, whole


def _template(spec: TensorSpec, layout: Layout) -> str:
    """Return the name that a layout gives to a row of the table."""
    if layout is Layout.PACKED and spec.role is Role.EXPERT:
        path, module, _ = spec.name.rsplit(".", 2)
        return f"{path.removesuffix(_EXPERT)}.{spec.fuse.group if spec.fuse else module}"
    if layout is Layout.FUSED and spec.fuse:
        path, _, parameter = spec.name.rsplit(".", 2)
        return f"{path}.{spec.fuse.group}.{parameter}"
    if layout is Layout.FUSED_SHARED and spec.role is Role.SHARED_EXPERT:
        return next(row.name for row in TABLE if (row.role, row.part) == (Role.EXPERT, spec.part))
    return spec.name


def _pattern_table() -> dict[str, dict[Layout, TensorSpec]]:
    """Return, for each pattern of a stored name, the layouts that have it and the first row stored there."""
    table: dict[str, dict[Layout, TensorSpec]] = {}
    for layout in Layout:
        for spec in TABLE:
            pattern = _template(spec, layout).replace("{layer}", "#").replace("{expert}", "#")
            table.setdefault(pattern, {}).setdefault(layout, spec)
    return table


_LAYOUTS_BY_PATTERN = _pattern_table()


def _owner(name: str) -> tuple[str, str]:
    """Return the unquantized name that a part's name was made from, and its suffix; undoes `Stored.part`."""
    module, _, last = name.rpartition(".")
    if last in COMPANIONS:
        return f"{module}.{_WEIGHT}", last
    for suffix in COMPANIONS:
        owner = name.removesuffix(f"_{suffix.removeprefix(f'{_WEIGHT}_')}")
        if owner != name and numbered(owner)[0] in _LAYOUTS_BY_PATTERN:
            return owner, suffix
    return name, ""


def is_cache_scale(name: str) -> bool:
    """Return whether a tensor is a scale of the KV cache."""
    return name.rpartition(".")[2] in CACHE_SCALES


def parse_stored(name: str, config: Glm4MoeConfig) -> tuple[ParsedName, frozenset[Layout]]:
    """Take a stored name apart: the first row of the table that is stored under it, and the layouts that have it.

    Raises:
        InputError: no layout has this name.
    """
    if is_cache_scale(name):
        return parse(name), frozenset(Layout)
    owner, suffix = _owner(name)
    pattern, numbers = numbered(owner)
    layouts = _LAYOUTS_BY_PATTERN.get(pattern)
    if layouts is None:
        raise unknown_name(name)
    parsed = parsed_name(next(iter(layouts.values())), numbers, suffix or None)
    slots = range(config.n_routed_experts, config.n_routed_experts + config.n_shared_experts)
    if parsed.expert in slots:
        return parsed, frozenset(layouts) & {Layout.FUSED_SHARED}
    return parsed, frozenset(layouts)


def parse_known(names: Iterable[str], config: Glm4MoeConfig) -> dict[str, tuple[ParsedName, frozenset[Layout]]]:
    """Take stored names apart as `parse_stored` does, without those that no layout has."""
    found = {}
    for name in names:
        try:
            found[name] = parse_stored(name, config)
        except InputError:
            continue
    return found


def most_common_layout(names: Mapping[str, tuple[ParsedName, frozenset[Layout]]]) -> Layout:
    """Return the layout that most names fit, of several the first."""
    votes = Counter(layout for _, layouts in names.values() for layout in layouts)
    return max(Layout, key=lambda layout: (votes[layout], -list(Layout).index(layout)))


def detect_layout(config: Glm4MoeConfig, names: Iterable[str]) -> StoredLayout:
    """Return the layout that stored names show, with the MTP style and the routers that they show.

    Raises:
        InputError: a name that no layout has, or names of two layouts; a tensor that is missing is not noticed here.
    """
    possible, witness = frozenset(Layout), ""
    seen: dict[ParsedName, None] = {}
    for name in names:
        parsed, layouts = parse_stored(name, config)
        seen[parsed] = None
        if not possible & layouts:
            raise InputError(
                f"tensor {name}",
                expected=f"layout {_list(possible)}, as {witness} shows",
                found=f"{_list(layouts) or 'none'}: half of the checkpoint is stored in another layout",
            )
        if possible - layouts:
            witness = name
        possible &= layouts
    schema = schema_for_parsed(config, seen)
    return StoredLayout(schema, next(layout for layout in Layout if layout in possible))


def _list(layouts: frozenset[Layout]) -> str:
    return " or ".join(layout for layout in Layout if layout in layouts)
