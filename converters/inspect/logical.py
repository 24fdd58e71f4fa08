"""Stored tensors seen as the official tensors they hold: the one place where `inspect` knows about layouts."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod

from converters.checkpoint.dtypes import FLOAT_DTYPES, itemsize
from converters.checkpoint.header import TensorEntry
from converters.config import CONFIG_FILE, Glm4MoeConfig
from converters.errors import InputError
from converters.formats.weights import cells
from converters.layout import Layout, Stored, StoredLayout, is_cache_scale, most_common_layout, parse_known
from converters.schema import ParsedName, Tensor, schema_for_parsed

# a suffix whose values repeat the shape of the weight; in another layout they differ and mean the same
SHAPE_SUFFIX = "weight_shape"
CODES_SUFFIX = "weight_packed"
# suffixes that are scales, of weights, activations or the KV cache
SCALES = frozenset(
    {
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_global_scale",
        "input_scale",
        "input_global_scale",
        "activation_scale",
        "k_scale",
        "v_scale",
    }
)
_MIN_BLOCK = 16


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes [begin, end) of a stored tensor's data."""

    stored: str
    begin: int
    end: int


@dataclass(frozen=True, slots=True)
class LogicalTensor:
    """A tensor under its official, split name. Its bytes are those of its pieces, one after the other.

    Where `num_rows` is set, the pieces stand side by side instead, with so many rows each.
    `parsed` is None for a name that no layout has; `pieces` is empty where the stored tensor has a shape that cannot
    be cut up, and where it repeats the shape of what several weights are stored as.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    parsed: ParsedName | None
    num_rows: int = 0

    def spans(self) -> Iterator[Piece]:
        """Yield what to read for its bytes, in their order."""
        if not self.num_rows:
            yield from self.pieces
        for row in range(self.num_rows):
            for piece in self.pieces:
                row_bytes = (piece.end - piece.begin) // self.num_rows
                begin = piece.begin + row * row_bytes
                yield Piece(piece.stored, begin, begin + row_bytes)

    @property
    def nbytes(self) -> int:
        """Bytes of data."""
        return sum(piece.end - piece.begin for piece in self.pieces)

    @property
    def weight_name(self) -> str:
        """Name of the weight that this tensor is, or belongs to; its own name if the table does not know it."""
        if self.parsed is None:
            return self.name
        return self.parsed.spec.name.format(layer=self.parsed.layer, expert=self.parsed.expert)

    @property
    def suffix(self) -> str:
        """What quantized part of the weight it is; empty for the tensor that bears the weight's own name."""
        return (self.parsed.companion or "") if self.parsed else ""


@dataclass(slots=True)
class LogicalView:
    """A checkpoint as official tensors, with the layout they are stored in.

    Attributes:
        stored: the layout applied to the schema that fits the names; None without a usable config.
        parts: entries of every stored weight by suffix, under the name it would have if it were not quantized.
        foreign: names that belong to another layout than most.
        misfits: stored tensors whose shape, or dtype, is not the layout's: expected and found.
    """

    stored: StoredLayout | None
    tensors: dict[str, LogicalTensor] = field(default_factory=dict)
    parts: dict[str, dict[str, TensorEntry]] = field(default_factory=dict)
    foreign: dict[str, frozenset[Layout]] = field(default_factory=dict)
    misfits: dict[str, tuple[str, str]] = field(default_factory=dict)

    @property
    def layout(self) -> str:
        """Name of the layout, `unknown` without a usable config."""
        return str(self.stored.layout) if self.stored else "unknown"

    def add(self, tensors: Iterable[LogicalTensor]) -> None:
        """Take in tensors by their official names."""
        for tensor in tensors:
            self.tensors[tensor.name] = tensor

    def misfit(self, entry: TensorEntry, shape: tuple[int, ...]) -> None:
        """Remember a stored tensor that should have another shape."""
        self.misfits[entry.name] = f"{list(shape)}, from {CONFIG_FILE}", f"{list(entry.shape)}"


def logical_view(
    entries: Mapping[str, tuple[str, TensorEntry]], config: Glm4MoeConfig | None, listed: Iterable[str] = ()
) -> LogicalView:
    """Return the official tensors that stored entries hold; a name that fits nowhere stands for itself.

    Args:
        entries: what can be read.
        config: what the model is.
        listed: names of tensors in files that cannot be read; they too show layout and MTP style.
    """
    if config is None:
        view = LogicalView(None)
        view.add(_itself(entry, None) for _, entry in entries.values())
        return view
    names = parse_known([*entries, *listed], config)
    layout = most_common_layout(names)
    fitting = [parsed for parsed, layouts in names.values() if layout in layouts]
    view = LogicalView(StoredLayout(schema_for_parsed(config, fitting), layout))
    for name, (_, entry) in entries.items():
        if name not in names:
            view.add([_itself(entry, None)])
        elif layout not in names[name][1]:
            view.foreign[name] = names[name][1]
            view.add([_itself(entry, None)])
        else:
            view.add(_resolve(view, entry, names[name][0]))
    return view


