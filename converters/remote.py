"""A checkpoint on the hub, seen without its weights: JSON files, and the header of every safetensors file.

They are laid down as a folder in which each safetensors file has its true size and header, and a hole where the
weights are. Whatever reads headers reads that folder like any other.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from converters.checkpoint.header import MAX_HEADER_BYTES
from converters.checkpoint.index import INDEX_FILE, SUFFIX
from converters.config import CONFIG_FILE, MAX_JSON_BYTES
from converters.errors import InputError, UsageError
from converters.hub.listing import ListedFile, Listing, is_pickled
from converters.workers import start_pool

DEFAULT_REVISION = "main"
# small ranges that are asked for side by side
REQUESTS_AT_ONCE = 8
# beside config and index: what else says how the weights are stored
JSON_FILES = frozenset({CONFIG_FILE, INDEX_FILE, "hf_quant_config.json"})
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95})(?:@([\w./-]{1,200}))?", re.ASCII)
_PREFIX_BYTES = 8


class RangeClient(Protocol):
    """The hub, as far as looking at headers needs it."""

    def list_files(self, repo: str, revision: str) -> Listing:
        """Return the listing of the commit that a revision is at."""

    def read_range(self, listing: Listing, file: ListedFile, begin: int, end: int) -> bytes:
        """Return bytes [begin, end) of a file of that commit."""


@dataclass(frozen=True, slots=True)
class HubId:
    """A repository and a revision: branch, tag or commit."""

    repo: str
    revision: str

    @classmethod
    def parse(cls, text: str) -> "HubId | None":
        """Take `org/name` or `org/name@revision` apart; None if the text is neither."""
        match = _HUB_ID.fullmatch(text)
        if match is None or ".." in text:
            return None
        return cls(match[1], match[2] or DEFAULT_REVISION)

    @property
    def revision_option(self) -> str:
        """What a command line has after the repository to download this revision; nothing for the default one."""
        return "" if self.revision == DEFAULT_REVISION else f" --revision {self.revision}"


def fetch_headers(client: RangeClient, hub_id: HubId, folder: Path) -> Listing:
    """Lay down a repository's JSON files and headers in an empty folder; no weights are fetched.

    Raises:
        NetworkError: the hub cannot be reached, or refuses.
        InputError: a header that is longer than its file.
        UsageError: not a checkpoint.
    """
    listing = client.list_files(hub_id.repo, hub_id.revision)
    lay_down_headers(client, listing, folder)
    for file in listing.files:
        # that there are such files is a fact about the checkpoint; they are never fetched
        if "/" not in file.path and (is_pickled(file.path) or file.path.endswith(".py")):
            (folder / file.path).touch()
    return listing


def lay_down_headers(client: RangeClient, listing: Listing, folder: Path) -> None:
    """Lay down the JSON files and headers of a pinned commit; see `fetch_headers` for what is raised."""
    files = [file for file in listing.files if "/" not in file.path]
    wanted = [file for file in files if file.path.endswith(SUFFIX) or file.path in JSON_FILES]
    if not any(file.path == CONFIG_FILE for file in wanted):
        raise UsageError(listing.repo, expected=f"a repository with {CONFIG_FILE}", found="none in it")

    def lay_down(file: ListedFile) -> None:
        if file.path.endswith(SUFFIX):
            _lay_down_header(client, listing, file, folder / file.path)
        else:
            _lay_down_json(client, listing, file, folder / file.path)

    with start_pool(REQUESTS_AT_ONCE, "headers") as pool:
        list(pool.map(lay_down, wanted))


def _lay_down_json(client: RangeClient, listing: Listing, file: ListedFile, path: Path) -> None:
    if file.size > MAX_JSON_BYTES:
        raise InputError(
            f"{listing.repo}: {file.path}", expected=f"at most {MAX_JSON_BYTES >> 20} MB", found=f"{file.size} bytes"
        )
    path.write_bytes(client.read_range(listing, file, 0, file.size) if file.size else b"")


def _lay_down_header(client: RangeClient, listing: Listing, file: ListedFile, path: Path) -> None:
    with path.open("wb") as output:
        if file.size >= _PREFIX_BYTES:
            prefix = client.read_range(listing, file, 0, _PREFIX_BYTES)
            output.write(prefix)
            (length,) = struct.unpack("<Q", prefix)
            # a length that cannot be is left to the reader of the folder, who says so
            if 0 < length <= min(MAX_HEADER_BYTES, file.size - _PREFIX_BYTES):
                output.write(client.read_range(listing, file, _PREFIX_BYTES, _PREFIX_BYTES + length))
        output.truncate(file.size)
