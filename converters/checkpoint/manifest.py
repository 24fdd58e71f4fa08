"""The manifest: provenance and digest of every output tensor. It is written last and marks the folder as finished.

It holds no time, host or path, so that the same job gives the same bytes.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from converters.checkpoint.content_digest import Algorithm, ContentDigest
from converters.checkpoint.header import TensorEntry
from converters.checkpoint.index import SUFFIX
from converters.checkpoint.journal import ShardRecord, TensorRecord
from converters.checkpoint.plan import OutputPlan, Shard, SourceRows, Unit
from converters.checkpoint.reader import CheckpointReader
from converters.checkpoint.writer import write_file
from converters.config import read_json
from converters.errors import InputError, SecurityError
from converters.transforms.rows import RowTransform

MANIFEST_FILE = "glm4moe-manifest.json"
SCHEMA = "glm4moe.manifest/3"
# the form before has sha256 of everything
_READ = frozenset({SCHEMA, "glm4moe.manifest/2"})
DISTRIBUTION_KEY = "distribution"
# a 355B checkpoint cut for 32 ranks has 290 MB
MAX_MANIFEST_BYTES = 384 << 20
_TENSOR_KEYS = frozenset({"file", "dtype", "shape", "source_digest", "transform", "sources"})
# facts about how a transform runs, not about what it does
_NOT_PARAMETERS = frozenset({"name", "working_bytes"})


def transform_json(transform: RowTransform) -> dict[str, Any]:
    """Return a transform as its name and parameters."""
    names = [field.name for field in fields(transform) if field.name not in _NOT_PARAMETERS]  # type: ignore[arg-type]
    return {"name": transform.name, **{name: str(getattr(transform, name)) for name in names}}


def plan_digest(plan: OutputPlan) -> str:
    """Return sha256 over all that decides the output's bytes besides the source's: headers, source rows, transforms."""
    digest, transforms = hashlib.sha256(), dict[RowTransform, list[tuple[str, Any]]]()
    for shard in plan.shards:
        digest.update(shard.file.encode() + shard.header)
        for unit in shard.units:
            if unit.transform not in transforms:
                transforms[unit.transform] = sorted(transform_json(unit.transform).items())
            digest.update(repr((unit.sources, unit.group, transforms[unit.transform])).encode())
    return digest.hexdigest()


def source_digest(reader: CheckpointReader, config: dict[str, Any]) -> str:
    """Return sha256 over a source's headers and config: what it is, without reading its data."""
    own = ((name, *place) for name, place in reader.index.entries.items() if place[0] not in reader.index.elsewhere)
    entries = sorted((name, file, asdict(entry)) for name, file, entry in own)
    return hashlib.sha256(json.dumps([entries, config], sort_keys=True).encode()).hexdigest()


def build_manifest(
    plan: OutputPlan, reader: CheckpointReader, job: dict[str, Any], done: dict[str, ShardRecord], side: dict[str, str]
) -> dict[str, Any]:
    """Return the manifest.

    Args:
        plan: what was done.
        reader: the source, for the places that tensors came from.
        job: the identity of the job.
        done: the record of every shard, by file.
        side: sha256 of the other files, by name.
    """
    if plan.distribution is not None:
        about = {DISTRIBUTION_KEY: plan.distribution.as_json()}
        tensors = plan.distribution.tensors(plan.shards, done)
    else:
        about, tensors = {}, _tensors(plan, reader, done)
    return {
        "schema": SCHEMA,
        "job": job,
        **about,
        "shards": {shard.file: _shard_json(shard) for shard in plan.shards},
        "files": dict(sorted(side.items())),
        "dropped": dict(sorted(plan.dropped.items())),
        "tensors": tensors,
    }


def _shard_json(shard: Shard) -> dict[str, Any]:
    facts = {"bytes": shard.file_bytes}
    return facts if shard.rank is None else {**facts, "rank": shard.rank}


def _tensors(plan: OutputPlan, reader: CheckpointReader, done: dict[str, ShardRecord]) -> dict[str, Any]:
    tensors = {}
    for shard in plan.shards:
        units = {output.name: unit for unit in shard.units for output in unit.outputs}
        for entry in shard.entries:
            record = done[shard.file].tensors[entry.name]
            tensors[entry.name] = {
                **_place(shard, entry),
                **provenance(units[entry.name], reader),
                **record.as_json(),
            }
    return tensors


def _place(shard: Shard, entry: TensorEntry) -> dict[str, Any]:
    return {
        "file": shard.file,
        "offset": entry.begin,
        "bytes": entry.nbytes,
        "dtype": entry.dtype,
        "shape": list(entry.shape),
    }


def provenance(unit: Unit, reader: CheckpointReader) -> dict[str, Any]:
    """Return how a unit's outputs are made: the transform with its parameters, source rows, rows that share a scale."""
    made = {"transform": transform_json(unit.transform), "sources": _places(unit.sources, reader)}
    return {**made, "group": _places(unit.group, reader)} if unit.group else made


