"""Count what a call launches and moves, operation by operation, on any device; on `meta` at any size without memory.

An operation of torch that computes or copies counts as one launch, as most are one kernel on a GPU; sorting is several
there. Views and room for results count as none. Bytes are those of operands and results.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

PRODUCTS = ("mm", "bmm", "addmm", "_grouped_mm", "grouped_mm", "_scaled_grouped_mm")
_ROOM = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "lift_fresh")
# read no more of their source than they return
_PICKING = ("index_select", "index", "gather", "embedding")
_WAITS = ("_local_scalar_dense", "nonzero", "item", "_unique2", "unique_dim", "masked_select")


@dataclass(slots=True)
class Counts:
    """Of one call.

    Args:
        launches: operations that compute or copy.
        products: those of them that multiply matrices.
        waits: times that the host waits for the device.
        num_bytes: of operands and results.
        product_rows: rows of the left operands of products.
        operations: launches by name.
    """

    launches: int = 0
    products: int = 0
    waits: int = 0
    num_bytes: float = 0.0
    product_rows: int = 0
    operations: Counter[str] = field(default_factory=Counter)


class Counting(TorchDispatchMode):
    """Count into `counts` while active.

    Args:
        touched_share: of the weights of grouped products, which read only those of experts that have rows.
    """

    def __init__(self, touched_share: float = 1.0) -> None:
        super().__init__()
        self.counts = Counts()
        self.touched_share = touched_share

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count it."""
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        if name in _WAITS:
            self.counts.waits += 1
        if name in _ROOM or is_view(func):
            return out
        self._count(name, args, kwargs or {}, out)
        return out

    def _count(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        counts = self.counts
        counts.launches += 1
        counts.operations[name] += 1
        results = list(tensors(out))
        operands = [tensor for tensor in tensors((args, kwargs)) if all(tensor is not result for result in results)]
        written = sum(tensor.nbytes for tensor in results)
        sizes = [float(tensor.nbytes) for tensor in operands]
        if name in _PICKING:
            sizes[0] = min(sizes[0], written)
        if name in PRODUCTS:
            counts.products += 1
            left = operands[0]
            counts.product_rows += left.numel() // left.shape[-1]
        if "grouped_mm" in name:
            sizes[1] *= self.touched_share
        counts.num_bytes += written + sum(sizes)


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among nested values."""
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor))


def is_view(func: Any) -> bool:
    """Whether an operation returns memory of its operands and writes none."""
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def count(call: Callable[[], object], touched_share: float = 1.0) -> Counts:
    """Return what a call launches and moves."""
    with Counting(touched_share) as counting:
        call()
    return counting.counts
