"""The schemes, as data. No torch here: the command line reads this module for its choices."""

from dataclasses import dataclass
from enum import StrEnum

from converters.schema import Role


class Arithmetic(StrEnum):
    """How weights are divided by their scales before rounding to codes."""

    FLOAT32 = "float32"
    COMPRESSED_TENSORS = "compressed-tensors"
    MODELOPT = "modelopt"


class ScaleSearch(StrEnum):
    """How the local scales of NVFP4 are chosen: from the largest magnitude, or by the smallest squared error."""

    NONE = "none"
    MSE = "mse"


class Format(StrEnum):
    """Whose tensor names, shapes and config a result has."""

    COMPRESSED_TENSORS = "compressed-tensors"
    MODELOPT = "modelopt"
    DEEPSEEK = "deepseek"


class Preset(StrEnum):
    """Which roles one scheme is applied to."""

    ALL_LINEAR = "all-linear"
    MLP_ONLY = "mlp-only"
    EXPERTS_ONLY = "experts-only"


class MtpPolicy(StrEnum):
    """What becomes of the MTP layer: as it is, only its routed experts quantized, quantized like the body, left out."""

    KEEP = "keep"
    QUANTIZE_EXPERTS = "quantize-experts"
    QUANTIZE = "quantize"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class SchemeInfo:
    """What a scheme asks of weights and of calibration, in any format.

    Attributes:
        columns: a weight's columns must be a multiple of it.
        cut: tensor parallelism must not cut inside so many rows or columns; 1: it may cut anywhere.
        has_tensor_scale: one scale for a whole weight, shared by weights that engines multiply as one.
        has_input_scale: a scale of the inputs, known before run time: needs calibration.
        is_searched: there are local scales to search.
    """

    columns: int = 1
    cut: int = 1
    has_tensor_scale: bool = False
    has_input_scale: bool = False
    is_searched: bool = False


BLOCK = 128
NVFP4_GROUP = 16
# int8 codes in a word
_WORD = 4
_INFO = {
    "fp8": SchemeInfo(),
    "fp8-block": SchemeInfo(BLOCK, BLOCK),
    "fp8-static": SchemeInfo(has_tensor_scale=True, has_input_scale=True),
    "int8": SchemeInfo(),
    "int8-weight-only": SchemeInfo(_WORD, _WORD),
    "nvfp4": SchemeInfo(NVFP4_GROUP, NVFP4_GROUP, has_tensor_scale=True, has_input_scale=True, is_searched=True),
    "nvfp4-weight-only": SchemeInfo(NVFP4_GROUP, NVFP4_GROUP, has_tensor_scale=True, is_searched=True),
}
SCHEMES = tuple(_INFO)
GROUPED_SCHEME = "int8-weight-only"
# columns that share a scale; 0: the whole row
GROUP_SIZES = {"channel": 0, "32": 32, "64": 64, "128": 128}
KV_CACHE_DTYPES = ("fp8",)

SCHEMES_BY_FORMAT: dict[Format, tuple[str, ...]] = {
    Format.COMPRESSED_TENSORS: SCHEMES,
    Format.MODELOPT: ("fp8", "fp8-block", "fp8-static", "nvfp4", "nvfp4-weight-only"),
    Format.DEEPSEEK: ("fp8-block",),
}
# the first of them is taken where none is asked for
ARITHMETICS_BY_FORMAT: dict[Format, tuple[Arithmetic, ...]] = {
    Format.COMPRESSED_TENSORS: (Arithmetic.FLOAT32, Arithmetic.COMPRESSED_TENSORS),
    Format.MODELOPT: (Arithmetic.MODELOPT,),
    Format.DEEPSEEK: (Arithmetic.FLOAT32,),
}
DEFAULT_SEARCH = ScaleSearch.MSE

# what the command line calls the roles that can be quantized
ROLES = {
    "experts": Role.EXPERT,
    "shared-experts": Role.SHARED_EXPERT,
    "dense": Role.DENSE_MLP,
    "attention": Role.ATTENTION,
}
ROLES_BY_PRESET: dict[Preset, tuple[Role, ...]] = {
    Preset.ALL_LINEAR: tuple(ROLES.values()),
    Preset.MLP_ONLY: (Role.EXPERT, Role.SHARED_EXPERT, Role.DENSE_MLP),
    Preset.EXPERTS_ONLY: (Role.EXPERT,),
}


@dataclass(frozen=True, slots=True)
class Recipe:
    """How weights are quantized and stored.

    Attributes:
        scheme: one of SCHEMES.
        format: whose names and shapes.
        arithmetic: how scales and codes are computed.
        search: how local scales are chosen.
        group: columns that share a scale, where the scheme leaves it open; 0: the whole row.
    """

    scheme: str
    format: Format = Format.COMPRESSED_TENSORS
    arithmetic: Arithmetic = Arithmetic.FLOAT32
    search: ScaleSearch = ScaleSearch.NONE
    group: int = 0

    @property
    def info(self) -> SchemeInfo:
        """What the scheme asks for, the group taken into account."""
        known = _INFO[self.scheme]
        return SchemeInfo(max(known.columns, self.group), max(known.cut, self.group)) if self.group else known

    @property
    def label(self) -> str:
        """The scheme as the command line spells it."""
        return f"{self.scheme} in groups of {self.group}" if self.group else self.scheme


def scheme_info(scheme: str) -> SchemeInfo:
    """Return what a scheme of SCHEMES asks for."""
    return _INFO[scheme]
