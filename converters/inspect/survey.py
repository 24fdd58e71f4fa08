"""Read everything that a folder's headers, index and config say, and collect what is wrong instead of stopping.

The strict counterpart, for commands that go on to read weights, is `checkpoint.index.scan_checkpoint`. What is refused
for security is refused here too: a file that leaves the folder, pickled weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.checkpoint.header import TensorEntry, read_header
from converters.checkpoint.index import (
    INDEX_FILE,
    MTP_FILE,
    PICKLE_SUFFIXES,
    SINGLE_FILE,
    SUFFIX,
    checked_path,
)
from converters.checkpoint.journal import state_folder
from converters.checkpoint.manifest import MANIFEST_FILE
from converters.checkpoint.writer import PARTIAL_SUFFIX
from converters.config import CONFIG_FILE, Glm4MoeConfig, read_json
from converters.errors import ConfigError, InputError, SecurityError
from converters.hub.listing import listing_path, read_listing, select
from converters.inspect import catalog
from converters.inspect.catalog import Check, CheckFinding


@dataclass(slots=True)
class Survey:
    """What a folder holds. Tensors of a file that cannot be read are in `unreadable`, with their file.

    Attributes:
        entries: every readable tensor with its file; the first place if it is in two files.
        file_bytes: size of each file that belongs to the checkpoint.
        announced_bytes: total_size of the index.
    """

    folder: Path
    raw_config: dict[str, Any] = field(default_factory=dict)
    config: Glm4MoeConfig | None = None
    entries: dict[str, tuple[str, TensorEntry]] = field(default_factory=dict)
    unreadable: dict[str, str] = field(default_factory=dict)
    file_bytes: dict[str, int] = field(default_factory=dict)
    announced_bytes: int | None = None
    findings: list[CheckFinding] = field(default_factory=list)

    def report(self, check: Check, subject: str, expected: str, found: str) -> None:
        """Add a finding; paths inside the folder are shown relative to it."""
        self.findings.append(CheckFinding(check, subject.removeprefix(f"{self.folder}/"), expected, found))

    def report_error(self, check: Check, error: InputError) -> None:
        """Add what an exception says as a finding."""
        self.report(check, error.subject, error.expected, error.found)


def survey(folder: Path) -> Survey:
    """Read config, index and all headers of a folder.

    Raises:
        SecurityError: only pickled weights, or an index entry or link that leaves the folder.
    """
    result = Survey(folder)
    _read_config(result)
    weight_map = _read_index(result)
    files = _choose_files(result, weight_map)
    _report_unfinished(result)
    for file in files:
        _read_file(result, file, weight_map or {})
    if weight_map is not None:
        _compare_index(result, weight_map)
    code = sorted(path.name for path in folder.glob("*.py"))
    if code or "auto_map" in result.raw_config:
        found = ", ".join(code) or "auto_map"
        result.report(catalog.CUSTOM_CODE, code[0] if code else CONFIG_FILE, "no code", found)
    return result


def _read_config(result: Survey) -> None:
    try:
        result.raw_config = read_json(result.folder / CONFIG_FILE)
        result.config = Glm4MoeConfig.from_hf(result.raw_config)
    except ConfigError as error:
        result.report_error(catalog.CONFIG, error)


def _read_index(result: Survey) -> dict[str, str] | None:
    """Return weight_map of the index; None where there is no index or none that can be used."""
    path = result.folder / INDEX_FILE
    if not path.exists():
        return None
    try:
        index = read_json(path)
    except ConfigError as error:
        result.report_error(catalog.INDEX, error)
        return None
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or any(type(file) is not str for file in weight_map.values()):
        result.report(catalog.INDEX, INDEX_FILE, "weight_map from tensor names to file names", "none")
        return None
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    result.announced_bytes = total if type(total) is int else None
    return weight_map


def _choose_files(result: Survey, weight_map: dict[str, str] | None) -> list[str]:
    """Return the files to read: what the index names, and a forgotten MTP file; without an index, all there are."""
    present = sorted(path.name for path in result.folder.iterdir() if _is_weights(path.name))
    if weight_map is None:
        if not present:
            _refuse_pickles(result.folder)
            result.report(catalog.NO_WEIGHTS, "folder", "safetensors files", "none")
        return present
    listed = sorted(set(weight_map.values()))
    for file in present:
        if file not in listed:
            found = "one that is not named; its tensors were taken in" if file == MTP_FILE else "one that is not named"
            result.report(catalog.FILE_UNLISTED, file, f"only files that {INDEX_FILE} names", found)
    return [*listed, MTP_FILE] if MTP_FILE in present and MTP_FILE not in listed else listed


def _is_weights(name: str) -> bool:
    return name.endswith(SUFFIX) and not name.startswith(".")


def _refuse_pickles(folder: Path) -> None:
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise SecurityError(
            str(folder / pickled[0]),
            expected="safetensors",
            found="a pickled file",
            next_step="Pickled weights can run code and are never opened.",
        )


def _report_unfinished(result: Survey) -> None:
    for found in unfinished(result.folder):
        result.report(catalog.UNFINISHED, "folder", "a finished checkpoint", found)


def unfinished(folder: Path) -> Iterator[str]:
    """Yield the signs that a folder is still being written."""
    names = sorted(path.name for path in folder.iterdir())
    state = state_folder(folder)
    if listing_path(folder).exists():
        yield from _not_downloaded(folder)
    elif state.name in names and MANIFEST_FILE not in names:
        yield f"{state.name}, the state of a run that has not ended"
    partial = [name for name in names if name.endswith((PARTIAL_SUFFIX, ".incomplete"))]
    if partial:
        yield f"{partial[0]}, a file that is only partly written"
    weights = [name for name in names if _is_weights(name)]
    if INDEX_FILE not in names and not set(weights) <= {SINGLE_FILE, MTP_FILE}:
        yield f"{len(weights)} safetensors files without {INDEX_FILE}"
    elif weights == [MTP_FILE] and INDEX_FILE not in names:
        yield f"{MTP_FILE} alone"


def _not_downloaded(folder: Path) -> Iterator[str]:
    """Yield what a download, whose listing is kept in the folder, has not brought yet."""
    try:
        listing = read_listing(folder)
        files = select(listing).files if listing else ()
    except InputError as error:
        yield f"a record of the download that is damaged: {error.found}"
        return
    sizes = {file.path: file.size for file in files}
    absent = [path for path in sizes if not (folder / path).is_file() or (folder / path).stat().st_size != sizes[path]]
    if absent:
        yield f"{len(absent)} of {len(sizes)} files still to be downloaded, the first {absent[0]}"


def _read_file(result: Survey, file: str, weight_map: dict[str, str]) -> None:
    listed = [name for name, place in weight_map.items() if place == file]
    try:
        path = checked_path(result.folder, file)
    except InputError as error:
        result.report(catalog.FILE_MISSING, file, f"a file, for {len(listed)} tensors", error.found)
        result.unreadable |= dict.fromkeys(listed, file)
        return
    result.file_bytes[file] = path.stat().st_size
    try:
        entries = read_header(path)
    except InputError as error:
        result.report_error(catalog.FILE_DAMAGED, error)
        result.unreadable |= dict.fromkeys(listed, file)
        return
    for entry in entries:
        first = result.entries.setdefault(entry.name, (file, entry))
        if first[0] != file:
            result.report(catalog.TENSOR_TWICE, f"tensor {entry.name}", "one file", f"both {first[0]} and {file}")


def _compare_index(result: Survey, weight_map: dict[str, str]) -> None:
    """Hold the index against the headers, one finding per file."""
    absent: dict[str, list[str]] = {}
    for name, file in weight_map.items():
        if name not in result.unreadable and (name not in result.entries or result.entries[name][0] != file):
            absent.setdefault(file, []).append(name)
    for file, names in absent.items():
        place = result.entries.get(names[0])
        found = f"{names[0]} in {place[0] if place else 'no file'}{_more(names)}"
        result.report(catalog.INDEX_DISAGREES, file, "the tensors that the index lists", found)
    unlisted: dict[str, list[str]] = {}
    for name, (file, _) in result.entries.items():
        if name not in weight_map and file != MTP_FILE:
            unlisted.setdefault(file, []).append(name)
    for file, names in unlisted.items():
        found = f"{names[0]}, which it does not list{_more(names)}"
        result.report(catalog.INDEX_DISAGREES, file, "only tensors that the index lists", found)
    total = sum(entry.nbytes for _, entry in result.entries.values())
    if result.announced_bytes is not None and not result.unreadable and result.announced_bytes != total:
        result.report(catalog.TOTAL_SIZE, INDEX_FILE, f"total_size {total}", str(result.announced_bytes))


def _more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
