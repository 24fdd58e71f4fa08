"""Carry out a conversion so that it survives anything: lock, journal, resume, commit.

Order of a run: lock the folder, record the job, write shards (each journalled when it has its final name), then the
files around them, the index, config.json, and the manifest, which marks the folder as finished; at last the state
folder is removed. Killed at any instant, the same command finishes the folder to the same bytes.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from converters.checkpoint.disk_read import read_file
from converters.checkpoint.index import INDEX_FILE
from converters.checkpoint.journal import JOURNAL_FILE, ShardRecord, append_journal, create_json, open_job, read_journal
from converters.checkpoint.lock import FolderLock, locked
from converters.checkpoint.manifest import MANIFEST_FILE, build_manifest, read_manifest, write_manifest
from converters.checkpoint.plan import Shard
from converters.checkpoint.writer import check_space, disk_errors, remove_partials, write_file, write_index, write_json
from converters.config import CONFIG_FILE
from converters.conversion import Conversion, config_bytes, side_bytes
from converters.errors import LockedError
from converters.job_options import JobOptions, check_all_done, check_job, check_result
from converters.leftovers import FILES_FILE, remove_state, remove_unfinished
from converters.parts import suffix_of
from converters.pipeline import Progress, Run, RunOptions, write_shards
from converters.prove import prove_shards
from converters.reopen import FolderState, folder_state, reopen
from converters.source_state import SOURCE_FILE, check_source, check_unchanged
from converters.update import Previous, complete_exchange, exchange, prepare_update

__all__ = ["JobOptions", "Outcome", "run"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run found and did: shards kept from an earlier run, shards written now.

    `is_part`: the folder is not finished, because other parts are at work or `waiting_for` shards are to be written.
    """

    already_finished: bool = False
    kept: tuple[str, ...] = ()
    written: tuple[str, ...] = ()
    redone: tuple[str, ...] = ()
    is_part: bool = False
    waiting_for: int = 0


@dataclass(frozen=True, slots=True)
class _Task:
    """A run into a folder that it holds: what to do, where, and how."""

    conversion: Conversion
    lock: FolderLock
    how: JobOptions
    run: Run

    @property
    def dst(self) -> Path:
        return self.lock.dst

    @property
    def state(self) -> Path:
        return self.lock.state

    @property
    def missing(self) -> set[str]:
        """Shards that no part has journalled."""
        return self.conversion.plan.files - read_journal(self.state).keys()


def run(
    conversion: Conversion,
    dst: Path,
    options: RunOptions,
    on_bytes: Progress,
    how: JobOptions | None = None,
    on_unit: Callable[[str], None] | None = None,
) -> Outcome:
    """Carry out a conversion into a new folder, or finish the same one that was interrupted there.

    Args:
        conversion: what to do.
        dst: where; created if need be.
        options: threads and memory.
        on_bytes: called, from several threads, with the bytes of tensor data just written or found done.
        how: begin anew, do a part, finalize, or update.
        on_unit: called, from several threads, with the file and the tensor that a worker turns to.
    Raises:
        UsageError, LockedError: see `check_job`.
        InputError, ResourceError: see `write_shards`; also if the source changed since the run began.
    """
    how = how or JobOptions()
    check_job(conversion, dst, options, how)
    reader, digest = conversion.source.reader, conversion.plan.digest
    shared = Run(reader, options, on_bytes, digest, previous=how.previous, on_unit=on_unit, feed=how.feed)
    with locked(dst, suffix_of(how.part)) as lock:
        return _run_locked(_Task(conversion, lock, how, shared))


def _run_locked(task: _Task) -> Outcome:
    """Do what the state of the folder asks for."""
    complete_exchange(task.dst, task.state)
    job = task.conversion.identity
    # again: another run may have finished something since
    check_result(task.dst, job, update=task.how.update)
    manifest = read_manifest(task.dst)
    match folder_state(task.dst, manifest, job):
        case FolderState.FINISHED:
            remove_state(task.lock)
            return Outcome(already_finished=True)
        case FolderState.OTHER:
            return _update(task)
        case FolderState.DAMAGED:
            assert manifest is not None
            reopen(task.dst, task.state, manifest)
    identities = _begin(task)
    return _end(task, _write_missing(task), identities)


def _update(task: _Task) -> Outcome:
    """Build the new result beside the finished old one, then exchange them."""
    conversion, shared = task.conversion, task.run
    inner = prepare_update(task.state, conversion.identity)
    previous = Previous.open(task.dst, conversion.identity, conversion.source.reader, shared.options)
    try:
        how = JobOptions(previous=previous)
        outcome = run(conversion, inner, shared.options, shared.on_bytes, how, shared.on_unit)
    finally:
        previous.close()
    exchange(task.dst, task.state)
    remove_state(task.lock)
    return outcome


