"""Plan shards for ranks, or the whole checkpoint out of shards."""

import sys
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from converters.carried_card import carried_card
from converters.checkpoint.content_digest import Algorithm
from converters.checkpoint.coverage import check_complete
from converters.checkpoint.dtypes import BY_CONFIG_NAME
from converters.checkpoint.packing import DEFAULT_MAX_SHARD_BYTES, pack_shards
from converters.checkpoint.plan import OutputPlan, OutputTensor, Shard, Unit
from converters.conversion import Conversion, passthrough_files
from converters.convert import ConvertOptions, MtpChoice, check_options, generated_files, new_config, passthrough
from converters.layout import Layout, Stored, StoredLayout
from converters.schema import ModelSchema, Role
from converters.shard.alike import AlikeUnits, SliceOutputs
from converters.shard.cut import Cutter, is_mtp
from converters.shard.distribution import ShardDistribution
from converters.shard.limits import check_mapping
from converters.shard.mapping import ParallelMapping
from converters.shard.naming import (
    TENSORRT_KEY,
    VLLM_VERSION,
    PartName,
    ShardLayout,
    check_vllm,
    file_name,
    tensorrt_mapping,
    vllm_constants,
    whole_tensors,
)
from converters.shard.source import ShardedSource
from converters.shard.stages import balance_stages
from converters.shard.units import SliceUnits, has_copies, part_bytes, whole_scale_places
from converters.source import Source
from converters.transforms.dequantize import Constant
from converters.units import dropped_layer

_ENGINES = {
    ShardLayout.RANK: ("a loader that reads its manifest; see docs/shards.md",),
    ShardLayout.TENSORRT_LLM: ("a loader of TensorRT-LLM's rank files that knows these names",),
    ShardLayout.VLLM: (f"vLLM {VLLM_VERSION} with --load-format sharded_state",),
}
# who cuts and merges moves bytes only: SHA-256 takes longer than all else together, and nobody signs a manifest
DIGEST = Algorithm.XXH3


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardOptions:
    """What to cut, and what to change on the way.

    Attributes:
        mapping: the ranks.
        files: what their files are like.
        convert: layout, dtype and MTP layer of what is cut; its max_shard_bytes is that of a rank's files.
        vllm_version: of the engine that is to load it.
    """

    mapping: ParallelMapping
    files: ShardLayout = ShardLayout.RANK
    convert: ConvertOptions = field(default_factory=ConvertOptions)
    vllm_version: str = VLLM_VERSION


def plan_shard(source: Source, options: ShardOptions, command: str = "shard") -> Conversion:
    """Return the conversion into files for each rank, from a whole checkpoint or from one that is cut otherwise.

    Raises:
        UsageError: the model, its format or the engine does not allow this mapping.
    """
    check_options(source, options.convert)
    layout = options.convert.layout or source.layout
    planner = slice_units(source, layout, options.convert)
    schema = source.schema
    if options.convert.mtp is MtpChoice.DROP:
        schema = replace(schema, has_mtp=False, has_mtp_copies=False)
    wholes = whole_tensors(schema, planner.target, options.files)
    check_mapping(planner, wholes.values(), options.mapping, layout)
    if options.files is ShardLayout.VLLM:
        dtypes = {part.dtype for whole in wholes.values() for part in planner.parts(whole) if len(whole.shape) > 1}
        check_vllm(schema, options.mapping, options.vllm_version, dtypes)
    mapping = balance(planner, schema, options.mapping)
    cutter = Cutter(schema, mapping, layout)
    shards = _Packer(cutter, planner, options).shards(wholes)
    distribution = ShardDistribution(cutter, options.files, wholes, planner)
    dropped, digest = {**planner.dropped, **_dropped(source, schema)}, options.convert.digest or DIGEST
    plan = OutputPlan(tuple(shards), dropped, distribution, digest)
    if not isinstance(source, ShardedSource):
        check_complete(plan, map(source.reader.entry, source.reader.names))
    convert, target = options.convert, planner.target
    config, generated = new_config(source, target, convert), generated_files(source, target, convert, is_cut=True)
    if options.files is ShardLayout.TENSORRT_LLM:
        config = {**config, TENSORRT_KEY: tensorrt_mapping(mapping)}
    return Conversion(
        source,
        plan,
        config,
        tuple(name for name in passthrough(source, options.convert) if name not in generated),
        command,
        {**_options_json(options, mapping, layout), "digest": str(digest)},
        generated=generated,
        notes=_notes(options),
        engines=_ENGINES[options.files],
    )


