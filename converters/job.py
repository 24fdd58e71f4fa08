"""Carry out a conversion so that it survives anything: lock, journal, resume, commit.

Order of a run: lock the folder, record the job, write shards (each journalled when it has its final name), then the
files around them, the index, config.json, and the manifest, which marks the folder as finished; at last the state
folder is removed. Killed at any instant, the same command finishes the folder to the same bytes.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import converters
from converters.budget import STAGING_FOLDER
from converters.checkpoint.disk_read import read_file
from converters.checkpoint.index import INDEX_FILE
from converters.checkpoint.journal import (
    JOB_FILE,
    JOURNAL_FILE,
    LOCK_FILE,
    SWAP_FILE,
    FolderLock,
    ShardRecord,
    append_journal,
    create_json,
    locked,
    open_job,
    read_journal,
    state_folder,
)
from converters.checkpoint.manifest import (
    MANIFEST_FILE,
    build_manifest,
    plan_digest,
    read_manifest,
    source_digest,
    write_manifest,
)
from converters.checkpoint.plan import Shard
from converters.checkpoint.writer import (
    check_space,
    disk_errors,
    remove_partials,
    sync_folder,
    write_file,
    write_index,
    write_json,
)
from converters.config import CONFIG_FILE, read_json
from converters.conversion import Conversion, check_destination, config_bytes
from converters.errors import LockedError, UsageError
from converters.parts import Part, suffix_of
from converters.pipeline import Progress, Run, RunOptions, peak_block_bytes, write_shards
from converters.prove import prove_shards
from converters.reopen import is_intact, reopen
from converters.source_state import SOURCE_FILE, check_source, check_unchanged
from converters.update import (
    UPDATE_FOLDER,
    Previous,
    check_update,
    complete_exchange,
    exchange,
    prepare_update,
)

if TYPE_CHECKING:
    from converters.feed import Feed

FILES_FILE = "files.json"


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


def job_identity(conversion: Conversion) -> dict[str, Any]:
    """Return what a job is; two runs with the same identity write the same bytes."""
    source = conversion.source
    return {
        "command": conversion.command,
        "version": converters.__version__,
        "options": conversion.options,
        "source": source_digest(source.reader, source.raw_config),
        "plan": plan_digest(conversion.plan),
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOptions:
    """How a job is carried out, beside what it is.

    `restart` begins anew where an unfinished job stands; `part` does one part of it; `finalize` only finishes a folder
    whose parts are all done; `update` redoes a finished folder. `feed` brings the source's weights in as they are
    needed; `previous` is an old result that tensors are taken over from.
    """

    restart: bool = False
    part: Part | None = None
    finalize: bool = False
    update: bool = False
    feed: "Feed | None" = None
    previous: Previous | None = None

    def __post_init__(self) -> None:
        """Refuse combinations in which one option would undo another."""
        if self.part and (self.restart or self.finalize):
            other = "--restart" if self.restart else "--finalize"
            raise UsageError(
                "--part",
                expected=f"no {other} beside it",
                found="both",
                next_step=f"Run once with {other} and without --part.",
            )
        if self.restart and self.finalize:
            raise UsageError("--restart", expected="no --finalize beside it", found="both")
        if self.update and (self.part or self.restart or self.finalize):
            raise UsageError("--update", expected="no --part, --restart or --finalize beside it", found="one")
        if self.update and self.feed:
            raise UsageError("--update", expected="a SRC that is there as a whole", found="--disk-budget beside it")


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
        UsageError: dst holds something else. LockedError: another run holds it.
        InputError, ResourceError: see `write_shards`; also if the source changed since the run began.
    """
    how = how or JobOptions()
    check_destination(conversion.source.folder, dst)
    peak_block_bytes(conversion.plan, conversion.source.reader, options)
    job = job_identity(conversion)
    _check_result(dst, job, update=how.update)
    with locked(dst, suffix_of(how.part)) as lock:
        complete_exchange(dst, lock.state)
        _check_result(dst, job, update=how.update)
        manifest = read_manifest(dst)
        if manifest is not None and manifest["job"] != job:
            return _update(conversion, lock, (options, on_bytes, on_unit), job)
        if manifest is not None and is_intact(dst, manifest):
            _remove_state(lock)
            return Outcome(already_finished=True)
        if manifest is not None:
            reopen(dst, lock.state, manifest)
        if how.restart:
            _remove_unfinished(dst, lock.state, keep_staging=how.feed is not None)
        resumed = open_job(lock.state, job)
        # a stale list of another job's files must not outlive that job
        (create_json if resumed else write_json)(lock.state / FILES_FILE, {"files": _output_files(conversion)})
        path = lock.state / SOURCE_FILE.format(suffix_of(how.part))
        identities = check_source(conversion, path, how.feed, resumed=resumed)
        reader = conversion.source.reader
        shared = Run(reader, options, on_bytes, previous=how.previous, on_unit=on_unit, feed=how.feed)
        outcome = _write_missing(conversion, lock, shared, how)
        if how.part:
            # let go before looking who is left: of parts that end at the same time the last one must see all journals
            lock.release()
            if read_manifest(dst) is not None:
                return outcome
        missing = conversion.plan.files - read_journal(lock.state).keys()
        if missing or (how.part and not lock.become_exclusive()):
            return replace(outcome, waiting_for=len(missing), is_part=True)
        if how.part and read_manifest(dst) is not None:
            return outcome
        if how.feed is None:
            check_unchanged(conversion, identities)
        _commit(conversion, dst, lock.state, job)
        _remove_state(lock)
    return outcome