def _begin(task: _Task) -> dict[str, Any]:
    """Record the job, or find it recorded, and return the identities of the source's files."""
    conversion, how, state = task.conversion, task.how, task.state
    if how.restart:
        remove_unfinished(task.dst, state, keep_staging=how.feed is not None)
    resumed = open_job(state, conversion.identity)
    # a stale list of another job's files must not outlive that job
    (create_json if resumed else write_json)(state / FILES_FILE, {"files": _output_files(conversion)})
    path = state / SOURCE_FILE.format(suffix_of(how.part))
    return check_source(conversion, path, how.feed, task.run.options, resumed=resumed)


def _end(task: _Task, outcome: Outcome, identities: dict[str, Any]) -> Outcome:
    """Finish the folder, unless other parts have something left to do or have finished it."""
    if task.how.part:
        # let go before looking who is left: of parts that end at the same time the last one must see all journals
        task.lock.release()
        if read_manifest(task.dst) is not None:
            return outcome
    missing = task.missing
    if missing or (task.how.part and not task.lock.become_exclusive()):
        return replace(outcome, waiting_for=len(missing), is_part=True)
    if task.how.part and read_manifest(task.dst) is not None:
        return outcome
    if task.how.feed is None:
        check_unchanged(task.conversion, identities)
    _commit(task)
    remove_state(task.lock)
    return outcome


def _write_missing(task: _Task) -> Outcome:
    """Keep the shards that are proved by content, write the others."""
    lock, shared, how = task.lock, task.run, task.how
    shards, journal = task.conversion.plan.shards, read_journal(task.state)
    own = how.part.shards(shards) if how.part else shards
    proved = prove_shards(lock.dst, own, journal, shared.options)
    kept = [shard for shard, is_proved in zip(own, proved, strict=True) if is_proved]
    missing = [shard for shard, is_proved in zip(own, proved, strict=True) if not is_proved]
    if how.finalize:
        check_all_done(lock.dst, {shard.file for shard in missing}, len(own))
    for shard in kept:
        shared.on_bytes(sum(entry.nbytes for entry in shard.entries))
    with disk_errors(lock.dst):
        remove_partials(lock.dst, {shard.file for shard in own})
    linked = [shard for shard in missing if _link_back(shard, task)]
    missing = [shard for shard in missing if shard not in linked]
    check_space(lock.dst, sum(shard.file_bytes for shard in missing) + (how.feed.room(missing) if how.feed else 0))
    _write(missing, task)
    written = tuple(shard.file for shard in missing)
    redone = tuple(file for file in written if file in journal)
    return Outcome(kept=tuple(shard.file for shard in (*kept, *linked)), written=written, redone=redone)


def _write(shards: list[Shard], task: _Task) -> None:
    """Write shards and journal each when it has its final name; only then may its source go."""
    feed, journal_file = task.how.feed, JOURNAL_FILE.format(suffix_of(task.how.part))

    def done(record: ShardRecord) -> None:
        append_journal(task.state, record, journal_file)
        if feed is not None:
            feed.after(record.file)

    if feed is not None:
        feed.begin(shards)
    write_shards(shards, task.dst, task.run, done)


def _link_back(shard: Shard, task: _Task) -> bool:
    """Take a shard over from the old result, if it would come out the same."""
    record = task.run.previous.link_back(shard, task.dst) if task.run.previous else None
    if record is None:
        return False
    append_journal(task.state, record, JOURNAL_FILE.format(suffix_of(task.how.part)))
    task.run.on_bytes(sum(entry.nbytes for entry in shard.entries))
    return True


def _commit(task: _Task) -> None:
    """Write everything around the shards; the manifest last."""
    conversion, dst, done = task.conversion, task.dst, read_journal(task.state)
    if conversion.plan.files - done.keys():
        # only where locks do not work: another run has finished the folder and removed its state
        raise LockedError(f"DST {dst}", expected="no other run in it", found="one that finished it meanwhile")
    remove_partials(dst, _output_files(conversion))
    side = {}
    records = {name: record for shard in done.values() for name, record in shard.tensors.items()}
    for name in (*conversion.passthrough, *conversion.generated):
        data = side_bytes(conversion, name, records)
        side[name] = hashlib.sha256(data).hexdigest()
        write_file(dst / name, data)
    if conversion.has_index:
        write_index(dst, conversion.plan, INDEX_FILE)
    write_file(dst / CONFIG_FILE, config_bytes(conversion))
    for name in (*((INDEX_FILE,) if conversion.has_index else ()), CONFIG_FILE):
        side[name] = hashlib.sha256(read_file(dst / name)).hexdigest()
    reader = conversion.source.reader
    write_manifest(dst, build_manifest(conversion.plan, reader, conversion.identity, done, side))


def _output_files(conversion: Conversion) -> list[str]:
    index = [INDEX_FILE] if conversion.has_index else []
    shards = [shard.file for shard in conversion.plan.shards]
    return [*shards, *conversion.passthrough, *conversion.generated, *index, CONFIG_FILE, MANIFEST_FILE]
