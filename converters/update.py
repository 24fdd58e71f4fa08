"""Redo a finished folder under another policy: only the tensors that the change touches are made again.

The new result is built in `DST/.glm4moe/update/` as any other, while DST stays as it is. A tensor that the old manifest
records as made by the same transform from the same rows, with the same bytes, is copied from DST and proved by its
digest; a whole shard that would come out the same is linked. When the new result is finished, and only then, it takes
the place of the old one: a marker is written, and from there on every run first completes the exchange. Before that
moment a failed or killed update costs nothing.

Disk: old and new result together, until the exchange; linked shards count once.
"""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint.content_digest import Algorithm, new_hasher
from converters.checkpoint.header import read_header
from converters.checkpoint.index import INDEX_FILE, CheckpointIndex
from converters.checkpoint.journal import JOB_FILE, STATE_FOLDER, SWAP_FILE, ShardRecord, TensorRecord
from converters.checkpoint.manifest import MANIFEST_FILE, plain_name, provenance, read_manifest, tensor_record
from converters.checkpoint.plan import Shard, Unit
from converters.checkpoint.reader import CheckpointReader
from converters.checkpoint.writer import disk_errors, link_durably, sync_folder, write_json
from converters.config import CONFIG_FILE, read_json
from converters.errors import InputError, UsageError
from converters.pipeline import RunOptions
from converters.prove import Proof, shard_is_proved, source_digest_of

UPDATE_FOLDER = "update"


def check_update(dst: Path, job: dict[str, Any]) -> None:
    """Refuse an update of nothing, or of a result made from another source.

    Raises:
        UsageError: with the folder's name.
    """
    manifest = read_manifest(dst)
    if manifest is None:
        raise UsageError(
            f"--update: DST {dst}", expected="a finished result", found="none", next_step="Run without --update."
        )
    if manifest["job"]["source"] != job["source"]:
        raise UsageError(f"--update: DST {dst}", expected="a result made from this SRC", found="one of another source")


def result_bytes(dst: Path) -> int:
    """Return the size of the weights of a finished result, 0 if there is none."""
    manifest = read_manifest(dst)
    return sum(facts["bytes"] for facts in manifest["shards"].values()) if manifest else 0


def prepare_update(state: Path, job: dict[str, Any]) -> Path:
    """Return the folder to build in, emptied if an update to something else was begun there."""
    inner = state / UPDATE_FOLDER
    recorded = inner / STATE_FOLDER / JOB_FILE
    is_ours = recorded.exists() and json.loads(recorded.read_bytes()) == job
    manifest = read_manifest(inner)
    if inner.exists() and not is_ours and (manifest is None or manifest["job"] != job):
        shutil.rmtree(inner)
    return inner


def exchange(dst: Path, state: Path) -> None:
    """Put the finished new result in the place of the old one."""
    old = read_manifest(dst)
    assert old is not None, dst
    with disk_errors(dst):
        write_json(state / SWAP_FILE, {"old": [*old["shards"], *old["files"]]})
    complete_exchange(dst, state)


def complete_exchange(dst: Path, state: Path) -> None:
    """Go on with an exchange that was begun; nothing if none was. Killed anywhere, it is gone on with again.

    While a new file still stands in the update folder, the file of that name in DST is the old one.
    """
    if not (state / SWAP_FILE).exists():
        return
    inner = state / UPDATE_FOLDER
    with disk_errors(dst):
        # what loaders look for goes first and comes back last
        last = [name for name in (INDEX_FILE, CONFIG_FILE, MANIFEST_FILE) if (inner / name).exists()]
        for name in reversed(last):
            (dst / name).unlink(missing_ok=True)
        sync_folder(dst)
        new = sorted(path.name for path in inner.iterdir() if path.is_file()) if inner.exists() else []
        for name in [*(name for name in new if name not in last), *last]:
            os.replace(inner / name, dst / name)
        manifest = read_manifest(dst)
        assert manifest is not None, dst
        for name in read_json(state / SWAP_FILE)["old"]:
            if name not in manifest["shards"] and name not in manifest["files"]:
                (dst / plain_name(name)).unlink(missing_ok=True)
        sync_folder(dst)
        shutil.rmtree(inner, ignore_errors=True)
        (state / SWAP_FILE).unlink()