def _update(
    conversion: Conversion,
    lock: FolderLock,
    run_arguments: tuple[RunOptions, Progress, Callable[[str], None] | None],
    job: dict[str, Any],
) -> Outcome:
    """Build the new result beside the finished old one, then exchange them."""
    options, on_bytes, on_unit = run_arguments
    inner = prepare_update(lock.state, job)
    previous = Previous.open(lock.dst, converters.__version__, conversion.source.reader)
    try:
        outcome = run(conversion, inner, options, on_bytes, JobOptions(previous=previous), on_unit)
    finally:
        previous.close()
    exchange(lock.dst, lock.state)
    _remove_state(lock)
    return outcome


def _write_missing(conversion: Conversion, lock: FolderLock, run: Run, how: JobOptions) -> Outcome:
    """Keep the shards that are proved by content, write the others."""
    shards, journal = conversion.plan.shards, read_journal(lock.state)
    own = how.part.shards(shards) if how.part else shards
    proved = prove_shards(lock.dst, own, journal, run.options.num_workers)
    kept = [shard for shard, is_proved in zip(own, proved, strict=True) if is_proved]
    missing = [shard for shard, is_proved in zip(own, proved, strict=True) if not is_proved]
    if missing and how.finalize:
        raise UsageError(
            f"--finalize {lock.dst}",
            expected="all shards done",
            found=f"{len(missing)} of {len(own)} missing, {missing[0].file} among them",
            next_step="Run the parts that did not finish again.",
        )
    for shard in kept:
        run.on_bytes(sum(entry.nbytes for entry in shard.entries))
    with disk_errors(lock.dst):
        remove_partials(lock.dst, {shard.file for shard in own})
    linked = [shard for shard in missing if _link_back(shard, lock, run, how)]
    missing = [shard for shard in missing if shard not in linked]
    check_space(lock.dst, sum(shard.file_bytes for shard in missing) + (how.feed.room(missing) if how.feed else 0))
    journal_file = JOURNAL_FILE.format(suffix_of(how.part))

    def done(record: ShardRecord) -> None:
        append_journal(lock.state, record, journal_file)
        if how.feed is not None:
            how.feed.after(record.file)

    if how.feed is not None:
        how.feed.begin(missing)
    write_shards(missing, lock.dst, run, done)
    written = tuple(shard.file for shard in missing)
    redone = tuple(file for file in written if file in journal)
    return Outcome(kept=tuple(shard.file for shard in (*kept, *linked)), written=written, redone=redone)


