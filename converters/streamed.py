"""A checkpoint of the hub as a source that is never there as a whole.

    DST/.glm4moe/source/                    weights while they are needed
    DST/.glm4moe/source/headers/            all headers and the files around the weights; laid down at each start
    DST/.glm4moe/source/.glm4moe/           listing of the pinned commit, what is coming in, quarantine, lock

The commit is pinned when the job begins, and a resume stays with it.
"""

import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol

from converters.budget import BLOCK_BYTES, STAGING_FOLDER, on_disk
from converters.checkpoint.index import SUFFIX
from converters.checkpoint.journal import STATE_FOLDER, is_job_begun, state_folder
from converters.checkpoint.lock import LOCK_FILE, check_unlocked, locked
from converters.checkpoint.writer import disk_errors
from converters.conversion import check_destination
from converters.errors import UsageError
from converters.feed import Feed, Staging
from converters.hub.fetch import HubClient
from converters.hub.listing import ListedFile, Listing, read_listing, select, write_listing
from converters.hub.plan import check_served
from converters.remote import JSON_FILES, HubId, RangeClient, lay_down_headers
from converters.source import Source, open_source
from converters.staged import StagedReader
from converters.update import UPDATE_FOLDER

HEADERS_FOLDER = "headers"
# folders, lock, records; and what an entry of the listing takes
_STATE_BYTES = 16 * BLOCK_BYTES
_ENTRY_BYTES = 2 * 240


class StreamClient(HubClient, RangeClient, Protocol):
    """The hub, as far as streaming needs it."""


@dataclass(frozen=True, slots=True)
class Stream:
    """What to stream where.

    Attributes:
        budget: bytes of disk that all that is held of the source may take at once.
        restart: forget what an earlier run pinned and fetched.
        dry_run: write nothing into dst.
    """

    hub_id: HubId
    dst: Path
    budget: int
    restart: bool = False
    dry_run: bool = False


@contextmanager
def open_stream(client: StreamClient, stream: Stream) -> Iterator[tuple[Source, Feed]]:
    """Pin the commit, lay down headers, and yield the source with what brings its weights in.

    Raises:
        UsageError: DST holds something else, or another commit. LockedError: another run streams into it.
        NetworkError, InputError, SecurityError: see `HubClient.list_files`, `select`, `open_source`.
    """
    dst, staging = stream.dst, state_folder(stream.dst) / STAGING_FOLDER
    check_destination(staging, dst)
    if (state_folder(dst) / UPDATE_FOLDER).exists():
        raise UsageError(
            f"DST {dst}", expected="no update under way", found="one", next_step="Finish it with its own command."
        )
    with ExitStack() as stack:
        if stream.dry_run:
            check_unlocked(staging)
            headers = Path(stack.enter_context(TemporaryDirectory(prefix="glm4moe-headers-")))
            listing = _pin(client, stream, staging)
        else:
            stack.enter_context(_held(dst, staging))
            if stream.restart:
                _clear(staging)
            listing = _pin(client, stream, staging)
            headers = staging / HEADERS_FOLDER
            shutil.rmtree(headers, ignore_errors=True)
            with disk_errors(staging):
                headers.mkdir()
                write_listing(staging, listing)
        side = _lay_down(client, listing, headers)
        source, reader = _open(client, listing, headers, staging)
        stack.enter_context(source)
        base_bytes = _base_bytes(listing, side, headers, reader)
        feed = Feed(client, Staging(listing, staging, headers, side, base_bytes), reader, stream.budget)
        stack.callback(feed.close)
        yield source, feed


def _open(client: StreamClient, listing: Listing, headers: Path, staging: Path) -> tuple[Source, StagedReader]:
    """Open the folder of headers, weights to be read where they are staged."""
    source = open_source(headers)
    listed = {file.path: file for file in listing.files}

    def peek(file: str, begin: int, end: int) -> bytes:
        return client.read_range(listing, listed[file], begin, end)

    reader = StagedReader(source.reader.index, staging, peek)
    return replace(source, reader=reader), reader


@contextmanager
def _held(dst: Path, staging: Path) -> Iterator[None]:
    """Hold the staging folder against other runs; nothing of it is left if no job came of it."""
    with locked(staging):
        try:
            yield
        finally:
            if not is_job_begun(dst):
                shutil.rmtree(staging, ignore_errors=True)
                with suppress(OSError):
                    staging.parent.rmdir()
                    dst.rmdir()


def _clear(staging: Path) -> None:
    """Remove what an earlier run held, its listing too."""
    with disk_errors(staging):
        for path in (*staging.iterdir(), *(staging / STATE_FOLDER).iterdir()):
            if path.name not in (STATE_FOLDER, LOCK_FILE):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _pin(client: StreamClient, stream: Stream, staging: Path) -> Listing:
    """Return the listing that an unfinished job was begun with, or a new one."""
    hub_id, kept = stream.hub_id, None
    if is_job_begun(stream.dst) and not stream.restart:
        kept = read_listing(staging)
    if kept is not None and (kept.repo, kept.revision) == (hub_id.repo, hub_id.revision):
        return kept
    listing = client.list_files(hub_id.repo, hub_id.revision)
    if kept is not None and (kept.repo, kept.commit) != (listing.repo, listing.commit):
        raise UsageError(
            f"DST {stream.dst}",
            expected=f"{kept.repo}@{kept.commit}, which it was begun with",
            found=f"{listing.repo}@{listing.commit}",
            next_step="Begin anew with --restart, or choose another folder.",
        )
    return kept or listing


def _lay_down(client: StreamClient, listing: Listing, headers: Path) -> tuple[ListedFile, ...]:
    """Lay down headers, and holes for the files around the weights; return the latter, to be fetched."""
    selection = select(listing)
    check_served(client, listing, selection.files)
    lay_down_headers(client, listing, headers)
    side: list[ListedFile] = []
    for file in selection.files:
        if "/" in file.path or file.path.startswith(".") or file.path.endswith(SUFFIX) or file.path in JSON_FILES:
            continue
        with (headers / file.path).open("wb") as hole:
            # code is a fact about the checkpoint; it is neither run nor copied
            is_code = file.path.endswith(".py")
            hole.truncate(0 if is_code else file.size)
        side += [] if is_code else [file]
    return tuple(side)


def _base_bytes(listing: Listing, side: tuple[ListedFile, ...], headers: Path, reader: StagedReader) -> int:
    """Return the disk space of all that is held from beginning to end."""
    whole = sum(on_disk(file.size) for file in side)
    whole += sum(on_disk((headers / name).stat().st_size) for name in JSON_FILES if (headers / name).exists())
    stand_ins = sum(on_disk(reader.header_bytes(file)) for file in reader.index.files)
    return whole + stand_ins + on_disk(len(listing.files) * _ENTRY_BYTES) + _STATE_BYTES
