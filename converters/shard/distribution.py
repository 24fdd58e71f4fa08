"""What the manifest records of tensors that are cut for ranks: the mapping, and of each tensor its slices.

`slices` of a tensor: the ranks that have it, rows [start, stop) of the uncut tensor seen as a matrix (all dims but the
last are rows; none said: all), columns alike, and xxh3 (128 bits) of the bytes. `source_digest` stands where the slice
is not what was read for it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.checkpoint.journal import ShardRecord, TensorRecord
from converters.checkpoint.plan import Shard
from converters.formats.weights import WHOLE, Part, Use, cells
from converters.layout import Layout, Piece, Stored
from converters.shard.cut import Cutter, Slice
from converters.shard.mapping import Rank, SharedExperts
from converters.shard.naming import VLLM_VERSION, ShardLayout
from converters.shard.units import SliceUnits, grained, part_shape

SCHEMA = "glm4moe.shards/1"


@dataclass(frozen=True)
class ShardDistribution:
    """Tensors cut for the ranks of a mapping.

    Attributes:
        wholes: the uncut tensors by the name that they have in the files.
    """

    cutter: Cutter
    files: ShardLayout
    wholes: Mapping[str, Stored]
    planner: SliceUnits

    def as_json(self) -> dict[str, Any]:
        """Return the mapping and how to read the slices."""
        schema, mapping = self.cutter.schema, self.cutter.mapping
        slots = mapping.slots(schema.config.n_routed_experts)
        about: dict[str, Any] = {"schema": SCHEMA, "layout": str(self.files)}
        if self.files is ShardLayout.VLLM:
            about["vllm"] = VLLM_VERSION
        return {
            **about,
            "tensor_layout": str(self.cutter.layout),
            "mtp": {"has_layer": schema.has_mtp, "has_copies": schema.has_mtp_copies},
            "has_router_bias": schema.has_router_bias,
            "mapping": mapping.as_json(),
            "shared_expert_output": self._shared_output(),
            "ranks": [self._rank_json(rank) for rank in mapping.ranks()],
            "experts_of_moe_ep": slots,
        }

    def _shared_output(self) -> dict[str, Any]:
        """Return how often the shared expert's output is there, so that no loader adds it twice."""
        mapping = self.cutter.mapping
        if self.cutter.layout is Layout.FUSED_SHARED:
            rule = "a slot is on every rank of moe_ep, cut over moe_tp: add the outputs of one rank of moe_ep"
            return {"copies": mapping.ep, "rule": rule}
        if mapping.shared_experts is SharedExperts.SPLIT:
            return {"copies": 1, "rule": "each rank of tp has a slice: add the outputs of all"}
        return {"copies": mapping.tp, "rule": "each rank of tp has all of it: add the output of one"}

    def _rank_json(self, rank: Rank) -> dict[str, Any]:
        mapping = self.cutter.mapping
        if self.cutter.layout is Layout.FUSED_SHARED:
            adds = rank.moe_ep == 0
        else:
            adds = mapping.shared_experts is SharedExperts.SPLIT or rank.tp == 0
        first = sum(mapping.stages[: rank.stage])
        return {
            "rank": rank.index,
            "pp": rank.stage,
            "tp": rank.tp,
            "moe_tp": rank.moe_tp,
            "moe_ep": rank.moe_ep,
            "layers": [first, first + mapping.stages[rank.stage]],
            "adds_shared_expert": adds,
        }

    def tensors(self, shards: Sequence[Shard], done: Mapping[str, ShardRecord]) -> dict[str, Any]:
        """Return every tensor with its slices."""
        records: dict[int, dict[str, TensorRecord]] = {}
        for shard in shards:
            assert shard.rank is not None, shard.file
            records.setdefault(shard.rank, {}).update(done[shard.file].tensors)
        entries = {entry.name: entry.dtype for shard in shards for entry in shard.entries}
        found: dict[str, Any] = {}
        for whole in self.wholes.values():
            slices = self.cutter.slices(whole)
            for part in self.planner.parts(whole):
                found[whole.part(part.suffix)] = self._part(whole, part, slices, records)
        for name in entries.keys() - found.keys():
            # what belongs to no weight: scales of the cache, constants of an engine
            found[name] = {"dtype": entries[name], "slices": _by_digest(name, records)}
        return dict(sorted(found.items()))

    def _part(
        self, whole: Stored, part: Part, slices: Sequence[Slice], records: Mapping[int, Mapping[str, TensorRecord]]
    ) -> dict[str, Any]:
        name, rows = whole.part(part.suffix), []
        for own in slices:
            record = records[own.ranks[0]][name]
            facts: dict[str, Any] = {"ranks": list(own.ranks), **_place(whole, own.stored, part)}
            rows.append({**facts, **_digests(record)})
        return {"dtype": part.dtype, "shape": list(part_shape(whole, part)), "slices": rows}


def _digests(record: TensorRecord) -> dict[str, str]:
    facts = record.content.as_json()
    return facts if record.source == record.content else {**facts, "source_digest": record.source.text}


def _by_digest(name: str, records: Mapping[int, Mapping[str, TensorRecord]]) -> list[dict[str, Any]]:
    by_record: dict[TensorRecord, list[int]] = {}
    for rank, own in records.items():
        if name in own:
            by_record.setdefault(own[name], []).append(rank)
    return [{"ranks": ranks, **_digests(record)} for record, ranks in by_record.items()]


def _place(whole: Stored, own: Stored, part: Part) -> dict[str, Any]:
    """Return which rows and columns of the uncut part a slice is, as far as it is not all of them."""
    if part.use is Use.SHAPE:
        return {}
    tops = _tops(whole)
    spans, columns = [], (0, whole.columns)
    for piece in (piece for pieces in own.elements for piece in pieces):
        top, first = tops[piece.tensor.name]
        spans.append((top + piece.rows[0] - first.rows[0], top + piece.rows[1] - first.rows[0]))
        columns = piece.columns[0] - first.columns[0], piece.columns[1] - first.columns[0]
    found: dict[str, Any] = {}
    rows = grained(spans, whole.rows, part.grain[0])
    if rows != [(0, (whole.stack or 1) * cells(whole.rows, part.grain[0]))]:
        found["rows"] = [list(span) for span in rows]
    if part.grain[1] != WHOLE and columns != (0, whole.columns):
        found["columns"] = list(grained([columns], whole.columns, part.grain[1])[0])
    return found


def _tops(whole: Stored) -> dict[str, tuple[int, Piece]]:
    """Return the first row of each official tensor in an uncut one, and the piece of it that lies there."""
    tops, row = {}, 0
    for piece in (piece for pieces in whole.elements for piece in pieces):
        tops[piece.tensor.name] = row, piece
        row += piece.rows[1] - piece.rows[0]
    return tops