def _itself(entry: TensorEntry, parsed: ParsedName | None) -> LogicalTensor:
    return LogicalTensor(entry.name, entry.dtype, entry.shape, (Piece(entry.name, 0, entry.nbytes),), parsed)


def _resolve(view: LogicalView, entry: TensorEntry, parsed: ParsedName) -> Iterator[LogicalTensor]:
    """Yield the official tensors in a stored one."""
    if is_cache_scale(entry.name) or view.stored is None:
        yield _itself(entry, parsed)
        return
    try:
        stored, suffix = view.stored.resolve(entry.name)
    except InputError:
        # a layer or an expert that the config does not have
        yield _itself(entry, parsed)
        return
    view.parts.setdefault(stored.name, {})[suffix] = entry
    if stored.stack is None and len(stored.elements[0]) == 1:
        yield _whole(entry, stored, suffix)
    elif suffix == SHAPE_SUFFIX:
        yield from _shapes(view, entry, stored)
    else:
        yield from _cut(view, entry, stored, suffix)


def official(tensor: Tensor, suffix: str) -> tuple[str, ParsedName]:
    """Return the official name of a part of a tensor's quantized form, whole and taken apart."""
    name = f"{tensor.module}.{suffix}" if suffix else tensor.name
    return name, ParsedName(tensor.spec, tensor.layer, tensor.expert, suffix or None)


def _whole(entry: TensorEntry, stored: Stored, suffix: str) -> LogicalTensor:
    name, parsed = official(stored.elements[0][0].tensor, suffix)
    return LogicalTensor(name, entry.dtype, entry.shape, (Piece(entry.name, 0, entry.nbytes),), parsed)


def _shapes(view: LogicalView, entry: TensorEntry, stored: Stored) -> Iterator[LogicalTensor]:
    """Yield what would repeat the shapes of weights that are stored as one: it repeats the shape of the one."""
    if entry.shape != (len(stored.shape),):
        view.misfit(entry, (len(stored.shape),))
    for pieces in stored.elements:
        for piece in pieces:
            name, parsed = official(piece.tensor, SHAPE_SUFFIX)
            yield LogicalTensor(name, entry.dtype, entry.shape, (), parsed)


def _cut(view: LogicalView, entry: TensorEntry, stored: Stored, suffix: str) -> Iterator[LogicalTensor]:
    """Yield the official tensors in a stack, or in one with several pieces from top to bottom.

    A part with one row for all pieces belongs to each of them; rows that do not divide as the pieces do are a misfit.
    """
    lead = stored.stack or 1
    grid = entry.shape[1:] if stored.stack is not None else entry.shape
    grid_rows, grid_columns = (grid[0] if grid else 1), prod(grid[1:])
    fits = stored.stack is None or entry.shape[:1] == (lead,)
    if not suffix and entry.dtype in FLOAT_DTYPES:
        fits = entry.shape == stored.shape
    grain = _row_grain(grid_rows, stored.rows)
    fits = fits and (grain == 0 or cells(stored.rows, grain) == grid_rows)
    row_bytes = grid_columns * itemsize(entry.dtype)
    for element in range(lead):
        row = 0
        for piece in stored.elements[element]:
            num_rows = piece.rows[1] - piece.rows[0]
            first, count = (row // grain, cells(num_rows, grain)) if grain else (0, 1)
            name, parsed = official(piece.tensor, suffix)
            if not fits or (grain and row % grain):
                view.misfit(entry, stored.shape)
                yield LogicalTensor(name, entry.dtype, (), (), parsed)
            else:
                begin = (element * grid_rows + first) * row_bytes
                held = Piece(entry.name, begin, begin + count * row_bytes)
                shape = (count, grid_columns) if len(piece.tensor.shape) > 1 or suffix else (count,)
                yield LogicalTensor(name, entry.dtype, shape, (held,), parsed)
            row += num_rows


def _row_grain(grid_rows: int, rows: int) -> int:
    """Return how many rows of the weight one row of a part stands for; 0: all of them."""
    if grid_rows == 1 and rows > 1:
        return 0
    grain = -(-rows // max(1, grid_rows))
    # a ragged last block: sides of blocks are powers of two
    return grain if grain * grid_rows == rows else max(_MIN_BLOCK, 1 << (grain - 1).bit_length())