def plan_merge(
    source: ShardedSource, max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES, digest: Algorithm = DIGEST
) -> Conversion:
    """Return the conversion of a sharded checkpoint into the one that it was cut from.

    Args:
        source: the shards.
        max_shard_bytes: of the result.
        digest: by which its manifest knows what is written.
    Raises:
        UsageError: ranks that should have the same scales have others.
    """
    planner = slice_units(source, source.tensor_layout, ConvertOptions())
    alike = AlikeUnits(planner, lambda stored: [((), list(planner.units(stored)))], lambda _: None)
    units = [unit for stored in planner.target.stored.values() for own in alike.of(stored) for unit in own.units]
    plan = OutputPlan(pack_shards(units, max_shard_bytes), digest=digest)
    generated = carried_card(source, source.tensor_layout) if source.is_quantized else {}
    files = tuple(name for name in passthrough_files(source.folder) if name not in generated)
    options = {"max_shard_bytes": max_shard_bytes, "digest": str(digest)}
    return Conversion(source, plan, source.raw_config, files, "merge", options, generated=generated)


def slice_units(source: Source, layout: Layout, options: ConvertOptions) -> SliceUnits:
    """Return what makes the units of slices of a source."""
    places = source.scale_places if isinstance(source, ShardedSource) else whole_scale_places(source)
    dtype = BY_CONFIG_NAME[options.dtype] if options.dtype else None
    return SliceUnits(source, whole_layout(source, layout), dtype, options.dequantize, scale_places=places)


def whole_layout(source: Source, layout: Layout) -> StoredLayout:
    """Return the uncut tensors of a source in a layout."""
    is_own = layout is source.layout and not isinstance(source, ShardedSource)
    return source.stored_layout if is_own else StoredLayout(source.schema, layout)


def balance(planner: SliceUnits, schema: ModelSchema, mapping: ParallelMapping) -> ParallelMapping:
    """Return the mapping with its stages, balanced by the bytes of a rank: embedding, head and MTP layer count."""
    layers = schema.config.num_hidden_layers
    if mapping.pp == 1:
        return mapping.balanced((layers,))
    flat = Cutter(schema, replace(mapping, pp=1, stages=(layers,)), planner.target.layout)
    sizes, first, last = [0] * layers, 0, 0
    needs_copy = schema.has_mtp and not schema.has_mtp_copies
    for whole in planner.target.stored.values():
        if is_mtp(planner.target.schema, whole) and not schema.has_mtp:
            continue
        own = flat.stored(whole, flat.mapping.rank(0))
        nbytes = sum(part_bytes(own, part) for part in planner.parts(whole)) if own else 0
        if whole.layer is not None and whole.layer < layers:
            sizes[whole.layer] += nbytes
        elif whole.elements[0][0].tensor.spec.role is Role.EMBEDDING:
            first += nbytes
            last += nbytes * needs_copy
        else:
            last += nbytes
    return mapping.balanced(balance_stages(sizes, first, last, mapping.pp))


def _notes(options: ShardOptions) -> tuple[str, ...]:
    """Return what was not seen to work, though nothing speaks against it."""
    mapping = options.mapping
    if options.files is not ShardLayout.VLLM or (mapping.ep == 1 and mapping.pp == 1):
        return ()
    return (
        f"vLLM {VLLM_VERSION} finds every parameter of such shards; tokens were compared for tensor parallelism alone.",
    )


def _dropped(source: Source, schema: ModelSchema) -> dict[str, str]:
    """Return the source tensors of an MTP layer that the result does not have."""
    layer = source.schema.mtp_layer
    return dropped_layer(source, layer, "--mtp drop") if layer is not None and not schema.has_mtp else {}


def _options_json(options: ShardOptions, mapping: ParallelMapping, layout: Layout) -> dict[str, Any]:
    convert = options.convert
    return {
        "files": str(options.files),
        "layout": str(layout),
        "mapping": mapping.as_json(),
        "dtype": convert.dtype,
        "dequantize": convert.dequantize,
        "mtp": str(convert.mtp),
        "max_shard_bytes": convert.max_shard_bytes,
    }


