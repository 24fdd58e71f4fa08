"""Rows of the source in another order, read in windows: an order within heads reads heads, not single rows."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from converters.diagnosis.hypothesis import Rows, rows_of
from converters.schema import Tensor
from converters.source import Source

if TYPE_CHECKING:
    import torch

# a window of so many times the rows that are wanted is read at once; rows that are farther apart are read in runs
_WINDOW = 4


def stacked_rows(source: Source, members: Sequence[Tensor]) -> Rows:
    """Return the rows of tensors of equal width as if they lay one above the other."""
    import torch

    parts, tops, top = [rows_of(source, tensor) for tensor in members], [], 0
    for tensor in members:
        tops.append((top, top + tensor.shape[0]))
        top += tensor.shape[0]

    def read(start: int, stop: int) -> "torch.Tensor":
        found = [
            rows(max(start, first) - first, min(stop, last) - first)
            for rows, (first, last) in zip(parts, tops, strict=True)
            if max(start, first) < min(stop, last)
        ]
        return found[0] if len(found) == 1 else torch.cat(found)

    return read


def in_order(rows: Rows, index_N: "torch.Tensor") -> Rows:
    """Return rows whose row i is row index_N[i] of the given ones."""
    import torch

    def read(start: int, stop: int) -> "torch.Tensor":
        wanted_R = index_N[start:stop]
        low, high = int(wanted_R.min()), int(wanted_R.max()) + 1
        if high - low <= _WINDOW * len(wanted_R):
            return rows(low, high)[wanted_R - low]
        breaks = [0, *((wanted_R[1:] - wanted_R[:-1] != 1).nonzero()[:, 0] + 1).tolist(), len(wanted_R)]
        runs = [wanted_R[first:last] for first, last in pairwise(breaks)]
        return torch.cat([rows(int(run[0]), int(run[-1]) + 1) for run in runs])

    return read


def columns_in_order(rows: Rows, index_C: "torch.Tensor") -> Rows:
    """Return rows whose column i is column index_C[i] of the given ones."""
    return lambda start, stop: rows(start, stop)[:, index_C]
