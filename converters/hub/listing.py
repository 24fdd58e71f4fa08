"""The listing of a pinned commit: every file with its size and digest, kept beside the files it describes.

Names and numbers come from a server, or from a file that lay on a disk for a year: nothing in them is trusted.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from converters.checkpoint.index import PICKLE_SUFFIXES, SUFFIX
from converters.checkpoint.journal import LISTING_FILE, STATE_FOLDER
from converters.checkpoint.writer import write_json
from converters.config import read_json
from converters.errors import InputError, SecurityError, UsageError

if TYPE_CHECKING:
    from hashlib import _Hash

MAX_FILES = 20_000
MAX_NAME_BYTES = 240  # percent-encoded; with a suffix of ours it stays below the 255 bytes of file systems
MAX_FILE_BYTES = 1 << 48
_SHA256, _SHA1 = re.compile(r"[0-9a-f]{64}"), re.compile(r"[0-9a-f]{40}")
_DRIVE = re.compile(r"[A-Za-z]:")
_RESERVED = frozenset({STATE_FOLDER, ".git"})


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file as the commit has it.

    Args:
        path: relative, with slashes.
        size: bytes.
        digest: in hex: sha256 of the content (64 digits) for LFS and Xet files, the git blob id (40 digits) for others.
    """

    path: str
    size: int
    digest: str

    @property
    def algorithm(self) -> str:
        """What the digest is called in messages."""
        return "sha256" if len(self.digest) == 64 else "git blob id"

    def new_hash(self) -> "_Hash":
        """Return a hash that gives `digest` once it has seen the content.

        Source: git hash-object: sha1 over "blob", the size in decimal, a zero byte, the content.
        """
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Listing:
    """What a repository holds at one commit, and which part of it is wanted here."""

    repo: str
    revision: str
    commit: str
    files: tuple[ListedFile, ...]
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()

    @property
    def is_whole(self) -> bool:
        """Whether no pattern narrows it."""
        return not self.include and not self.exclude


@dataclass(frozen=True, slots=True)
class Selection:
    """The wanted files in the order of the listing, and the pickled ones that are left where they are."""

    files: tuple[ListedFile, ...]
    skipped: tuple[str, ...]


def check_listing(listing: Listing) -> Listing:
    """Return the listing if nothing in it can hurt.

    Raises:
        SecurityError: a name that leaves the folder, cannot be shown, or is ours.
        InputError: sizes, digests or a commit that are none; a name twice, or both a file and a folder.
    """
    subject = f"the listing of {listing.repo}"
    if not _SHA1.fullmatch(listing.commit):
        raise InputError(subject, expected="a commit of 40 hex digits", found=repr(listing.commit)[:80])
    if len(listing.files) > MAX_FILES:
        raise InputError(subject, expected=f"at most {MAX_FILES} files", found=str(len(listing.files)))
    paths = {file.path for file in listing.files}
    if len(paths) != len(listing.files):
        raise InputError(subject, expected="each name once", found="one twice")
    for path in paths:
        check_name(path, subject)
    for file in listing.files:
        if not 0 <= file.size < MAX_FILE_BYTES:
            raise InputError(f"{subject}: {file.path}", expected="a size in bytes", found=repr(file.size))
        if not (_SHA256.fullmatch(file.digest) or _SHA1.fullmatch(file.digest)):
            raise InputError(f"{subject}: {file.path}", expected="a sha256 or a blob id", found=repr(file.digest)[:80])
        for parent in PurePosixPath(file.path).parents:
            if str(parent) in paths:
                raise InputError(subject, expected="names of files", found=f"{str(parent)!r}, a file and a folder")
    return listing


def check_name(path: str, subject: str) -> None:
    """Refuse a path that is not plainly a file below the folder.

    Raises:
        SecurityError: absolute, with `..`, a backslash, a drive, a control character, too long, or in our own folder.
    """
    parts = path.split("/")
    plain = path.isprintable() and "\\" not in path and not _DRIVE.match(path)
    if not plain or any(part in ("", ".", "..") for part in parts) or parts[0].casefold() in _RESERVED:
        raise SecurityError(f"{subject}: {path[:MAX_NAME_BYTES]!r}", expected="a plain file name inside the folder")
    if len(flat_name(path)) > MAX_NAME_BYTES:
        found = f"{len(flat_name(path))}, {path[:40]!r}..."
        raise SecurityError(subject, expected=f"names of at most {MAX_NAME_BYTES} bytes", found=found)


