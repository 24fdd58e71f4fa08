"""A download carried out: what is there is proved, the rest fetched, and the names given in an order that is safe.

Index and config.json are fetched first, so that a repository that lacks a file is refused before its terabyte is
fetched, and published last, so that a folder whose download was killed is no checkpoint to any loader.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from threading import Event

from converters.checkpoint.index import INDEX_FILE, scan_checkpoint
from converters.checkpoint.journal import LISTING_FILE, state_folder
from converters.checkpoint.lock import locked
from converters.checkpoint.writer import remove_partials
from converters.config import CONFIG_FILE, read_json
from converters.errors import InputError, UsageError
from converters.findings import Finding
from converters.hub.fetch import Fetcher, HubClient, RetryPolicy
from converters.hub.listing import ListedFile, check_name, read_listing, write_listing
from converters.hub.partial import publish, put_aside, remove_leftovers
from converters.hub.plan import DownloadPlan
from converters.hub.pool import run_jobs
from converters.hub.verify import check_files, held_bytes

DEFAULT_WORKERS = 8
LAST_FILES = (INDEX_FILE, CONFIG_FILE)
Progress = Callable[[int], None]


@contextmanager
def begun(plan: DownloadPlan) -> Iterator[None]:
    """Hold DST against other runs, with the listing kept in it.

    Raises:
        LockedError: another run holds it. UsageError: another run began another download there meanwhile.
    """
    with locked(plan.dst):
        kept = read_listing(plan.dst)
        if kept is not None and (kept.repo, kept.commit) != (plan.listing.repo, plan.listing.commit):
            found = f"{kept.repo} at commit {kept.commit}"
            raise UsageError(f"DST {plan.dst}", expected="the download that was planned", found=found)
        remove_partials(state_folder(plan.dst), {LISTING_FILE})
        if kept != plan.listing:
            write_listing(plan.dst, plan.listing)
        yield


def check_present(plan: DownloadPlan, num_workers: int, on_bytes: Progress) -> tuple[list[Finding], list[ListedFile]]:
    """Prove the files that are there; what is damaged goes into quarantine.

    Returns:
        what was wrong, and the files to fetch.
    """
    there = [file for file in plan.selection.files if held_bytes(plan.dst, file) is not None]
    findings = check_files(plan.dst, there, num_workers, on_bytes)
    damaged = {finding.subject: finding for finding in findings}
    for file in there:
        if file.path in damaged:
            put_aside(plan.dst, file, damaged[file.path].found.split()[0])
    proved = {file for file in there if file.path not in damaged}
    return findings, [file for file in plan.selection.files if file not in proved]


def fetch_files(
    client: HubClient,
    plan: DownloadPlan,
    files: Sequence[ListedFile],
    num_workers: int,
    on_bytes: Progress,
    policy: RetryPolicy | None = None,
) -> None:
    """Fetch the files and give them their final names, index and config.json last.

    A file that the server has wrong does not keep the others from being fetched.

    Raises:
        InputError: wrong bytes; offline and something is missing; an index that names a file nobody has.
        NetworkError, ResourceError, SecurityError: see `Fetcher.fetch` and `publish`.
    """
    if client.is_offline and files:
        raise InputError(
            f"DST {plan.dst}",
            expected=f"all {len(plan.selection.files)} files, as HF_HUB_OFFLINE is set",
            found=f"{len(files)} missing: {_names(files)}",
            next_step="Unset HF_HUB_OFFLINE to fetch them.",
        )
    fetcher = Fetcher(client, plan.listing, plan.dst, policy or RetryPolicy(), on_bytes)
    last = sorted((file for file in files if file.path in LAST_FILES), key=lambda file: LAST_FILES.index(file.path))
    sealed: dict[str, Path] = {}

    def fetch_sealed(file: ListedFile, stop: Event) -> None:
        sealed[file.path] = fetcher.fetch(file, stop)

    run_jobs(last, fetch_sealed, num_workers)
    _check_index(plan, sealed.get(INDEX_FILE, plan.dst / INDEX_FILE))
    refused: list[InputError] = []

    def fetch(file: ListedFile, stop: Event) -> None:
        try:
            partial = fetcher.fetch(file, stop)
        except InputError as error:
            refused.append(error)
        else:
            publish(plan.dst, file, partial)

    run_jobs([file for file in files if file not in last], fetch, num_workers)
    if refused:
        raise _joined(refused)
    for file in last:
        publish(plan.dst, file, sealed[file.path])
    remove_leftovers(plan.dst, plan.selection.files)


def _check_index(plan: DownloadPlan, path: Path) -> None:
    """Refuse an index, to be read at `path`, that names a file which the repository does not have."""
    listed = {file.path: file for file in plan.listing.files}
    if not plan.listing.is_whole or INDEX_FILE not in listed:
        return
    subject, weight_map = f"{plan.listing.repo}: {INDEX_FILE}", read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or any(type(name) is not str for name in weight_map.values()):
        raise InputError(subject, expected="weight_map from tensor names to file names", found="none")
    unlisted = sorted(set(weight_map.values()) - set(listed))
    for name in unlisted:
        check_name(name, subject)
    if unlisted:
        raise InputError(
            subject,
            expected="names of files that the repository has",
            found=f"{unlisted[0]} and {len(unlisted) - 1} more" if len(unlisted) > 1 else unlisted[0],
            next_step="The upload is incomplete; choose another revision or ask its author.",
        )


def _joined(refused: Sequence[InputError]) -> InputError:
    first, others = refused[0], ", ".join(error.subject for error in refused[1:])
    more = f" The same holds for {others}." if others else ""
    return InputError(first.subject, expected=first.expected, found=first.found, next_step=f"{first.next_step}{more}")


def _names(files: Sequence[ListedFile]) -> str:
    shown = ", ".join(file.path for file in files[:3])
    return f"{shown} and {len(files) - 3} more" if len(files) > 3 else shown


def check_whole(plan: DownloadPlan) -> tuple[str, ...]:
    """Parse every header and hold it against the index, if everything was fetched; return the notes on it.

    Raises:
        InputError, SecurityError: see `scan_checkpoint`.
    """
    return scan_checkpoint(plan.dst).notes if plan.listing.is_whole else ()
