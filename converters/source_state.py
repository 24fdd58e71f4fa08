"""Whether the source is still what a job began with: by size, inode and times, by content, or by its listed digests."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from converters.checkpoint.index import checked_path
from converters.checkpoint.journal import read_journal, read_record
from converters.checkpoint.writer import write_json
from converters.conversion import Conversion
from converters.errors import ConfigError, InputError
from converters.pipeline import RunOptions
from converters.prove import changed_source_tensor

if TYPE_CHECKING:
    from converters.feed import Feed

SOURCE_FILE = "source{}.json"  # filled with the suffix of a part


def check_source(
    conversion: Conversion, path: Path, feed: "Feed | None", options: RunOptions, *, resumed: bool
) -> dict[str, Any]:
    """Return the identities of the source's files; on resume, compare what changed since by content.

    Args:
        conversion: the job.
        path: where they are kept, in the state folder.
        feed: brings the weights in, if the source is never there as a whole.
        options: bounds what is read at once.
        resumed: whether an earlier run left any.
    Raises:
        InputError: a tensor that is already converted has other bytes now.
    """
    identities = feed.identities() if feed else _identities(conversion)
    if resumed:
        recorded = _recorded(path, identities)
        changed = {file for file, identity in identities.items() if recorded.get(file) != identity}
        journal = read_journal(path.parent)
        if feed and changed and journal:
            # nothing is there to be read: the listed digests decide alone
            raise InputError(
                f"source file {min(changed)}",
                expected="the one that the unfinished run read",
                found="another one, or no record of it",
                next_step="Begin anew with --restart; or 'glm4moe download' it and use the folder, which is compared.",
            )
        name = None
        if changed and not feed:
            name = changed_source_tensor(conversion, journal, changed, options.copy_block_bytes)
        if name is not None:
            raise InputError(
                f"source tensor {name}",
                expected="the bytes that the unfinished run read",
                found="others",
                next_step="The source changed. Begin anew with --restart.",
            )
    write_json(path, identities)
    return identities


def _recorded(path: Path, identities: dict[str, Any]) -> dict[str, Any]:
    """Return the identities in a file; none if it is lost or damaged, so that content decides.

    A part that begins has none of its own; another part's serve, if nothing changed since.
    """
    others = [] if path.exists() else sorted(path.parent.glob(SOURCE_FILE.format("*")))
    for candidate in (path, *others):
        try:
            recorded = read_record(candidate)
        except ConfigError:
            continue
        if recorded is not None and (candidate == path or recorded == identities):
            return recorded
    return {}


def _identities(conversion: Conversion) -> dict[str, list[int]]:
    """Return size, inode, mtime and ctime of the source's files: equal means unchanged; unequal decides nothing."""
    index = conversion.source.reader.index
    stats = {file: checked_path(index.folder, file).stat() for file in index.files}
    return {file: [s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns] for file, s in stats.items()}


def check_unchanged(conversion: Conversion, identities: dict[str, Any]) -> None:
    """Refuse to finish a folder whose source changed while it was read.

    Raises:
        InputError: a file is not what it was.
    """
    if _identities(conversion) != identities:
        raise InputError(
            str(conversion.source.folder),
            expected="files that stay as they are",
            found="one that changed meanwhile",
            next_step="Nothing was finished. Run the same command again; what changed is found by content.",
        )
