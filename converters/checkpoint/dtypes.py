"""safetensors dtype names, their sizes, and their torch counterparts."""

from typing import TYPE_CHECKING

from converters.errors import InputError

if TYPE_CHECKING:
    import torch

# dtype name on disk -> (bytes per element, attribute of torch)
_DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
    "F64": (8, "float64"),
}
# what a GEMM weight, norm or bias may be stored as before any quantization
FLOAT_DTYPES = ("BF16", "F16", "F32")
BY_CONFIG_NAME = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


def itemsize(dtype: str) -> int:
    """Return bytes per element of a safetensors dtype name."""
    return _DTYPES[dtype][0]


def is_known(dtype: object) -> bool:
    """Return whether this is a safetensors dtype name with whole bytes per element."""
    return isinstance(dtype, str) and dtype in _DTYPES


def torch_dtype(dtype: str) -> "torch.dtype":
    """Return the torch dtype of a safetensors dtype name."""
    import torch

    found = getattr(torch, _DTYPES[dtype][1], None)
    if found is None:
        raise InputError(f"dtype {dtype}", expected="one this torch version has", found=f"torch {torch.__version__}")
    return found
