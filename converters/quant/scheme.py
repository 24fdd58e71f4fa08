"""The schemes, as data. No torch here: the command line reads this module for its choices."""

from enum import StrEnum

SCHEMES = ("fp8",)


class Arithmetic(StrEnum):
    """How weights are divided by their scales before rounding to codes."""

    FLOAT32 = "float32"
    COMPRESSED_TENSORS = "compressed-tensors"
    MODELOPT = "modelopt"


class ScaleSearch(StrEnum):
    """How the local scales of NVFP4 are chosen: from the largest magnitude, or by the smallest squared error."""

    NONE = "none"
    MSE = "mse"
