"""How a job is carried out, and what is refused before anything is written."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.checkpoint.journal import (
    JOB_FILE,
    SWAP_FILE,
    check_same_job,
    differing_options,
    is_job_begun,
    read_journal,
    read_record,
    state_folder,
)
from converters.checkpoint.lock import check_unlocked
from converters.checkpoint.manifest import read_manifest
from converters.conversion import Conversion, check_destination
from converters.errors import ConfigError, UsageError
from converters.parts import Part, suffix_of
from converters.pipeline import RunOptions
from converters.update import Previous, check_update

if TYPE_CHECKING:
    from converters.feed import Feed


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


def check_job(conversion: Conversion, dst: Path, options: RunOptions, how: JobOptions) -> None:
    """Refuse what a run would refuse, as far as that is known without writing; nothing is created.

    Raises:
        UsageError: DST holds something else or another job; nothing to update or to finalize. LockedError: another run
        holds it. ResourceError: max_memory is too small.
    """
    check_destination(conversion.source.folder, dst)
    conversion.peak_block_bytes(options)
    check_unlocked(dst, suffix_of(how.part))
    job, state = conversion.identity, state_folder(dst)
    check_result(dst, job, update=how.update)
    if how.update or how.restart or read_manifest(dst) is not None:
        return
    try:
        recorded = read_record(state / JOB_FILE)
    except ConfigError:
        recorded = None  # the run says what is wrong with it
    if recorded is not None:
        check_same_job(dst, recorded, job)
    if how.finalize and not (state / SWAP_FILE).exists():
        done = read_journal(state).keys() if is_job_begun(dst) else ()
        check_all_done(dst, conversion.plan.files - set(done), len(conversion.plan.shards))


def check_result(dst: Path, job: dict[str, Any], *, update: bool) -> None:
    """Refuse a finished result of another job, unless it is to be updated; before anything is written into it.

    Raises:
        UsageError: with the options that differ, if it is of the same command.
    """
    if (state_folder(dst) / SWAP_FILE).exists():
        return
    if update:
        check_update(dst, job)
        return
    manifest = read_manifest(dst)
    if manifest is not None and manifest["job"] != job:
        before = manifest["job"].get("options")
        options = differing_options(before, job["options"]) if isinstance(before, dict) else ""
        is_alike = manifest["job"].get("command") == job["command"] and options
        # what is cut for ranks, or merged, is not updated
        can_update = job["command"] != "merge" and "mapping" not in job["options"]
        raise UsageError(
            f"DST {dst}",
            expected="an empty or new folder",
            found="the finished result of another job" + (f" ({options})" if is_alike else ""),
            next_step="Redo it with --update, or choose another folder." if can_update else "Choose another folder.",
        )


def check_all_done(dst: Path, missing: Collection[str], num_shards: int) -> None:
    """Refuse to finalize a folder in which shards are missing.

    Raises:
        UsageError: with one of them.
    """
    if missing:
        raise UsageError(
            f"--finalize {dst}",
            expected="all shards done",
            found=f"{len(missing)} of {num_shards} missing, {min(missing)} among them",
            next_step="Run the parts that did not finish.",
        )