# what is written of one tensor by tp rank
_Row = dict[int, SliceOutputs]


@dataclass(frozen=True, slots=True)
class _Packer:
    """Distributes units over the files of the ranks.

    The files of a stage are cut at the same tensors and written together, so that what several ranks need of a tensor
    is read once.
    """

    cutter: Cutter
    planner: SliceUnits
    options: ShardOptions

    def shards(self, wholes: Mapping[str, Stored]) -> list[Shard]:
        """Return the files in the order of writing."""
        mapping, schema = self.cutter.mapping, self.cutter.schema
        rows: dict[tuple[int, bool], list[_Row]] = {}
        alike = AlikeUnits(self.planner, self._slices, self._kind)
        for whole in wholes.values():
            is_embedding = whole.elements[0][0].tensor.spec.role is Role.EMBEDDING
            for stage, row in self._rows(alike.of(whole)).items():
                # vLLM refuses parameters that a stage does not have, the MTP layer's and its copy of the embedding too
                is_for_mtp = is_mtp(schema, whole) or (is_embedding and stage > 0)
                rows.setdefault((stage, self.options.files is ShardLayout.VLLM and is_for_mtp), []).append(row)
        for stage, constant in self._constants():
            rows[stage, False].append(dict.fromkeys(range(mapping.tp), constant))
        found: list[Shard] = []
        for (stage, apart), own_rows in sorted(rows.items(), key=itemgetter(0)):
            found += self._files(stage, own_rows, len(found), apart=apart)
        return found

    def _slices(self, whole: Stored) -> list[tuple[tuple[int, ...], list[Unit]]]:
        """Return the units of each slice of a tensor, with its ranks; ranks that have the same slice share them."""
        slices = self.cutter.slices(whole)
        shares = has_copies(whole, [own.stored for own in slices]) or any(len(own.ranks) > 1 for own in slices)
        make = self.planner.shared_units if shares else self.planner.units
        return [(own.ranks, list(make(own.stored))) for own in slices]

    def _kind(self, whole: Stored) -> Hashable:
        return self.cutter.owners(whole), self.cutter.stages(whole)

    def _rows(self, slices: Iterable[SliceOutputs]) -> dict[int, _Row]:
        """Return the slices of one tensor by stage and tp rank."""
        rows: dict[int, _Row] = {}
        for own in slices:
            for rank in own.ranks:
                stage, tp = divmod(rank, self.cutter.mapping.tp)
                rows.setdefault(stage, {})[tp] = own
        return rows

    def _constants(self) -> Iterator[tuple[int, SliceOutputs]]:
        """Yield the constants that an engine asks for, with their stage."""
        if self.options.files is ShardLayout.VLLM:
            for name, layer in vllm_constants(self.cutter.schema).items():
                unit = Unit((OutputTensor(name, "F32", ()),), (), Constant((1,), "F32"))
                yield self.cutter.mapping.stage_of(layer), SliceOutputs((), [unit], unit.nbytes)

    def _files(self, stage: int, rows: Iterable[_Row], first_batch: int, *, apart: bool) -> Iterator[Shard]:
        """Yield the files of a stage, batch by batch; a rank that has nothing of a batch has no file of it."""
        mapping, limit = self.cutter.mapping, self.options.convert.max_shard_bytes
        if self.options.files is ShardLayout.TENSORRT_LLM:
            limit = sys.maxsize
        groups: list[dict[int, list[Unit]]] = [{}]
        sizes: Counter[int] = Counter()
        for row in rows:
            added = Counter({tp: own.nbytes for tp, own in row.items()})
            if groups[-1] and any(sizes[tp] + nbytes > limit for tp, nbytes in added.items()):
                groups.append({})
                sizes = Counter()
            for tp, own in row.items():
                groups[-1].setdefault(tp, []).extend(own.units)
            sizes += added
        parts = Counter(tp for group in groups for tp in group)
        written: Counter[int] = Counter()
        for number, group in enumerate(groups):
            for tp, units in sorted(group.items()):
                rank = mapping.rank(stage * mapping.tp + tp)
                name = PartName(rank, written[tp], parts[tp], apart)
                written[tp] += 1
                file = file_name(self.options.files, mapping, name)
                yield Shard(file, tuple(units), rank.index, first_batch + number)
