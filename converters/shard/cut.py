"""What a rank has of each stored tensor: rectangles of the official tensors that it is made of.

Everything follows from the table of tensors: `tp_dim` says along which dim a tensor is cut, its role by how many ranks.
Key-value heads are repeated where there are more ranks than heads; an expert is on the ranks of its ep rank, cut over
their moe_tp ranks; what has no `tp_dim` is on every rank of its stage.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from converters.layout import Layout, Piece, Place, Span, Stored, StoredLayout
from converters.schema import ModelSchema, Role, Tensor, TensorSpec
from converters.shard.mapping import ParallelMapping, Rank, SharedExperts

_KV_ROWS = "kv_size"


@dataclass(frozen=True, slots=True)
class Cut:
    """Slice `index` of `count` equal ones along a dim."""

    dim: int
    index: int
    count: int

    def of(self, span: Span) -> Span:
        """Return the slice of a span."""
        width = (span[1] - span[0]) // self.count
        return span[0] + self.index * width, span[0] + (self.index + 1) * width


@dataclass(frozen=True, slots=True)
class Slice:
    """A part of a stored tensor as a rank has it, and the ranks that have the very same."""

    ranks: tuple[int, ...]
    stored: Stored


class Cutter:
    """Cuts the stored tensors of a layout for the ranks of a mapping whose stages are balanced."""

    def __init__(self, schema: ModelSchema, mapping: ParallelMapping, layout: Layout) -> None:
        self.schema = schema
        self.mapping = mapping
        self.layout = layout
        self._slots = mapping.slots(schema.config.n_routed_experts)
        self._held = [frozenset(slots) for slots in self._slots]
        self._ranks = list(mapping.ranks())
        self._cuts: dict[tuple[str, int], Cut | None] = {}

    def slices(self, whole: Stored) -> list[Slice]:
        """Return the distinct parts of a stored tensor, each with its ranks, in the order of the first of them."""
        tensors = {piece.tensor.spec.name: piece.tensor for piece in whole.elements[0]}.values()
        found: dict[tuple[int | None, tuple[Cut | None, ...]], list[Rank]] = {}
        for stage in self.stages(whole):
            for rank in self._ranks[stage * self.mapping.tp : (stage + 1) * self.mapping.tp]:
                if self._has(whole, rank):
                    cuts = tuple(self.cut(tensor, rank) for tensor in tensors)
                    slots = rank.moe_ep if whole.stack is not None else None
                    found.setdefault((slots, cuts), []).append(rank)
        return [Slice(tuple(rank.index for rank in ranks), self._stored(whole, ranks[0])) for ranks in found.values()]

    def stages(self, whole: Stored) -> tuple[int, ...]:
        """Return the stages that have a stored tensor.

        The MTP layer embeds tokens; where it has no embedding of its own, the last stage has a copy of the first's.
        """
        tensor, last = whole.elements[0][0].tensor, self.mapping.pp - 1
        if tensor.layer is not None:
            return (self.mapping.stage_of(tensor.layer),)
        if tensor.spec.role is not Role.EMBEDDING:
            return (last,)
        needs_copy = self.schema.has_mtp and not self.schema.has_mtp_copies
        return (0, last) if last and needs_copy else (0,)

    def stored(self, whole: Stored, rank: Rank) -> Stored | None:
        """Return what a rank of the right stage has of a stored tensor; None if nothing."""
        return self._stored(whole, rank) if self._has(whole, rank) else None

    def owners(self, whole: Stored) -> tuple[int, ...]:
        """Return the ranks of ep that have anything of a stored tensor."""
        expert = None if whole.stack is not None else whole.elements[0][0].tensor.expert
        return tuple(ep for ep, held in enumerate(self._held) if expert is None or expert in held)

    def _has(self, whole: Stored, rank: Rank) -> bool:
        """Return whether a rank of the right stage has anything of a stored tensor."""
        expert = whole.elements[0][0].tensor.expert
        return expert is None or whole.stack is not None or expert in self._held[rank.moe_ep]

    def _stored(self, whole: Stored, rank: Rank) -> Stored:
        elements = whole.elements
        if whole.stack is not None:
            by_expert = {pieces[0].tensor.expert: pieces for pieces in elements}
            elements = tuple(by_expert[expert] for expert in self._slots[rank.moe_ep])
        stack = None if whole.stack is None else len(elements)
        return Stored(
            whole.name, stack, tuple(tuple(self._cut_piece(piece, rank) for piece in pieces) for pieces in elements)
        )

    def _cut_piece(self, piece: Piece, rank: Rank) -> Piece:
        cut = self.cut(piece.tensor, rank)
        if cut is None or cut.count == 1:
            return piece
        if cut.dim == 0:
            return Piece(piece.tensor, cut.of(piece.rows), piece.columns)
        return Piece(piece.tensor, piece.rows, cut.of(piece.columns))

    def cut(self, tensor: Tensor, rank: Rank) -> Cut | None:
        """Return how an official tensor is cut for a rank that has it; None: not at all."""
        key = tensor.spec.name, rank.index
        if key not in self._cuts:
            self._cuts[key] = self._find_cut(tensor.spec, rank)
        return self._cuts[key]

    def _find_cut(self, spec: TensorSpec, rank: Rank) -> Cut | None:
        """Return how tensors of a row of the table are cut.

        A slot of a fused shared expert lies among the routed experts, so it is cut as they are.
        """
        mapping = self.mapping
        if spec.tp_dim is None:
            return None
        if spec.role is Role.EXPERT or (spec.role is Role.SHARED_EXPERT and self.layout is Layout.FUSED_SHARED):
            return Cut(spec.tp_dim, rank.moe_tp, mapping.moe_tp)
        if spec.role is Role.SHARED_EXPERT and mapping.shared_experts is SharedExperts.REPLICATE:
            return None
        if spec.shape[spec.tp_dim] == _KV_ROWS:
            return self.kv_cut(rank)
        return Cut(spec.tp_dim, rank.tp, mapping.tp)

    def kv_cut(self, rank: Rank) -> Cut:
        """Return which key-value heads a rank has: its share, or the one that its query heads attend with."""
        count = min(self.mapping.tp, self.schema.config.num_key_value_heads)
        return Cut(0, rank.tp * count // self.mapping.tp, count)


def is_mtp(schema: ModelSchema, stored: Stored) -> bool:
    """Return whether a stored tensor belongs to the MTP layer."""
    return stored.layer is not None and stored.layer == schema.mtp_layer


class PlacedLayout(StoredLayout):
    """Stored tensors under names of their own, with the place of every piece of an official tensor.

    Of pieces that lie in several places, as repeated key-value heads do, the first counts.
    """

    def __init__(self, schema: ModelSchema, layout: Layout, stored: dict[str, Stored]) -> None:
        self.schema = schema
        self.layout = layout
        self.stored = stored
        self._places: dict[str, list[Place]] = {}
        seen: set[tuple[str, Span, Span]] = set()
        for place in _places(stored):
            piece = place.piece
            key = piece.tensor.name, piece.rows, piece.columns
            if key not in seen:
                seen.add(key)
                self._places.setdefault(piece.tensor.name, []).append(place)

    def is_tiled(self) -> bool:
        """Return whether the places of every official tensor cover it exactly once."""
        return all(_is_tiled(tensor, self._places.get(tensor.name, [])) for tensor in self.schema.tensors.values())


def _places(stored: dict[str, Stored]) -> Iterator[Place]:
    for tensor in stored.values():
        for index, pieces in enumerate(tensor.elements):
            row = 0
            for piece in pieces:
                yield Place(tensor, index, row, piece)
                row += piece.rows[1] - piece.rows[0]


def _is_tiled(tensor: Tensor, places: list[Place]) -> bool:
    """Return whether rectangles of which all have the same rows, or all the same columns, cover a tensor once."""
    columns = tensor.shape[1] if len(tensor.shape) > 1 else 1
    rows = sorted({place.piece.rows for place in places})
    sides = sorted({place.piece.columns for place in places})
    return len(places) == len(rows) * len(sides) and _is_chain(rows, tensor.shape[0]) and _is_chain(sides, columns)


def _is_chain(spans: list[Span], extent: int) -> bool:
    starts, stops = [span[0] for span in spans], [span[1] for span in spans]
    return bool(spans) and starts == [0, *stops[:-1]] and stops[-1] == extent
