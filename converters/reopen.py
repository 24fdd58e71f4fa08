"""What stands in DST; and a finished folder that lost a file is opened again, so that the same command repairs it."""

from enum import Enum
from pathlib import Path
from typing import Any

from converters.checkpoint.header import read_header
from converters.checkpoint.index import INDEX_FILE
from converters.checkpoint.journal import JOB_FILE, JOURNAL_FILE, ShardRecord, TensorRecord, append_journal, create_json
from converters.checkpoint.manifest import MANIFEST_FILE, tensor_records
from converters.checkpoint.writer import disk_errors, sync_folder
from converters.config import CONFIG_FILE
from converters.errors import InputError


class FolderState(Enum):
    """What a run finds in DST."""

    OPEN = "open"  # nothing, or an unfinished job
    FINISHED = "finished"  # this very job, with all its files
    DAMAGED = "damaged"  # this very job, with a file missing or cut off
    OTHER = "other"  # the finished result of another job


def folder_state(dst: Path, manifest: dict[str, Any] | None, job: dict[str, Any]) -> FolderState:
    """Tell what stands in DST, by its manifest."""
    if manifest is None:
        return FolderState.OPEN
    if manifest["job"] != job:
        return FolderState.OTHER
    return FolderState.FINISHED if is_intact(dst, manifest) else FolderState.DAMAGED


def is_intact(dst: Path, manifest: dict[str, Any]) -> bool:
    """Return whether every file of a finished result is there, shards in their full size.

    Contents are not read: `inspect --check` and the manifest's digests are for that.
    """
    shards = all(
        (dst / name).is_file() and (dst / name).stat().st_size == facts["bytes"]
        for name, facts in manifest["shards"].items()
    )
    return shards and all((dst / name).is_file() for name in manifest["files"])


def reopen(dst: Path, state: Path, manifest: dict[str, Any]) -> None:
    """Turn a finished result into an unfinished one: its manifest's records become the journal.

    What the journal says is proved by content before it is kept, and the rest is made again.
    """
    create_json(state / JOB_FILE, manifest["job"])
    records = tensor_records(manifest)
    for file, facts in manifest["shards"].items():
        rank = facts.get("rank")
        tensors = records.get(file, {}) if rank is None else _of_file(dst / file, records.get(f"rank {rank}", {}))
        append_journal(state, ShardRecord(file, facts["bytes"], tensors), JOURNAL_FILE.format(""))
    with disk_errors(dst):
        for name in (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE):
            (dst / name).unlink(missing_ok=True)
        sync_folder(dst)


def _of_file(path: Path, records: dict[str, TensorRecord]) -> dict[str, TensorRecord]:
    """Return the records of the tensors in a file of a rank; none if it is lost or damaged: it is made again."""
    try:
        return {entry.name: records[entry.name] for entry in read_header(path) if entry.name in records}
    except InputError:
        return {}