@dataclass(frozen=True)
class Previous:
    """The old result: its manifest's tensors, and a reader over its shards. Close it when the new one is written.

    `block_bytes`: the most that a thread reads at once.
    """

    folder: Path
    tensors: dict[str, dict[str, Any]]
    shards: dict[str, dict[str, Any]]
    reader: CheckpointReader
    source: CheckpointReader
    block_bytes: int

    @classmethod
    def open(cls, dst: Path, job: Mapping[str, Any], source: CheckpointReader, options: RunOptions) -> "Previous":
        """Return the old result; it is not reused if another version made it, whose transforms may differ.

        Nor if it has other digests than the new one is to have.
        """
        manifest = read_manifest(dst)
        assert manifest is not None, dst
        old = manifest["job"]
        # quantize knows no other
        own, others = (known.get("options", {}).get("digest", Algorithm.SHA256) for known in (job, old))
        reusable = old["version"] == job["version"] and own == others
        shards = {name: facts for name, facts in manifest["shards"].items() if reusable and (dst / name).is_file()}
        entries = {entry.name: (file, entry) for file in shards for entry in read_header(dst / file)}
        reader = CheckpointReader(CheckpointIndex(dst, entries, tuple(shards)))
        tensors = manifest["tensors"] if reusable else {}
        return cls(dst, tensors, shards, reader, source, options.copy_block_bytes)

    def close(self) -> None:
        """Close its files."""
        self.reader.close()

    def records(self, unit: Unit) -> dict[str, TensorRecord] | None:
        """Return what is recorded of a unit's outputs, if every one was made in the same way; None if one was not."""
        made = json.loads(json.dumps(provenance(unit, self.source)))
        records = {}
        for output in unit.outputs:
            old = self.tensors.get(output.name)
            if old is None or any(old[key] != value for key, value in made.items()):
                return None
            if (old["dtype"], old["shape"]) != (output.dtype, list(output.shape)):
                return None
            records[output.name] = tensor_record(output.name, old)
        return records

    def link_back(self, shard: Shard, dst: Path) -> ShardRecord | None:
        """Give a shard that would come out the same its place again, proved by content; None if it would not.

        Raises:
            InputError: the source changed since the old result was made.
        """
        if shard.file not in self.shards:
            return None
        by_unit = [self.records(unit) for unit in shard.units]
        made_alike = [own for own in by_unit if own is not None]
        if len(made_alike) < len(by_unit):
            return None
        records = {name: record for own in made_alike for name, record in own.items()}
        record = ShardRecord(shard.file, shard.file_bytes, {e.name: records[e.name] for e in shard.entries})
        if not shard_is_proved(self.folder, shard, record, Proof(self.block_bytes)):
            return None
        for unit, own in zip(shard.units, made_alike, strict=True):
            self._check_source(unit, own)
        return record if link_durably(self.folder / shard.file, dst / shard.file) else None

    def copy(
        self, unit: Unit, write: Callable[[str, int, memoryview], None], step: Callable[[int], None]
    ) -> dict[str, TensorRecord] | None:
        """Copy a unit's outputs from the old result through `write`; None if they must be made anew.

        Raises:
            InputError: the source changed since the old result was made, or the old result is damaged.
        """
        records = self.records(unit)
        if records is None or not all(name in self.reader.index.entries for name in records):
            return None
        self._check_source(unit, records)
        buffer = memoryview(bytearray(self.block_bytes))
        for name, record in records.items():
            digest, entry = new_hasher(record.content.algorithm), self.reader.entry(name)
            for position in range(0, entry.nbytes, len(buffer)):
                block = buffer[: min(len(buffer), entry.nbytes - position)]
                self.reader.read_into(name, position, block)
                digest.update(block)
                write(name, position, block)
                step(len(block))
            if digest.hexdigest() != record.content.digest:
                raise InputError(
                    f"tensor {name} of the old result",
                    expected="the bytes that its manifest records",
                    found="others",
                    next_step="Remove the folder and convert anew.",
                )
        return records

    def _check_source(self, unit: Unit, records: dict[str, TensorRecord]) -> None:
        (expected, *others) = {record.source for record in records.values()}
        if others or source_digest_of(self.source, unit, self.block_bytes, expected.algorithm) != expected:
            raise InputError(
                f"source tensor {unit.sources[0].name}",
                expected="the bytes that the old result was made of",
                found="others",
                next_step="The source changed; convert into a new folder.",
            )
