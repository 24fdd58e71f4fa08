"""A sharded checkpoint as a source: every tensor of every rank, and where each official tensor lies among them."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.checkpoint.disk_read import read_file
from converters.checkpoint.header import TensorEntry, read_header
from converters.checkpoint.index import CheckpointIndex, checked_path
from converters.checkpoint.manifest import DISTRIBUTION_KEY, MANIFEST_FILE, read_manifest, stray_weights
from converters.config import CONFIG_FILE, Glm4MoeConfig, read_json
from converters.errors import InputError, UsageError
from converters.formats.declared import declared_schemes, read_quantization
from converters.layout import Layout, Stored, StoredLayout, is_cache_scale
from converters.schema import COMPANIONS, ModelSchema, parse
from converters.shard.cut import Cutter, PlacedLayout
from converters.shard.distribution import SCHEMA
from converters.shard.mapping import ParallelMapping
from converters.shard.naming import TENSORRT_KEY, ShardLayout, vllm_constants, whole_tensors
from converters.shard.proved import ProvedReader, slice_digests
from converters.shard.units import ScalePlace
from converters.source import Source, StoredWeight, weight_format


@dataclass(frozen=True)
class ShardedSource(Source):
    """An open sharded checkpoint. Names of its tensors begin with the rank: `3/lm_head.weight`.

    Attributes:
        mapping: how it is cut.
        files: what its files are like.
        scale_places: of each scale of the KV cache by its official name.
    """

    mapping: ParallelMapping
    files: ShardLayout
    scale_places: dict[str, tuple[ScalePlace, ...]]

    def __enter__(self) -> "ShardedSource":
        return self

    @property
    def tensor_layout(self) -> Layout:
        """The layout that it was cut from."""
        return self.stored_layout.layout


def is_sharded(folder: Path) -> bool:
    """Return whether a folder is a finished sharded checkpoint."""
    manifest = read_manifest(folder)
    return manifest is not None and DISTRIBUTION_KEY in manifest


def open_sharded(folder: Path) -> ShardedSource:
    """Open a sharded checkpoint and hold its files against its manifest and its config.

    Raises:
        UsageError: it is not one, or not finished.
        InputError: a file or tensor is missing, additional, or not as the mapping has it. Whoever reads its tensors
        meets those that are not what was written; see `ProvedReader`.
    """
    manifest = read_manifest(folder)
    if manifest is None or DISTRIBUTION_KEY not in manifest:
        raise UsageError(
            f"SRC {folder}",
            expected=f"a sharded checkpoint, with its {MANIFEST_FILE}",
            found="none, or one that is still being written",
        )
    raw = read_json(folder / CONFIG_FILE)
    facts = _Facts.read(manifest[DISTRIBUTION_KEY], Glm4MoeConfig.from_hf(raw))
    if facts.files is ShardLayout.TENSORRT_LLM:
        raw = {key: value for key, value in raw.items() if key != TENSORRT_KEY}
    return _build(folder, raw, facts, manifest)


@dataclass(frozen=True)
class _Facts:
    """What a manifest says about a distribution."""

    schema: ModelSchema
    mapping: ParallelMapping
    files: ShardLayout
    layout: Layout

    @classmethod
    def read(cls, about: dict[str, Any], config: Glm4MoeConfig) -> "_Facts":
        """Read what `ShardDistribution.as_json` wrote."""
        try:
            if about["schema"] != SCHEMA:
                raise ValueError(about["schema"])
            mtp = bool(about["mtp"]["has_layer"]), bool(about["mtp"]["has_copies"])
            schema = ModelSchema(config, *mtp, bool(about["has_router_bias"]))
            layout, files = Layout(about["tensor_layout"]), ShardLayout(about["layout"])
            mapping = ParallelMapping.from_json(about["mapping"])
            if len(mapping.stages) != mapping.pp or sum(mapping.stages) != config.num_hidden_layers:
                raise ValueError(mapping.stages)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{MANIFEST_FILE}: {DISTRIBUTION_KEY}", expected=f"a block of the form {SCHEMA}", found=repr(error)
            ) from error
        return cls(schema, mapping, files, layout)


def _build(folder: Path, raw: dict[str, Any], facts: _Facts, manifest: dict[str, Any]) -> ShardedSource:
    quantization = read_quantization(raw, folder)
    schemes = declared_schemes(quantization)
    by_rank, index = _read_headers(folder, manifest["shards"])
    index = replace(index, notes=_notes(folder, manifest))
    cutter = Cutter(facts.schema, facts.mapping, facts.layout)
    wholes = whole_tensors(facts.schema, StoredLayout(facts.schema, facts.layout), facts.files)
    stored: dict[str, Stored] = {}
    weights: dict[str, StoredWeight] = {}
    constants = vllm_constants(facts.schema) if facts.files is ShardLayout.VLLM else {}
    grouped = {rank: _group(own, wholes, constants) for rank, own in by_rank.items()}
    for whole in wholes.values():
        for part in cutter.slices(whole):
            for rank in part.ranks:
                scoped = replace(part.stored, name=f"{rank}/{whole.name}")
                parts = grouped.get(rank, {}).pop(whole.name, {})
                if not parts:
                    raise _not_there(f"{scoped.name}")
                stored[scoped.name] = scoped
                weights[scoped.name] = StoredWeight(scoped, weight_format(scoped, parts, schemes), parts)
    extra = [f"{rank}/{name}" for rank, own in grouped.items() for name in own]
    if extra:
        raise InputError(f"tensor {extra[0]}", expected="none that the mapping does not have", found=f"{len(extra)}")
    layout = PlacedLayout(facts.schema, facts.layout, stored)
    if not layout.is_tiled():
        raise InputError(f"{MANIFEST_FILE}: {DISTRIBUTION_KEY}", expected="every row of every tensor", found="a gap")
    scales = _scale_places(by_rank, cutter)
    owners = {name: facts.schema.locate(name).name for name in scales}
    reader = ProvedReader(index, slice_digests(manifest["tensors"]))
    config = facts.schema.config
    return ShardedSource(
        folder, raw, config, layout, reader, quantization, weights, owners, facts.mapping, facts.files, scales
    )


def _read_headers(folder: Path, shards: dict[str, Any]) -> tuple[dict[int, dict[str, TensorEntry]], CheckpointIndex]:
    """Return the entries of every rank by name, under their scoped names, and the index of them all."""
    by_rank: dict[int, dict[str, TensorEntry]] = {}
    entries: dict[str, tuple[str, TensorEntry]] = {}
    for file, facts in shards.items():
        rank = facts.get("rank")
        path = checked_path(folder, file)
        if type(rank) is not int or path.stat().st_size != facts["bytes"]:
            raise InputError(str(path), expected=f"{facts['bytes']} bytes of a rank", found="another file")
        for entry in read_header(path):
            scoped = replace(entry, name=f"{rank}/{entry.name}")
            if scoped.name in entries:
                raise InputError(f"tensor {scoped.name}", expected="one file", found="two")
            by_rank.setdefault(rank, {})[entry.name] = scoped
            entries[scoped.name] = file, scoped
    return by_rank, CheckpointIndex(folder, entries, tuple(shards))


def _notes(folder: Path, manifest: dict[str, Any]) -> tuple[str, ...]:
    """Return what is not as it was written although nothing of it is needed to join the tensors."""
    notes = []
    for name, digest in sorted(manifest["files"].items()):
        if not (folder / name).exists():
            notes.append(f"{name}, which {MANIFEST_FILE} has, is missing.")
        elif _sha256(folder / name) != digest:
            notes.append(f"{name} is not the file that {MANIFEST_FILE} has; what is there is taken.")
    strays = stray_weights(folder, manifest)
    return (*notes, *(f"{name} is not in {MANIFEST_FILE}; it is left out." for name in strays))


def _sha256(path: Path) -> str:
    """Return the digest of a file; none of one that cannot be read."""
    try:
        return hashlib.sha256(read_file(path)).hexdigest()
    except (OSError, InputError):
        return ""


def _group(
    entries: dict[str, TensorEntry], wholes: dict[str, Stored], constants: dict[str, int]
) -> dict[str, dict[str, TensorEntry]]:
    """Return the parts of a rank's tensors by suffix; scales of the cache and constants belong to none."""
    found: dict[str, dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        if name not in constants and not is_cache_scale(name):
            owner, suffix = next(_owners(name, wholes), (name, ""))
            found.setdefault(owner, {})[suffix] = entry
    return found


def _owners(name: str, wholes: dict[str, Stored]) -> Iterator[tuple[str, str]]:
    if name in wholes:
        yield name, ""
    module, _, last = name.rpartition(".")
    for suffix in (last,) if last in COMPANIONS else COMPANIONS:
        for owner in (f"{module}.weight", name.removesuffix(f"_{suffix.removeprefix('weight_')}")):
            if owner in wholes and wholes[owner].part(suffix) == name:
                yield owner, suffix


def _scale_places(by_rank: dict[int, dict[str, TensorEntry]], cutter: Cutter) -> dict[str, tuple[ScalePlace, ...]]:
    """Return where the scales of the KV cache lie; of ranks that have the same ones, the first counts."""
    found: dict[str, dict[tuple[int, int] | None, str]] = {}
    heads = cutter.schema.config.num_key_value_heads
    for rank, entries in sorted(by_rank.items()):
        for name, entry in entries.items():
            if is_cache_scale(name):
                parse(name)
                span = cutter.kv_cut(cutter.mapping.rank(rank)).of((0, heads)) if len(entry.shape) > 1 else None
                found.setdefault(name, {}).setdefault(span, entry.name)
    return {name: tuple((place, span) for span, place in places.items()) for name, places in found.items()}


def _not_there(name: str) -> InputError:
    return InputError(
        f"tensor {name}",
        expected="in the files of its rank, as the mapping has it",
        found="none",
        next_step="The sharded checkpoint is incomplete, or its manifest is another one's.",
    )
