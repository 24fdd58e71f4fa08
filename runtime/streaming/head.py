"""The heads, in the dtype of the checkpoint, and logits of a few rows at a time.

Shapes: T rows of a run, R rows at a time, D hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from converters.checkpoint.dtypes import torch_dtype
from converters.schema import Role
from runtime.model.linear import Linear
from runtime.streaming.embedding import names_of
from runtime.streaming.sides import Side


@contextmanager
def heads(sides: Sequence[Side], advance: Callable[[int], None]) -> Iterator[dict[str, Linear]]:
    """Have the head of each side, by its name; equal ones are held once.

    Args:
        sides: without any part filled.
        advance: told the bytes read.
    Raises:
        InputError: a head that cannot be read or decoded.
    """
    held: dict[str, Linear] = {}
    try:
        for side in sides:
            names = side.head_names()
            shared = next((head for head in held.values() if _is_stored(side, head)), None)
            if shared is None:
                side.loader.place(side.loader.fetch(names, as_stored=True))
            advance(side.loader.stored_bytes(names))
            held[side.name] = shared or side.loader.model.lm_head
        yield held
    finally:
        for side in sides:
            side.loader.release(side.head_names())


def _is_stored(side: Side, head: Linear) -> bool:
    """Return whether a side's head has the very values of another one; one in codes is taken for another."""
    (name,) = names_of(side.source, Role.HEAD)
    tensor = side.source.schema.tensors[name]
    stored = side.source.weights[side.source.stored_layout.places(tensor)[0].stored.name]
    if head.weight_scale is not None or not stored.format.is_plain:
        return False
    own = torch_dtype(stored.entries[""].dtype)
    # rounded to a narrower dtype, other values might look the same
    exact = torch.promote_types(own, head.weight.dtype) is head.weight.dtype
    return exact and side.loader.equals(tensor, head.weight)


def logits_of(heads: Sequence[Linear], matrices: Sequence[torch.Tensor], rows_R: torch.Tensor) -> list[torch.Tensor]:
    """Return the logits (R, V) fp32 of rows of normed hidden states; a head that several share is widened once."""
    given = [matrix[rows_R].to(head.weight.device) for head, matrix in zip(heads, matrices, strict=True)]
    if all(head is heads[0] for head in heads):
        return heads[0].several_fp32(given)
    return [head.several_fp32([rows_RD])[0] for head, rows_RD in zip(heads, given, strict=True)]
