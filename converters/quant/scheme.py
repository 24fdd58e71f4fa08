"""The schemes, as data. No torch here: the command line reads this module for its choices."""

from enum import StrEnum

SCHEMES = ("fp8",)


class Arithmetic(StrEnum):
    """How weights are divided by their scales before rounding to codes."""

    FLOAT32 = "float32"
    COMPRESSED_TENSORS = "compressed-tensors"
