"""Prove finished parts by content: an output shard by its recorded digests, a source by the digest of what was read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

from converters.blocks import Scratch, as_bytes, digest_rows, largest_magnitude
from converters.checkpoint.content_digest import Algorithm, ContentDigest, new_hasher
from converters.checkpoint.header import TensorEntry
from converters.checkpoint.journal import ShardRecord
from converters.checkpoint.plan import Shard, Unit
from converters.checkpoint.reader import CheckpointReader
from converters.conversion import Conversion
from converters.digests import SourceDigest
from converters.pipeline import RunOptions
from converters.waiting import wait_for_all
from converters.workers import start_pool


@dataclass(frozen=True, slots=True)
class Proof:
    """How much a thread reads at once while it proves something, and what ends it early."""

    block_bytes: int
    stop: Event = field(default_factory=Event)


def prove_shards(
    dst: Path, shards: Sequence[Shard], journal: dict[str, ShardRecord], options: RunOptions
) -> list[bool]:
    """Return of each shard whether it is done; a run that is stopped meanwhile does not wait for the rest."""
    pool, proof = start_pool(options.num_workers, "prove"), Proof(options.copy_block_bytes)
    try:
        proved = [pool.submit(shard_is_proved, dst, shard, journal.get(shard.file), proof) for shard in shards]
        wait_for_all(proved)
        return [future.result() for future in proved]
    finally:
        proof.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def shard_is_proved(dst: Path, shard: Shard, record: ShardRecord | None, proof: Proof) -> bool:
    """Return whether the shard stands in dst, byte for byte as it was recorded.

    Size, header and the digest of every tensor are compared; names and times prove nothing. What cannot be read, or is
    not because the run stops, is not proved.
    """
    path = dst / shard.file
    if record is None or not path.is_file() or path.stat().st_size != shard.file_bytes:
        return False
    if record.tensors.keys() != {entry.name for entry in shard.entries}:
        return False
    try:
        with path.open("rb", buffering=0) as file:
            if file.read(len(shard.header)) != shard.header:
                return False
            return all(
                _is_known_by(record.tensors[entry.name].content, file.fileno(), entry, proof) for entry in shard.entries
            )
    except OSError:
        return False


def changed_source_tensor(
    conversion: Conversion, journal: dict[str, ShardRecord], files: set[str], block_bytes: int
) -> str | None:
    """Return a source tensor whose bytes differ from those that finished shards were made of, or None.

    Args:
        conversion: the job.
        journal: the finished shards.
        files: the source files to look into.
        block_bytes: the most to read at once.
    """
    index = conversion.source.reader.index
    for shard in conversion.plan.shards:
        if shard.file not in journal:
            continue
        for unit in shard.units:
            names = {name for name, *_ in unit.reads()}
            if not files.intersection(index.entries[name][0] for name in names):
                continue
            record = journal[shard.file].tensors.get(unit.outputs[0].name)
            if record is None:
                continue
            if source_digest_of(conversion.source.reader, unit, block_bytes, record.source.algorithm) != record.source:
                return unit.sources[0].name
    return None


def source_digest_of(reader: CheckpointReader, unit: Unit, block_bytes: int, algorithm: Algorithm) -> ContentDigest:
    """Hash what decides a unit's outputs, in the order in which it is read: its group's largest magnitude, its rows.

    Args:
        block_bytes: the most to read at once; it makes no difference to the digest.
        algorithm: that of the digest to compare with.
    """
    digest = SourceDigest(algorithm)
    if unit.group:
        digest.update(as_bytes(largest_magnitude(reader, unit.group, Scratch(), block_bytes)))
    buffer = memoryview(bytearray(block_bytes))
    for rows in unit.sources:
        for name, start, stop in rows.reads():
            digest_rows(reader, name, start, stop, digest, buffer)
    return digest.found


def _is_known_by(known: ContentDigest, descriptor: int, entry: TensorEntry, proof: Proof) -> bool:
    hasher, position = new_hasher(known.algorithm), entry.begin
    buffer = memoryview(bytearray(min(proof.block_bytes, max(1, entry.nbytes))))
    while position < entry.end:
        count = os.preadv(descriptor, [buffer[: entry.end - position]], position)
        if count == 0 or proof.stop.is_set():
            return False
        hasher.update(buffer[:count])
        position += count
    return hasher.hexdigest() == known.digest
