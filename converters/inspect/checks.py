"""From what the values of tensors look like to findings."""

from collections.abc import Iterable, Iterator

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.inspect import catalog
from converters.inspect.catalog import CheckFinding
from converters.inspect.content import HOLE_BYTES, TensorContent
from converters.inspect.logical import CODES_SUFFIX, SCALES, LogicalTensor
from converters.schema import Role

# rows of padding tokens may be zero in these
_VOCABULARY = frozenset({Role.EMBEDDING, Role.HEAD, Role.MTP_EMBEDDING, Role.MTP_HEAD})
# biases may be zero, and are in models that never trained them
_BIASES = frozenset({Role.ATTENTION_BIAS, Role.ROUTER_BIAS})
_NORMS = frozenset({Role.NORM, Role.QK_NORM})
# one member's scale is used for all; a plain per-tensor scale is instead replaced by the largest of its group
_REQUANTIZED = "weight_scale"


def check_values(contents: Iterable[TensorContent]) -> Iterator[CheckFinding]:
    """Yield findings on the values of single tensors, then on scales that a fused group must share."""
    groups: dict[tuple[object, ...], list[TensorContent]] = {}
    for content in contents:
        yield from _check_tensor(content)
        key = _fused_key(content.tensor)
        if key is not None:
            groups.setdefault(key, []).append(content)
    for members in groups.values():
        yield from _check_group(members)


def _check_tensor(content: TensorContent) -> Iterator[CheckFinding]:
    tensor, values = content.tensor, content.values
    subject = f"tensor {tensor.name}"
    if content.error:
        yield CheckFinding(catalog.UNREADABLE, subject, "readable data", content.error)
        return
    if tensor.suffix in SCALES:
        yield from _check_scale(content, subject)
    elif values.first_non_finite is not None:
        yield CheckFinding(catalog.NON_FINITE, subject, "finite values", _place("NaN or Inf", content))
    elif tensor.suffix in ("", CODES_SUFFIX) and tensor.parsed is not None:
        yield from _check_sameness(content, subject, tensor.parsed.spec.role)


def _check_scale(content: TensorContent, subject: str) -> Iterator[CheckFinding]:
    values, expected = content.values, "positive, finite scales"
    if values.first_non_finite is not None:
        yield CheckFinding(catalog.SCALE_VALUE, subject, expected, _place("NaN or Inf", content))
    elif not values.is_scale:
        yield CheckFinding(catalog.SCALE_VALUE, subject, expected, "a zero, negative or undefined one")


def _check_sameness(content: TensorContent, subject: str, role: Role) -> Iterator[CheckFinding]:
    """Yield a finding where a tensor is all zero, constant, or has a hole; one element cannot be any of these."""
    tensor, values = content.tensor, content.values
    if tensor.parsed is None or tensor.nbytes == 0 or max(tensor.shape, default=1) == 1:
        return
    is_matrix = len(tensor.parsed.spec.shape) > 1
    if role in _BIASES and values.is_constant:
        yield CheckFinding(
            catalog.VECTOR_CONSTANT, subject, "trained values", "zeros" if values.is_zero else "one value"
        )
    elif values.is_zero:
        yield CheckFinding(catalog.ALL_ZERO, subject, "trained values", "zeros")
    elif values.is_constant:
        check = catalog.CONSTANT if is_matrix else catalog.VECTOR_CONSTANT
        yield CheckFinding(check, subject, "trained values", "one value")
    elif values.first_hole is not None and role not in _VOCABULARY and tensor.dtype in FLOAT_DTYPES:
        found = _at(f"{HOLE_BYTES >> 20} MiB of zeros", values.first_hole, tensor)
        yield CheckFinding(catalog.HOLE, subject, "trained values throughout", found)


def _fused_key(tensor: LogicalTensor) -> tuple[object, ...] | None:
    """Return what the members of a fused group of one layer have in common; None unless this is one scale for all."""
    parsed = tensor.parsed
    # (1, 1) is a grid of blocks that happens to have one
    is_single = len(tensor.shape) < 2 and all(n == 1 for n in tensor.shape)
    if parsed is None or parsed.companion not in SCALES or parsed.spec.fuse is None or not is_single:
        return None
    return parsed.layer, parsed.expert, parsed.spec.role, parsed.spec.fuse.group, parsed.companion


def _check_group(members: list[TensorContent]) -> Iterator[CheckFinding]:
    if len({(content.tensor.dtype, content.values.first_bits) for content in members}) > 1:
        first = members[0].tensor.parsed
        plain = first is not None and first.companion == _REQUANTIZED
        names = ", ".join(sorted(content.tensor.name for content in members))
        check = catalog.FUSED_SCALES_REQUANTIZED if plain else catalog.FUSED_SCALES
        yield CheckFinding(check, names, "one value", "different values")


def _place(what: str, content: TensorContent) -> str:
    return _at(what, content.values.first_non_finite or 0, content.tensor)


def _at(what: str, element: int, tensor: LogicalTensor) -> str:
    stored = {piece.stored for piece in tensor.pieces} - {tensor.name}
    where = f" (stored in {', '.join(sorted(stored))})" if stored else ""
    if len(tensor.shape) != 2:
        return f"{what} at element {element}{where}"
    row, column = divmod(element, tensor.shape[1])
    return f"{what} at row {row}, column {column}{where}"
