"""A finished folder that lost a file, or had one damaged: open it again, so that the same command repairs it."""

from pathlib import Path
from typing import Any

from converters.checkpoint.index import INDEX_FILE
from converters.checkpoint.journal import JOB_FILE, JOURNAL_FILE, ShardRecord, TensorRecord, append_journal, create_json
from converters.checkpoint.manifest import MANIFEST_FILE
from converters.checkpoint.writer import disk_errors, sync_folder
from converters.config import CONFIG_FILE


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
    records: dict[str, dict[str, TensorRecord]] = {name: {} for name in manifest["shards"]}
    for name, tensor in manifest["tensors"].items():
        records[tensor["file"]][name] = TensorRecord(tensor["sha256"], tensor["source_sha256"])
    for file, tensors in records.items():
        append_journal(state, ShardRecord(file, manifest["shards"][file]["bytes"], tensors), JOURNAL_FILE.format(""))
    with disk_errors(dst):
        for name in (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE):
            (dst / name).unlink(missing_ok=True)
        sync_folder(dst)
