"""Which tensors are quantized. The ignore list is derived from the table, never typed."""

from converters.schema import DtypePolicy, ModelSchema, Tensor


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a scheme applies to this tensor: GEMM weights do, in the MTP layer as in the body.

    Router, norms, biases, embeddings, heads and eh_proj stay as they are: engines build them unquantized.
    """
    return tensor.spec.dtype is DtypePolicy.QUANTIZABLE


def ignored_modules(schema: ModelSchema) -> list[str]:
    """Return the modules with a matrix that stays unquantized, by exact name, in checkpoint order."""
    return [tensor.module for tensor in schema.tensors.values() if len(tensor.shape) == 2 and not is_quantized(tensor)]
