"""The state of an unfinished folder: who is writing it, what job it is, which shards are done and what is in them.

Everything lives in `DST/.glm4moe/` until the manifest, the commit marker, stands in DST; then the folder is removed.

    lock            held with flock by the process that writes; see `checkpoint.lock`
    job.json        what the job is: its identity, compared field by field on resume
    journal*.jsonl  one line a finished shard, appended and synced after the shard has its final name: digest and record

A line that was cut off by a crash, or damaged, or that another version wrote in another form, is dropped, and its shard
is written again.
"""

import errno
import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint.content_digest import ContentDigest
from converters.checkpoint.writer import disk_errors, sync_folder, write_json
from converters.config import read_json
from converters.errors import ConfigError, InputError, LockedError, UsageError
from converters.quant.quality import TensorQuality

STATE_FOLDER = ".glm4moe"
JOB_FILE = "job.json"
SWAP_FILE = "swap.json"  # an update is taking the old result's place
LISTING_FILE = "listing.json"  # a download's, in the same folder
_NO_LINKS = frozenset({errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP})
JOURNAL_FILE = "journal{}.jsonl"  # filled with the suffix of a part


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What is known about a written tensor.

    Attributes:
        content: the digest of its bytes.
        source: the digest of the source bytes that it was made from; see `converters.digests`.
        quality: errors of the codes of a quantized weight.
    """

    content: ContentDigest
    source: ContentDigest
    quality: TensorQuality | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TensorRecord":
        """Build from what `as_json` returned, or from a manifest's tensor.

        Raises:
            KeyError, TypeError, ValueError: it is of another form.
        """
        quality = value.get("quality")
        found = TensorQuality(**quality) if quality else None
        return cls(ContentDigest.from_json(value), ContentDigest.from_text(value["source_digest"]), found)

    def as_json(self) -> dict[str, Any]:
        """Return it as JSON has it; no errors where nothing was quantized."""
        facts: dict[str, Any] = {**self.content.as_json(), "source_digest": self.source.text}
        return facts if self.quality is None else {**facts, "quality": asdict(self.quality)}


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard: its size and its tensors."""

    file: str
    file_bytes: int
    tensors: dict[str, TensorRecord]

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "ShardRecord":
        """Build from a parsed journal line; see `TensorRecord.from_json` for what is raised."""
        tensors = {name: TensorRecord.from_json(record) for name, record in value["tensors"].items()}
        return cls(value["file"], value["file_bytes"], tensors)

    def as_json(self) -> dict[str, Any]:
        """Return a journal line's content."""
        tensors = {name: record.as_json() for name, record in self.tensors.items()}
        return {"file": self.file, "file_bytes": self.file_bytes, "tensors": tensors}


def state_folder(dst: Path) -> Path:
    """Return the folder that holds the state of an unfinished DST."""
    return dst / STATE_FOLDER


def create_json(path: Path, value: dict[str, Any]) -> bool:
    """Write a JSON file unless it exists; return whether it was written. Of several processes exactly one succeeds."""
    # not the process id: machines that share the folder may have the same one
    own = path.with_name(f"{path.name}.{os.urandom(4).hex()}")
    with disk_errors(path):
        write_json(own, value)
        try:
            os.link(own, path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if path.exists():
                return False
            os.replace(own, path)
        finally:
            own.unlink(missing_ok=True)
        sync_folder(path.parent)
    return True


def is_job_begun(dst: Path) -> bool:
    """Return whether a conversion was begun in DST; a download keeps its state in the same folder, but no job."""
    return any((state_folder(dst) / name).is_file() for name in (JOB_FILE, SWAP_FILE))


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file of the state folder; None if it is not there, or was removed meanwhile.

    Raises:
        ConfigError, InputError: it is damaged, or cannot be read.
    """
    try:
        return read_json(path)
    except InputError:
        if path.exists():
            raise
        return None


def open_job(state: Path, job: dict[str, Any]) -> bool:
    """Record the job, or compare it with the one already there; return whether this resumes one.

    Raises:
        UsageError: DST belongs to another job; the first differing field is named.
    """
    path = state / JOB_FILE
    if not path.exists():
        # without its job, a journal could be any job's
        for journal in state.glob(JOURNAL_FILE.format("*")):
            journal.unlink(missing_ok=True)
    if create_json(path, job):
        return False
    try:
        recorded = read_record(path)
    except ConfigError as error:
        raise InputError(
            str(path),
            expected="the record of an unfinished job",
            found="something else",
            next_step="Run with --restart to begin anew.",
        ) from error
    if recorded is None:
        # only where locks do not work
        raise LockedError(f"DST {path.parent.parent}", expected="no other run in it", found="one that just finished it")
    check_same_job(path.parent.parent, recorded, job)
    return True


def check_same_job(dst: Path, recorded: dict[str, Any], job: dict[str, Any]) -> None:
    """Compare the job that was begun in DST with the one asked for.

    Raises:
        UsageError: they differ; the first differing field is named, of options each one with both values.
    """
    for field in sorted(job.keys() | recorded.keys()):
        before, now = recorded.get(field), job.get(field)
        if before == now:
            continue
        expected, found = f"{before!r}, as the unfinished job in it", repr(now)
        if isinstance(before, dict) and isinstance(now, dict):
            expected, found = "those of the unfinished job in it", differing_options(before, now)
        raise UsageError(
            f"DST {dst}: {field}",
            expected=expected,
            found=found,
            next_step="Run that job's command, or begin anew with --restart.",
        )


def differing_options(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the options that two jobs do not share, such as `layout: packed, here split`."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "; ".join(f"{name}: {_spell(before.get(name))}, here {_spell(now.get(name))}" for name in names)


def _spell(value: Any) -> str:
    if value is None:
        return "not given"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def read_journal(state: Path) -> dict[str, ShardRecord]:
    """Return the shards recorded as done, by file; a line of another form, or with another digest, is ignored."""
    done: dict[str, ShardRecord] = {}
    for path in sorted(state.glob(JOURNAL_FILE.format("*"))):
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            continue  # another part has finished the folder meanwhile
        for line in data.split(b"\n"):
            digest, _, text = line.partition(b" ")
            if text and digest == _line_digest(text):
                with suppress(KeyError, TypeError, ValueError):
                    record = ShardRecord.from_json(json.loads(text))
                    done[record.file] = record
    return done


def append_journal(state: Path, record: ShardRecord, file: str) -> None:
    """Append a line and sync it. It starts with a newline, so that a half-written line before it stays alone."""
    path = state / file
    text = json.dumps(record.as_json(), separators=(",", ":")).encode()
    with disk_errors(path):
        is_new = not path.exists()
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            data = memoryview(b"\n" + _line_digest(text) + b" " + text + b"\n")
            while len(data):
                data = data[os.write(descriptor, data) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if is_new:
            sync_folder(state)


def _line_digest(text: bytes) -> bytes:
    return hashlib.sha256(text).hexdigest()[:16].encode()
