"""The rows of a run: one for every token of every window, window after window.

Shapes: R rows, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Protocol

import torch

from runtime.streaming.attention import Bounds


class Span(Protocol):
    """Token ids [begin, end) of a text: one forward pass."""

    @property
    def begin(self) -> int:
        """The first."""

    @property
    def end(self) -> int:
        """One behind the last."""


@dataclass(frozen=True)
class RowPlan:
    """Which token is in which row.

    Args:
        token_ids: of the text.
        windows: of it, in order; they may overlap.
    """

    token_ids: tuple[int, ...]
    windows: Sequence[Span]

    @cached_property
    def bounds(self) -> Bounds:
        """First row of each window, and one behind its last."""
        ends = [0]
        for window in self.windows:
            ends.append(ends[-1] + window.end - window.begin)
        return list(pairwise(ends))

    @property
    def mtp_bounds(self) -> Bounds:
        """The same for the MTP layer, which needs the token that follows."""
        return [(begin, end - 1) for begin, end in self.bounds if end - begin > 1]

    @property
    def num_rows(self) -> int:
        """All rows."""
        return self.bounds[-1][1]

    @property
    def longest(self) -> int:
        """Tokens of the longest window."""
        return max(end - begin for begin, end in self.bounds)

    @cached_property
    def positions(self) -> torch.Tensor:
        """Index in the text of each row's token, int64."""
        return torch.cat([torch.arange(window.begin, window.end) for window in self.windows])

    @cached_property
    def ids(self) -> torch.Tensor:
        """Id of each row's token, int64."""
        return torch.tensor(self.token_ids)[self.positions]

    def leading_rows(self, num_tokens: int) -> int:
        """Return the rows of the leading whole windows that have at most so many tokens, at least of one window."""
        return max((end for _, end in self.bounds if end <= num_tokens), default=self.bounds[0][1])
