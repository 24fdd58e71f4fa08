"""The files of a folder held against its kept listing, without a network: every byte is hashed again."""

import os
import stat
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event

from converters.checkpoint.journal import STATE_FOLDER
from converters.errors import InputError, UsageError
from converters.findings import Finding, fail
from converters.hub.listing import ListedFile, Listing, listing_path, read_listing, select
from converters.hub.partial import HASH_BLOCK_BYTES
from converters.hub.pool import Cancelled, run_jobs

Patterns = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class KeptFiles:
    """What --verify-only looks at: the kept listing, the files to prove, and files that nobody listed."""

    dst: Path
    listing: Listing
    files: tuple[ListedFile, ...]
    extra: tuple[str, ...]


def open_kept(dst: Path, repo: str, revision: str | None, patterns: Patterns | None) -> KeptFiles:
    """Return what a finished or unfinished download holds and should hold; nothing is asked or written.

    Args:
        patterns: include and exclude instead of those of the download.
    Raises:
        InputError: no listing is kept there. UsageError: it is of another repository or revision.
    """
    kept = read_listing(dst)
    if kept is None:
        raise InputError(
            f"{listing_path(dst)}",
            expected="the listing that a download keeps",
            found="none",
            next_step="Only what this command fetched can be proved offline.",
        )
    if kept.repo != repo or revision not in (None, kept.revision, kept.commit):
        asked = f"{repo} at {revision}" if revision else repo
        found = f"{kept.repo} at {kept.revision}, commit {kept.commit}"
        raise UsageError(f"DST {dst}", expected=asked, found=found)
    listing = kept if patterns is None else replace(kept, include=patterns[0], exclude=patterns[1])
    wanted = set(select(listing).files)
    # what an earlier run fetched beyond the patterns of the last one claims to be right too
    files = (file for file in listing.files if file in wanted or (patterns is None and held_bytes(dst, file)))
    return KeptFiles(dst, listing, tuple(files), tuple(extra_files(dst, listing)))


def check_files(
    dst: Path, files: Sequence[ListedFile], num_workers: int, on_bytes: Callable[[int], None]
) -> list[Finding]:
    """Return what is wrong with these files, in their order: missing, of another size, of another digest.

    Args:
        on_bytes: called, from several threads, with the bytes just hashed.
    """
    findings: dict[str, Finding] = {}

    def check(file: ListedFile, stop: Event) -> None:
        finding = check_file(dst, file, stop, on_bytes)
        if finding is not None:
            findings[file.path] = finding

    run_jobs(files, check, num_workers)
    return [findings[file.path] for file in files if file.path in findings]


def check_file(dst: Path, file: ListedFile, stop: Event, on_bytes: Callable[[int], None]) -> Finding | None:
    """Return what is wrong with one file; see `check_files`.

    Raises:
        Cancelled: stop was set.
    """
    size = held_bytes(dst, file)
    if size != file.size:
        return fail(file.path, f"{file.size} bytes", "no file" if size is None else f"{size} bytes")
    digest, buffer = file.new_hash(), bytearray(HASH_BLOCK_BYTES)
    with (dst / file.path).open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            if stop.is_set():
                raise Cancelled
            digest.update(memoryview(buffer)[:count])
            on_bytes(count)
    if digest.hexdigest() != file.digest:
        return fail(file.path, f"{file.algorithm} {file.digest}", digest.hexdigest())
    return None


def held_bytes(dst: Path, file: ListedFile) -> int | None:
    """Return the size of the regular file that bears the final name, None if there is none."""
    try:
        status = (dst / file.path).stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return status.st_size if stat.S_ISREG(status.st_mode) else None


def extra_files(dst: Path, listing: Listing) -> list[str]:
    """Return the files of a folder that its listing does not know, our own state aside."""
    known = {file.path for file in listing.files}
    found = []
    for folder, folders, names in os.walk(dst):
        if Path(folder) == dst and STATE_FOLDER in folders:
            folders.remove(STATE_FOLDER)
        found += [(Path(folder) / name).relative_to(dst).as_posix() for name in names]
    return sorted(set(found) - known)
