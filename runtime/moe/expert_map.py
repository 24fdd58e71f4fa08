"""Which rank computes a slot: experts that are dealt to ranks, some of them more than once.

The router knows logical experts. A rank holds physical ones: copies of logical experts, numbered by its own slots.

Shapes: T tokens, K choices per token, E logical experts, C copies of the most copied one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.moe.dispatcher import Slots
from runtime.moe.layouts import FILTERED


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """Copies of each expert.

    Args:
        held: for each rank the logical experts that it holds, in the order of its local ids.
        num_copies_E: int64, copies of each expert.
        ranks_EC: int64, the rank of each copy, in ascending order.
        locals_EC: int64, its local id there.
    """

    held: tuple[tuple[int, ...], ...]
    num_copies_E: torch.Tensor
    ranks_EC: torch.Tensor
    locals_EC: torch.Tensor

    @classmethod
    def of(cls, held: Sequence[Sequence[int]], num_experts: int, device: torch.device | str = "cpu") -> "ExpertMap":
        """Return the map of ranks that hold these experts; every expert is held, none twice by one rank."""
        copies: list[list[tuple[int, int]]] = [[] for _ in range(num_experts)]
        for rank, experts in enumerate(held):
            assert len(set(experts)) == len(experts), (rank, experts)
            for local, expert in enumerate(experts):
                copies[expert].append((rank, local))
        assert all(copies), [expert for expert, found in enumerate(copies) if not found]
        width = max(map(len, copies))
        # what is beyond an expert's copies is never looked up
        table = torch.tensor([found + found[:1] * (width - len(found)) for found in copies], device=device)
        counts = torch.tensor([len(found) for found in copies], device=device)
        return cls(tuple(map(tuple, held)), counts, table[..., 0], table[..., 1])

    @property
    def num_ranks(self) -> int:
        """Ranks that share the experts."""
        return len(self.held)

    def local_slots(self, slots: Slots, rank: int, first_token: int = 0) -> Slots:
        """Return what one rank computes of all slots: ids count its experts, others' slots are filtered.

        Copies of an expert take turns by token, so that who computes a slot follows from the token's position alone.

        Args:
            slots: of logical experts; a shared expert is one of them.
            rank: whose.
            first_token: position of the first token among all that are dispatched together.
        """
        num_tokens = len(slots.ids_TK)
        logical_TK = slots.ids_TK.to(torch.int64)
        tokens_T1 = torch.arange(first_token, first_token + num_tokens, device=logical_TK.device)[:, None]
        known_TK = logical_TK.clamp(min=0)
        copies_TK = tokens_T1 % self.num_copies_E[known_TK]
        is_mine_TK = (self.ranks_EC[known_TK, copies_TK] == rank) & (logical_TK >= 0)
        ids_TK = torch.where(is_mine_TK, self.locals_EC[known_TK, copies_TK], FILTERED).to(torch.int32)
        # a copy of the shared expert is the last expert of its rank
        shared = range(slots.num_experts - slots.num_shared, slots.num_experts)
        num_shared = sum(expert in shared for expert in self.held[rank][len(self.held[rank]) - slots.num_shared :])
        return Slots(ids_TK, slots.weights_TK, len(self.held[rank]), num_shared, self.num_ranks)


@dataclass(frozen=True, slots=True)
class ExpertShare:
    """What one rank computes of a layer.

    Args:
        experts: of all ranks; a fused shared expert is the last logical one.
        rank: this one.
    """

    experts: ExpertMap
    rank: int

    @property
    def held(self) -> tuple[int, ...]:
        """Logical experts of this rank, in the order of local ids."""
        return self.experts.held[self.rank]

    @property
    def tokens(self) -> slice:
        """Tokens for which this rank computes a shared expert that is none of the grouped ones."""
        return slice(self.rank, None, self.experts.num_ranks)

    def local_slots(self, slots: Slots) -> Slots:
        """Return the slots of this rank; see `ExpertMap.local_slots`."""
        return self.experts.local_slots(slots, self.rank)