def _link_back(shard: Shard, lock: FolderLock, run: Run, how: JobOptions) -> bool:
    """Take a shard over from the old result, if it would come out the same."""
    record = run.previous.link_back(shard, lock.dst) if run.previous else None
    if record is None:
        return False
    append_journal(lock.state, record, JOURNAL_FILE.format(suffix_of(how.part)))
    run.on_bytes(sum(entry.nbytes for entry in shard.entries))
    return True


def _commit(conversion: Conversion, dst: Path, state: Path, job: dict[str, Any]) -> None:
    """Write everything around the shards; the manifest last."""
    source, done = conversion.source, read_journal(state)
    if conversion.plan.files - done.keys():
        # only where locks do not work: another run has finished the folder and removed its state
        raise LockedError(f"DST {dst}", expected="no other run in it", found="one that finished it meanwhile")
    remove_partials(dst, _output_files(conversion))
    side = {}
    for name in conversion.passthrough:
        data = read_file(source.folder / name)
        side[name] = hashlib.sha256(data).hexdigest()
        write_file(dst / name, data)
    if conversion.has_index:
        write_index(dst, conversion.plan, INDEX_FILE)
    write_file(dst / CONFIG_FILE, config_bytes(conversion))
    for name in (*((INDEX_FILE,) if conversion.has_index else ()), CONFIG_FILE):
        side[name] = hashlib.sha256(read_file(dst / name)).hexdigest()
    write_manifest(dst, build_manifest(conversion.plan, source.reader, job, done, side))


def _check_result(dst: Path, job: dict[str, Any], *, update: bool) -> None:
    """Refuse a finished result of another job, unless it is to be updated; before anything is written into it."""
    if (state_folder(dst) / SWAP_FILE).exists():
        return
    if update:
        check_update(dst, job)
        return
    manifest = read_manifest(dst)
    if manifest is not None and manifest["job"] != job:
        raise UsageError(
            f"DST {dst}",
            expected="an empty or new folder",
            found="the finished result of another job",
            next_step="Redo it with --update, or choose another folder.",
        )


def _output_files(conversion: Conversion) -> list[str]:
    index = [INDEX_FILE] if conversion.has_index else []
    shards = [shard.file for shard in conversion.plan.shards]
    return [*shards, *conversion.passthrough, *index, CONFIG_FILE, MANIFEST_FILE]


def _remove_unfinished(dst: Path, state: Path, *, keep_staging: bool) -> None:
    """Remove what the unfinished job in dst wrote or may have wanted to write, and nothing else."""
    names = read_json(state / FILES_FILE)["files"] if (state / FILES_FILE).exists() else []
    with disk_errors(dst):
        remove_partials(dst, names)
        for name in names:
            (dst / name).unlink(missing_ok=True)
        # before the record of them goes, or a file could come back after a power loss and pass for another job's
        sync_folder(dst)
        if not keep_staging:
            shutil.rmtree(state / STAGING_FOLDER, ignore_errors=True)
        # the job last: as long as it stands, its list of files is the right one
        for path in sorted(state.iterdir(), key=lambda path: path.name == JOB_FILE):
            if not path.name.startswith(LOCK_FILE) and path.name != STAGING_FOLDER:
                path.unlink()
        sync_folder(state)


def _remove_state(lock: FolderLock) -> None:
    """Remove the state folder, unless another part still holds it. The lock goes last, so that no run slips in."""
    if not lock.become_exclusive():
        return
    with disk_errors(lock.dst):
        shutil.rmtree(lock.state / UPDATE_FOLDER, ignore_errors=True)
        shutil.rmtree(lock.state / STAGING_FOLDER, ignore_errors=True)
        for path in lock.state.iterdir():
            if path.name != LOCK_FILE:
                path.unlink()
        (lock.state / LOCK_FILE).unlink()
        lock.state.rmdir()
        sync_folder(lock.dst)