def flat_name(path: str) -> str:
    """Return a listed path as one file name, percent-encoded; no two paths have the same."""
    return quote(path, safe=" ")


def select(listing: Listing) -> Selection:
    """Return the files that the patterns leave; pickled ones are not among them.

    Raises:
        UsageError: a pattern that matches nothing, or no file left.
        SecurityError: pickled weights asked for, or nothing but pickled weights.
        InputError: no safetensors in a repository that is wanted whole.
    """
    for pattern in (*listing.include, *listing.exclude):
        if not any(_matches(file.path, pattern) for file in listing.files):
            raise UsageError(f"pattern {pattern!r}", expected=f"a file of {listing.repo} that it matches", found="none")
    for pattern in listing.include:
        if is_pickled(pattern):
            raise SecurityError(
                f"--include {pattern}", expected="safetensors", found="pickled files", next_step=_PICKLE
            )
    wanted = [file for file in listing.files if _is_wanted(file.path, listing)]
    skipped = tuple(file.path for file in wanted if is_pickled(file.path))
    files = tuple(file for file in wanted if not is_pickled(file.path))
    if listing.is_whole and not any(file.path.endswith(SUFFIX) for file in files):
        _refuse_without_weights(listing, skipped)
    if not files:
        raise UsageError("--include and --exclude", expected="patterns that leave a file", found="none left")
    return Selection(files, skipped)


_PICKLE = "Pickled weights can run code and are never fetched."


def _refuse_without_weights(listing: Listing, skipped: tuple[str, ...]) -> None:
    if skipped:
        raise SecurityError(listing.repo, expected="safetensors", found=f"only {skipped[0]}", next_step=_PICKLE)
    raise InputError(
        listing.repo,
        expected="a checkpoint in safetensors",
        found="no such file",
        next_step="Other files can be had with --include.",
    )


def is_pickled(path: str) -> bool:
    """Tell whether a file of this name is of a format that can run code when it is opened."""
    return PurePosixPath(path).suffix.lower() in PICKLE_SUFFIXES


def _is_wanted(path: str, listing: Listing) -> bool:
    included = not listing.include or any(_matches(path, pattern) for pattern in listing.include)
    return included and not any(_matches(path, pattern) for pattern in listing.exclude)


def _matches(path: str, pattern: str) -> bool:
    """Match as `hf download` does: `*` also matches slashes, and `folder/` is all that is in it."""
    return fnmatchcase(path, f"{pattern}*" if pattern.endswith("/") else pattern)


def listing_path(dst: Path) -> Path:
    """Return where the listing of a folder is kept."""
    return dst / STATE_FOLDER / LISTING_FILE


def write_listing(dst: Path, listing: Listing) -> None:
    """Keep the listing beside the files."""
    write_json(listing_path(dst), asdict(listing))


def read_listing(dst: Path) -> Listing | None:
    """Return the kept listing of a folder, None if there is none.

    Raises:
        InputError, SecurityError: it was damaged; see `check_listing`.
    """
    path = listing_path(dst)
    if not path.exists():
        return None
    value = read_json(path)
    if value.keys() != {field.name for field in fields(Listing)} or not isinstance(value["files"], list):
        raise _damaged(path)
    words = [value.pop(name) for name in ("repo", "revision", "commit")]
    include, exclude = value["include"], value["exclude"]
    if not all(map(_are_strings, (words, include, exclude))):
        raise _damaged(path)
    repo, revision, commit = words
    files = tuple(_listed_file(path, entry) for entry in value["files"])
    return check_listing(Listing(repo, revision, commit, files, tuple(include), tuple(exclude)))


def _listed_file(path: Path, entry: Any) -> ListedFile:
    if not isinstance(entry, Mapping) or set(entry) != {"path", "size", "digest"}:
        raise _damaged(path)
    if not _are_strings([entry["path"], entry["digest"]]) or type(entry["size"]) is not int:
        raise _damaged(path)
    return ListedFile(entry["path"], entry["size"], entry["digest"])


def _are_strings(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is str for value in values)


def _damaged(path: Path) -> InputError:
    return InputError(
        str(path),
        expected="the listing that a download keeps",
        found="something else",
        next_step="Remove it and the files it describes, then download again.",
    )