def _places(sources: Iterable[SourceRows], reader: CheckpointReader) -> list[dict[str, Any]]:
    return [
        {"file": reader.index.entries[rows.name][0], "offset": reader.entry(rows.name).begin, **rows.as_json()}
        for rows in sources
    ]


def write_manifest(dst: Path, manifest: dict[str, Any]) -> None:
    """Write the manifest, one tensor a line."""
    tensors = manifest["tensors"]
    head = json.dumps({key: value for key, value in manifest.items() if key != "tensors"}, indent=1)
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(value)}" for name, value in tensors.items())
    write_file(dst / MANIFEST_FILE, f'{head[:-2]},\n "tensors": {{\n{lines}\n }}\n}}\n'.encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished folder, or None if there is none.

    A published checkpoint carries its manifest along, so it is input like any other file.

    Raises:
        InputError: it is no manifest. SecurityError: it names a file outside of the folder.
    """
    path = folder / MANIFEST_FILE
    if not path.exists():
        return None
    manifest = read_json(path, MAX_MANIFEST_BYTES)
    if not _is_manifest(manifest):
        form = manifest.get("schema")
        raise InputError(
            str(path),
            expected=f"a manifest of the form {SCHEMA}",
            found=form if isinstance(form, str) and form not in _READ else "something else",
            next_step="Remove it, or the folder, and convert anew.",
        )
    for name in (*manifest["shards"], *manifest["files"]):
        plain_name(name)
    return manifest


def _is_manifest(value: dict[str, Any]) -> bool:
    kinds = ("job", "shards", "files", "tensors")
    if str(value.get("schema")) not in _READ or any(not isinstance(value.get(key), dict) for key in kinds):
        return False
    tensors, shards = value["tensors"].values(), value["shards"].values()
    if not _is_job(value["job"]) or not all(map(_is_shard, shards)):
        return False
    if DISTRIBUTION_KEY in value:
        return isinstance(value[DISTRIBUTION_KEY], dict) and all(map(_is_distributed, tensors))
    return all(
        isinstance(tensor, dict)
        and tensor.keys() >= _TENSOR_KEYS
        and _has_digest(tensor)
        and isinstance(tensor["file"], str)
        and tensor["file"] in value["shards"]
        for tensor in tensors
    )


def _is_job(value: dict[str, Any]) -> bool:
    return {"source", "version"} <= value.keys() and isinstance(value.get("options", {}), dict)


def _is_shard(value: Any) -> bool:
    return isinstance(value, dict) and type(value.get("bytes")) is int


def _is_distributed(value: Any) -> bool:
    """Return whether this is how a tensor that is cut for ranks is recorded."""
    if not isinstance(value, dict) or not isinstance(value.get("dtype"), str):
        return False
    slices = value.get("slices")
    return isinstance(slices, list) and all(
        isinstance(part, dict)
        and isinstance(part.get("ranks"), list)
        and all(type(rank) is int for rank in part["ranks"])
        and _has_digest(part)
        for part in slices
    )


def _has_digest(facts: dict[str, Any]) -> bool:
    return any(isinstance(facts.get(algorithm), str) for algorithm in Algorithm)


def tensor_records(manifest: dict[str, Any]) -> dict[str, dict[str, TensorRecord]]:
    """Return what a manifest records of every file's tensors; of files for ranks, by `rank N` instead of the file.

    Raises:
        InputError: a digest is none.
    """
    records: dict[str, dict[str, TensorRecord]] = {}
    for name, tensor in manifest["tensors"].items():
        if DISTRIBUTION_KEY not in manifest:
            records.setdefault(tensor["file"], {})[name] = tensor_record(name, tensor)
            continue
        for part in tensor["slices"]:
            record = tensor_record(name, part)
            for rank in part["ranks"]:
                records.setdefault(f"rank {rank}", {})[name] = record
    return records


def tensor_record(name: str, facts: Mapping[str, Any]) -> TensorRecord:
    """Return what a manifest records of a tensor, or of a slice, which may say nothing of a source that is its equal.

    Raises:
        InputError: a digest is none.
    """
    try:
        if "source_digest" not in facts:
            facts = {**facts, "source_digest": ContentDigest.from_json(facts).text}
        return TensorRecord.from_json(facts)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{MANIFEST_FILE}: tensor {name}",
            expected="digests in hex",
            found=repr(error),
            next_step="It is damaged; take it from another copy, or make the folder anew.",
        ) from error


def stray_weights(folder: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the names of files of weights in a folder that its manifest does not know."""
    return sorted(path.name for path in folder.glob(f"*{SUFFIX}") if path.name not in manifest["shards"])


def plain_name(name: str) -> str:
    """Return a file name that stays in its folder; odd characters do not take it out, and a source may have them.

    Raises:
        SecurityError: it would not, or it is hidden, as our own state is.
    """
    if name != Path(name).name or name.startswith(".") or "\0" in name:
        raise SecurityError(f"{MANIFEST_FILE}: {name!r}", expected="a plain file name")
    return name
