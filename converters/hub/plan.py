"""What a download will do: the pinned commit, the wanted files, what is there already, and the disk it takes."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import statvfs
from pathlib import Path

from converters.checkpoint.journal import JOB_FILE, STATE_FOLDER
from converters.errors import InputError, NetworkError, ResourceError, UsageError
from converters.hub.fetch import HubClient
from converters.hub.listing import ListedFile, Listing, Selection, read_listing, select
from converters.hub.partial import final_path, recorded_offset, reserved_bytes
from converters.hub.verify import held_bytes
from converters.remote import HubId

DEFAULT_REVISION = "main"


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asked for. `revision` None: the one already there, or main."""

    repo: str
    dst: Path
    revision: str | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be a repository's name, before anybody is asked for it."""
        hub_id = HubId.parse(self.repo)
        if hub_id is None or hub_id.repo != self.repo:
            raise UsageError(
                f"REPO {self.repo!r}",
                expected="org/name, as the hub spells it",
                found=repr(self.repo),
                next_step="A branch, tag or commit goes into --revision." if hub_id else "",
            )


@dataclass(frozen=True, slots=True)
class DownloadPlan:
    """What a run will do.

    Args:
        present: files that are there with the right size; their bytes are not proved yet.
        absent: the others.
        partial_bytes: bytes of absent files that earlier runs left.
        reserved_bytes: disk space that their partial files already take.
        free_bytes: of the file system of dst.
        is_resumed: the listing is the one that an earlier run kept.
    """

    dst: Path
    listing: Listing
    selection: Selection
    present: tuple[ListedFile, ...]
    absent: tuple[ListedFile, ...]
    partial_bytes: int
    reserved_bytes: int
    free_bytes: int
    is_resumed: bool

    @property
    def total_bytes(self) -> int:
        """Bytes of all wanted files."""
        return total_bytes(self.selection.files)

    @property
    def fetch_bytes(self) -> int:
        """Bytes that have to come over the network."""
        return total_bytes(self.absent) - self.partial_bytes

    @property
    def needed_bytes(self) -> int:
        """Disk space that the run will take."""
        return total_bytes(self.absent) - self.reserved_bytes

    def check_space(self) -> None:
        """Refuse a disk that is too small, before anything is written.

        Raises:
            ResourceError: with both figures in bytes.
        """
        if self.needed_bytes > self.free_bytes:
            raise ResourceError(
                f"disk of {self.dst}",
                expected=f"{self.needed_bytes} bytes free",
                found=f"{self.free_bytes}",
                next_step="Free space or choose another folder, then run the same command.",
            )


def total_bytes(files: Sequence[ListedFile]) -> int:
    """Return the bytes of these files together."""
    return sum(file.size for file in files)


def plan_download(client: HubClient, request: Request) -> DownloadPlan:
    """Pin the commit, choose the files, and see what is there; nothing is written.

    Raises:
        UsageError: DST holds something else, or another commit; a pattern matches nothing.
        NetworkError, InputError, SecurityError: see `HubClient.list_files` and `select`.
    """
    kept = _kept_listing(request)
    listing = _pin(client, request, kept)
    selection = select(listing)
    for file in selection.files:
        path = final_path(request.dst, file)
        if path.exists() and not path.is_file():
            raise UsageError(str(path), expected="a file or nothing", found="something else")
    check_served(client, listing, selection.files)
    present = tuple(file for file in selection.files if held_bytes(request.dst, file) == file.size)
    absent = tuple(file for file in selection.files if file not in set(present))
    return DownloadPlan(
        dst=request.dst,
        listing=listing,
        selection=selection,
        present=present,
        absent=absent,
        partial_bytes=sum(recorded_offset(request.dst, file) for file in absent),
        reserved_bytes=sum(reserved_bytes(request.dst, file) for file in absent),
        free_bytes=_free_bytes(request.dst),
        is_resumed=kept is not None,
    )


def check_served(client: HubClient, listing: Listing, files: Sequence[ListedFile]) -> None:
    """Refuse a file that the hub does not serve over plain HTTP.

    Raises:
        InputError: one is too large.
    """
    for file in files:
        if file.size > client.max_file_bytes:
            raise InputError(
                f"{listing.repo}: {file.path}",
                expected=f"at most {client.max_file_bytes} bytes, as the hub serves over plain HTTP",
                found=f"{file.size}",
                next_step="Fetch it with 'hf download', or leave it out with --exclude.",
            )


def _kept_listing(request: Request) -> Listing | None:
    """Return the listing of the download in DST; refuse a DST that holds anything else."""
    dst, subject = request.dst, f"DST {request.dst}"
    if not dst.exists():
        return None
    # before the listing is looked for: of another run, that is written before any file
    has_others = any(path.name != STATE_FOLDER for path in dst.iterdir())
    kept = read_listing(dst)
    if kept is None:
        if has_others or (dst / STATE_FOLDER / JOB_FILE).exists():
            raise UsageError(
                subject,
                expected="an empty or new folder, or one that this command began",
                found="other files in it",
                next_step="Remove it or choose another; nothing is overwritten.",
            )
        return None
    if kept.repo != request.repo:
        found = f"a download of {kept.repo}"
        raise UsageError(subject, expected=request.repo, found=found, next_step="Choose another folder.")
    return kept


def _pin(client: HubClient, request: Request, kept: Listing | None) -> Listing:
    """Return the listing to work with: the kept one, whose commit stays, or a new one."""
    if kept is not None and _is_known(request.revision, kept, is_offline=client.is_offline):
        return replace(kept, include=request.include, exclude=request.exclude)
    revision = request.revision or DEFAULT_REVISION
    if client.is_offline:
        raise NetworkError(
            f"{request.repo} at {revision}",
            expected="a listing",
            found=f"none in {request.dst}, and HF_HUB_OFFLINE is set",
            next_step="Unset it to ask the hub.",
        )
    listing = client.list_files(request.repo, revision)
    if kept is not None and kept.commit != listing.commit:
        raise UsageError(
            f"--revision {revision}",
            expected=f"commit {kept.commit}, which {request.dst} was begun with",
            found=f"commit {listing.commit}",
            next_step="Leave --revision out to go on with the former, or choose another folder for the latter.",
        )
    return replace(kept or listing, include=request.include, exclude=request.exclude)


def _is_known(revision: str | None, kept: Listing, *, is_offline: bool) -> bool:
    """Tell whether the kept listing answers for a revision; a branch may have moved, if that can be asked."""
    return revision in (None, kept.commit) or (is_offline and revision == kept.revision)


def _free_bytes(dst: Path) -> int:
    folder = next(path for path in (dst.absolute(), *dst.absolute().parents) if path.exists())
    status = statvfs(folder)
    return status.f_bavail * status.f_frsize
