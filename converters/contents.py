"""The files of a checkpoint held against the digests that came with them: a manifest, or the listing of a download."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from converters.checkpoint.content_digest import new_hasher
from converters.checkpoint.disk_read import read_file
from converters.checkpoint.header import TensorEntry, read_header
from converters.checkpoint.journal import LISTING_FILE
from converters.checkpoint.manifest import DISTRIBUTION_KEY, MANIFEST_FILE, read_manifest, stray_weights, tensor_record
from converters.errors import InputError
from converters.findings import Finding, fail
from converters.hub.listing import read_listing, select
from converters.hub.verify import check_files
from converters.workers import start_pool

_BLOCK_BYTES = 8 << 20
Progress = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class ContentsReport:
    """The bytes level of a verification.

    Attributes:
        record: what the files were held against; empty if nothing with digests is there.
        files: how many were read.
        bytes: how many bytes were hashed.
        findings: what is not as recorded.
    """

    record: str
    files: int
    bytes: int
    findings: tuple[Finding, ...]


def find_record(folder: Path) -> str:
    """Return the file of a folder that holds digests of the others; empty if there is none."""
    if (folder / MANIFEST_FILE).exists():
        return MANIFEST_FILE
    return LISTING_FILE if read_listing(folder) is not None else ""


def check_contents(folder: Path, num_workers: int, on_start: Callable[[int], Progress]) -> ContentsReport:
    """Hash everything that a folder has a digest for.

    Args:
        folder: a finished result of ours, or a download.
        num_workers: threads.
        on_start: gets the bytes to be hashed and returns what is told of those just hashed, from any thread.
    Raises:
        InputError, SecurityError: the manifest or the listing itself is damaged.
    """
    manifest = read_manifest(folder)
    if manifest is not None:
        return _check_manifest(folder, manifest, num_workers, on_start)
    listing = read_listing(folder)
    if listing is None:
        return ContentsReport("", 0, 0, ())
    files = select(listing).files
    total = sum(file.size for file in files)
    findings = check_files(folder, files, num_workers, on_start(total))
    return ContentsReport(LISTING_FILE, len(files), total, tuple(_of_candidate(finding) for finding in findings))


def _of_candidate(finding: Finding) -> Finding:
    return fail(f"candidate: {finding.subject}", finding.expected, finding.found)


def _check_manifest(
    folder: Path, manifest: Mapping[str, Any], num_workers: int, on_start: Callable[[int], Progress]
) -> ContentsReport:
    tensors = _recorded(folder, manifest)
    total = sum(facts["bytes"] for facts in manifest["shards"].values())
    on_bytes, stop = on_start(total), Event()
    findings = [*_check_side_files(folder, manifest["files"]), *_check_strays(folder, manifest)]
    pool = start_pool(num_workers, "bytes")
    try:
        found = pool.map(lambda file: _check_shard(folder / file, tensors[file], stop, on_bytes), tensors)
        findings += [finding for shard in found for finding in shard]
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
    return ContentsReport(MANIFEST_FILE, len(tensors) + len(manifest["files"]), total, tuple(findings))


def _check_strays(folder: Path, manifest: Mapping[str, Any]) -> list[Finding]:
    # a loader that takes all files of weights there are would load them
    strays = stray_weights(folder, manifest)
    return [fail(f"candidate: {name}", "no such file in the manifest", "one") for name in strays]


def _recorded(folder: Path, manifest: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return what a manifest records of every tensor, by file."""
    tensors: dict[str, dict[str, Any]] = {file: {} for file in manifest["shards"]}
    if DISTRIBUTION_KEY not in manifest:
        for name, facts in manifest["tensors"].items():
            tensors[facts["file"]][name] = facts
        return tensors
    by_rank: dict[int, dict[str, Any]] = {}
    for name, facts in manifest["tensors"].items():
        for part in facts["slices"]:
            # one digest for all ranks of a slice, so copies that differ are seen
            for rank in part["ranks"]:
                by_rank.setdefault(rank, {})[name] = {"dtype": facts["dtype"], **part}
    for file, facts in manifest["shards"].items():
        own = by_rank.get(facts.get("rank"), {})
        tensors[file] = {name: own.pop(name) for name in _names_in(folder / file) if name in own}
    for file, facts in manifest["shards"].items():
        # what none of a rank's files has is missed in the last of them
        tensors[file] |= by_rank.pop(facts.get("rank"), {}) if _is_last(file, manifest["shards"]) else {}
    return tensors


def _is_last(file: str, shards: Mapping[str, Any]) -> bool:
    rank = shards[file].get("rank")
    return file == [name for name, facts in shards.items() if facts.get("rank") == rank][-1]


def _names_in(path: Path) -> list[str]:
    """Return the tensors of a file; none of one that cannot be read, which is reported when it is."""
    try:
        return [entry.name for entry in read_header(path)]
    except (InputError, OSError):
        return []


def _check_side_files(folder: Path, digests: Mapping[str, str]) -> list[Finding]:
    findings = []
    for name, digest in digests.items():
        try:
            found = hashlib.sha256(read_file(folder / name)).hexdigest()
        except (OSError, InputError):
            found = "no such file"
        if found != digest:
            findings.append(fail(f"candidate: {name}", f"sha256 {digest}", found))
    return findings


def _check_shard(
    path: Path, recorded: Mapping[str, Mapping[str, Any]], stop: Event, on_bytes: Progress
) -> list[Finding]:
    """Return what differs in one shard: its header first, then the bytes of each tensor."""
    try:
        entries = {entry.name: entry for entry in read_header(path)}
    except InputError as error:
        return [fail(f"candidate: {path.name}", error.expected, error.found)]
    except OSError:
        return [fail(f"candidate: {path.name}", "a file, as the manifest says", "no such file")]
    findings = [
        fail(f"candidate: tensor {name}", "no such tensor in the manifest", "one")
        for name in sorted(entries.keys() - recorded)
    ]
    with path.open("rb", buffering=0) as file:
        for name, facts in recorded.items():
            finding = _check_tensor(file.fileno(), name, entries.get(name), facts, stop)
            findings += [finding] if finding else []
            on_bytes(entries[name].nbytes if name in entries else 0)
            if stop.is_set():
                break
    return findings


def _check_tensor(
    descriptor: int, name: str, entry: TensorEntry | None, facts: Mapping[str, Any], stop: Event
) -> Finding | None:
    # the shape of a slice follows from the mapping, and is not recorded
    shape = facts.get("shape", list(entry.shape) if entry else "")
    subject, expected = f"candidate: tensor {name}", f"{facts['dtype']} {shape}".rstrip()
    if entry is None:
        return fail(subject, expected, "nothing")
    if (entry.dtype, list(entry.shape)) != (facts["dtype"], shape):
        return fail(subject, expected, f"{entry.dtype} {list(entry.shape)}")
    known = tensor_record(name, facts).content
    digest, position = new_hasher(known.algorithm), 0
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, max(1, entry.nbytes))))
    while position < entry.nbytes and not stop.is_set():
        count = os.preadv(descriptor, [buffer[: entry.nbytes - position]], entry.begin + position)
        if count == 0:
            return fail(subject, f"{entry.nbytes} bytes", f"{position}")
        digest.update(buffer[:count])
        position += count
    found = digest.hexdigest()
    return None if found == known.digest or stop.is_set() else fail(subject, str(known), found)
