"""A shared expert that several expert slots hold: its tensors put together again, each part as it was cut."""

from collections.abc import Mapping, Sequence

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.checkpoint.header import TensorEntry
from converters.errors import InputError
from converters.formats.weights import WHOLE, Part, Scheme, Use, WeightFormat, cells, match_scheme, plain_format
from converters.inspect.logical import LogicalTensor, LogicalView, Piece, official
from converters.layout import Stored
from converters.schema import Tensor

Parts = Mapping[str, TensorEntry]


def join_slots(view: LogicalView, schemes: Sequence[Scheme]) -> None:
    """Put official tensors together that lie in several stored ones; where one of these is missing, so are they.

    Args:
        view: changed in place.
        schemes: what the config declares of quantized weights.
    """
    if view.stored is None:
        return
    for tensor in view.stored.schema.tensors.values():
        slots = [place.stored for place in view.stored.places(tensor)]
        if len(slots) > 1:
            _join(view, tensor, slots, schemes)


def _join(view: LogicalView, tensor: Tensor, slots: Sequence[Stored], schemes: Sequence[Scheme]) -> None:
    held = [view.parts.get(slot.name, {}) for slot in slots]
    found = {suffix: entry for parts in reversed(held) for suffix, entry in parts.items()}
    for suffix in found:
        del view.tensors[official(tensor, suffix)[0]]
    if not all(held):
        return
    formats = [_format(slot, parts, schemes) for slot, parts in zip(slots, held, strict=True)]
    first = formats[0]
    if first is not None and all(each == first for each in formats):
        view.add(_joined(tensor, part, [parts[part.suffix] for parts in held]) for part in first.parts)
        return
    for slot, parts, own in zip(slots, held, formats, strict=True):
        for entry in parts.values() if own is None or own != first else ():
            if own is None:
                view.misfit(entry, slot.shape)
            else:
                view.misfits[entry.name] = f"what {slots[0].name} is stored as", f"{entry.dtype} {list(entry.shape)}"
    for suffix, entry in found.items():
        name, parsed = official(tensor, suffix)
        view.add([LogicalTensor(name, entry.dtype, (), (), parsed)])


def _format(slot: Stored, parts: Parts, schemes: Sequence[Scheme]) -> WeightFormat | None:
    own = parts.get("")
    if own is not None and len(parts) == 1 and own.dtype in FLOAT_DTYPES:
        return plain_format(own.dtype, is_matrix=True) if own.shape == slot.shape else None
    try:
        return match_scheme(slot.name, parts, schemes, slot.stack, (slot.rows, slot.columns))
    except InputError:
        return None


def _joined(tensor: Tensor, part: Part, entries: Sequence[TensorEntry]) -> LogicalTensor:
    """Return a part of the official tensor: what one value for all rows or columns says, every slot repeats."""
    name, parsed = official(tensor, part.suffix)
    if part.use is Use.SHAPE:
        return LogicalTensor(name, part.dtype, entries[0].shape, (), parsed)
    cut_dim = tensor.spec.tp_dim or 0
    held = entries[:1] if part.grain[cut_dim] == WHOLE else entries
    pieces = tuple(Piece(entry.name, 0, entry.nbytes) for entry in held)
    rows, columns = (cells(extent, grain) for extent, grain in zip(tensor.shape, part.grain, strict=True))
    return LogicalTensor(
        name, part.dtype, part.form.shape(None, rows, columns), pieces, parsed, rows if cut_dim and len(held) > 1 else 0
    )
