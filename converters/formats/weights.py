"""How a weight lies on disk: plain, or as codes with the parts that decode them. Data and matching, no arithmetic.

A part is described by its grain: how many rows and columns of the weight one of its elements stands for, 0 meaning all.
Codes of one byte have grain (1, 1), NVFP4 codes (1, 2), a scale per output channel (1, 0), per block (128, 128).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, StrEnum

from converters.checkpoint.dtypes import FLOAT_DTYPES
from converters.checkpoint.header import TensorEntry
from converters.errors import InputError

Grain = tuple[int, int]
WHOLE = 0


class Use(Enum):
    """What a part is for."""

    CODES = "codes"
    SCALE = "scale"  # needed to decode, in the order of the scheme
    SHAPE = "shape"  # shape of the unpacked weight, as values
    ACTIVATION = "activation"  # belongs to the layer's input, not to the weight


class Form(Enum):
    """The shape of a part whose grid has r rows and c columns; in a stack the number of weights comes first."""

    MATRIX = "[r, c]"
    VECTOR = "[r]"  # in a stack [r, 1], so that rows stay rows
    SCALAR = "[]"
    SINGLE = "[1]"
    BLOCKS = "[r, 1, c, 1]"

    def shape(self, stack: int | None, rows: int, columns: int) -> tuple[int, ...]:
        """Return the shape on disk."""
        lead = () if stack is None else (stack,)
        match self:
            case Form.MATRIX:
                return (*lead, rows, columns)
            case Form.VECTOR:
                return (*lead, rows) if stack is None else (*lead, rows, 1)
            case Form.SCALAR:
                return lead
            case Form.SINGLE:
                return (*lead, 1)
            case Form.BLOCKS:
                return (*lead, rows, 1, columns, 1)


class Coding(StrEnum):
    """How codes and scales make a weight; the formulas are in `converters.numerics.dequantize`."""

    SCALED = "scaled"
    PACKED_INT = "packed-int"
    NVFP4_DIVISOR = "nvfp4-divisor"
    NVFP4_FACTOR = "nvfp4-factor"


@dataclass(frozen=True, slots=True)
class PartRule:
    """A part that a scheme has; `suffix` is empty for the tensor that bears the weight's own name."""

    suffix: str
    use: Use
    dtypes: tuple[str, ...]
    grain: Grain = (WHOLE, WHOLE)
    forms: tuple[Form, ...] = (Form.MATRIX,)
    is_optional: bool = False

    def accepts(self, entry: TensorEntry, stack: int | None, rows: int, columns: int) -> bool:
        """Return whether a stored tensor is this part of a weight with so many rows and columns."""
        if self.use is Use.SHAPE:
            # one value for each dim of the weight
            return entry.dtype in self.dtypes and entry.shape == (2 if stack is None else 3,)
        return entry.dtype in self.dtypes and self.form(entry, stack, rows, columns) is not None

    def form(self, entry: TensorEntry, stack: int | None, rows: int, columns: int) -> Form | None:
        """Return which of the rule's forms a stored tensor has, if any."""
        grid = cells(rows, self.grain[0]), cells(columns, self.grain[1])
        return next((form for form in self.forms if form.shape(stack, *grid) == entry.shape), None)


def cells(extent: int, grain: int) -> int:
    """Return how many elements of a part cover so many rows or columns."""
    return -(-extent // (grain or extent))


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to store quantized weights; several may be declared for one checkpoint."""

    name: str
    coding: Coding
    parts: tuple[PartRule, ...]
    num_bits: int = 8


@dataclass(frozen=True, slots=True)
class Part:
    """A part as found."""

    suffix: str
    use: Use
    dtype: str
    grain: Grain
    form: Form


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How one weight is stored. Weights that are put into one tensor must have equal formats."""

    name: str
    parts: tuple[Part, ...]
    coding: Coding | None = None
    num_bits: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the values themselves are stored."""
        return self.coding is None

    def used(self, use: Use) -> tuple[Part, ...]:
        """Return the parts of one use, in the order of the scheme."""
        return tuple(part for part in self.parts if part.use is use)


def plain_format(dtype: str, *, is_matrix: bool) -> WeightFormat:
    """Return the format of values stored as they are."""
    return WeightFormat("plain", (Part("", Use.CODES, dtype, (1, 1), Form.MATRIX if is_matrix else Form.VECTOR),))


def match_scheme(
    name: str,
    entries: Mapping[str, TensorEntry],
    schemes: Sequence[Scheme],
    stack: int | None,
    shape: tuple[int, int],
) -> WeightFormat:
    """Return the format of a quantized weight: the one declared scheme that its parts fit, down to their shapes.

    Args:
        name: of the weight, for messages.
        entries: its parts by suffix.
        schemes: what quantization_config declares.
        stack: number of weights in the tensor, if it has such a dim.
        shape: rows and columns of one weight.
    Raises:
        InputError: no declared scheme fits.
    """
    for scheme in schemes:
        rules = {rule.suffix: rule for rule in scheme.parts}
        required = {rule.suffix for rule in scheme.parts if not rule.is_optional}
        if not required <= entries.keys() <= rules.keys():
            continue
        if all(rules[suffix].accepts(entry, stack, *shape) for suffix, entry in entries.items()):
            parts = tuple(
                Part(rule.suffix, rule.use, entry.dtype, rule.grain, rule.form(entry, stack, *shape) or Form.VECTOR)
                for rule in scheme.parts
                for entry in (entries.get(rule.suffix),)
                if entry is not None
            )
            return WeightFormat(scheme.name, parts, scheme.coding, scheme.num_bits)
    found = ", ".join(f"{suffix or 'weight'} {entry.dtype} {list(entry.shape)}" for suffix, entry in entries.items())
    if not any(suffix and entry.dtype in (*FLOAT_DTYPES, "F8_E4M3") for suffix, entry in entries.items()):
        raise InputError(
            f"tensor {name}",
            expected="a scale beside its codes",
            found="none",
            next_step="Without it the weights cannot be restored; fetch the checkpoint again.",
        )
    declared = ", ".join(dict.fromkeys(scheme.name for scheme in schemes))
    raise InputError(f"tensor {name}", expected=f"parts of a declared scheme ({declared})", found=found)
