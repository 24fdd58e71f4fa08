"""Which rank computes a slot: experts that are dealt to ranks, some of them more than once.

The router knows logical experts. A rank holds physical ones: copies of logical experts, numbered by its own slots.

Shapes: T tokens, K choices per token, E logical experts, C copies of the most copied one.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.moe.dispatcher import Slots
from runtime.moe.layouts import FILTERED
from runtime.moe.workspace import Workspace


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
        return cls(tuple(map(tuple, held)), counts, table[..., 0].contiguous(), table[..., 1].contiguous())

    @property
    def num_ranks(self) -> int:
        """Ranks that share the experts."""
        return len(self.held)

    def local_slots(self, slots: Slots, rank: int, first_token: int = 0, workspace: Workspace | None = None) -> Slots:
        """Return what one rank computes of all slots: ids count its experts, others' slots are filtered.

        Copies of an expert take turns by token, so that who computes a slot follows from the token's position alone.

        Args:
            slots: of logical experts; a shared expert is one of them.
            rank: whose.
            first_token: position of the first token among all that are dispatched together.
            workspace: holds the ids, until those of the next layer are made; None: a new tensor.
        """
        buffers, shape = workspace or Workspace(slots.ids_TK.device), tuple(slots.ids_TK.shape)
        known_TK, copies_TK, ranks_TK, local_TK = (
            buffers.take(name, shape, torch.int64) for name in ("known_ids", "copies", "ranks", "local_numbers")
        )
        known_S = known_TK.copy_(slots.ids_TK).clamp_(min=0).view(-1)
        torch.index_select(self.num_copies_E, 0, known_S, out=copies_TK.view(-1))
        tokens_T = buffers.take("token_numbers", shape[:1], torch.int64)
        tokens_T1 = torch.arange(first_token, first_token + shape[0], out=tokens_T)[:, None]
        torch.remainder(tokens_T1, copies_TK, out=copies_TK)
        places_S = copies_TK.add_(known_TK, alpha=self.ranks_EC.shape[1]).view(-1)
        torch.index_select(self.ranks_EC.view(-1), 0, places_S, out=ranks_TK.view(-1))
        torch.index_select(self.locals_EC.view(-1), 0, places_S, out=local_TK.view(-1))
        is_absent_TK, is_filtered_TK = (buffers.take(name, shape, torch.bool) for name in ("absent", "filtered"))
        torch.ne(ranks_TK, rank, out=is_absent_TK).logical_or_(torch.lt(slots.ids_TK, 0, out=is_filtered_TK))
        ids_TK = buffers.take("local_ids", shape, torch.int32).copy_(local_TK.masked_fill_(is_absent_TK, FILTERED))
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

    def local_slots(self, slots: Slots, workspace: Workspace | None = None) -> Slots:
        """Return the slots of this rank; see `ExpertMap.local_slots`."""
        return self.experts.local_slots(slots, self.rank, workspace=workspace)
