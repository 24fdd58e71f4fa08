"""Which files make up a checkpoint: the input gate that every folder passes before anything is read from it."""

import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from converters.checkpoint.disk_read import check_link
from converters.checkpoint.header import TensorEntry, read_header
from converters.config import CONFIG_FILE, read_json
from converters.errors import InputError, SecurityError

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
MTP_FILE = "mtp.safetensors"
SUFFIX = ".safetensors"
# formats that can run code when opened; they are never opened
PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".npz"})


@dataclass(frozen=True)
class CheckpointIndex:
    """Every tensor of a folder with its file. `notes` says what was accepted although it is unusual.

    `elsewhere` has the folder of each file that was added from another one; such files are no part of the checkpoint.
    """

    folder: Path
    entries: dict[str, tuple[str, TensorEntry]]
    files: tuple[str, ...]
    notes: tuple[str, ...] = ()
    elsewhere: Mapping[str, Path] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data, headers not counted."""
        return sum(entry.nbytes for _, entry in self.entries.values())


def scan_checkpoint(folder: Path) -> CheckpointIndex:
    """Parse all headers of a checkpoint folder and hold them against its index.

    Raises:
        InputError: no checkpoint, a file missing or malformed, index and headers that disagree, a tensor twice.
        SecurityError: only pickled weights, or an index entry that leaves the folder.
    """
    if not folder.is_dir():
        raise InputError(str(folder), expected="a checkpoint folder", found="no such folder")
    weight_map, notes = _weight_map(folder)
    files = sorted(set(weight_map.values())) if weight_map is not None else [_single_file(folder)]
    files, mtp_notes = _add_unlisted_mtp(folder, files)
    entries: dict[str, tuple[str, TensorEntry]] = {}
    for file in files:
        for entry in read_header(checked_path(folder, file)):
            if entry.name in entries:
                raise InputError(
                    f"tensor {entry.name}", expected="one file", found=f"both {entries[entry.name][0]} and {file}"
                )
            entries[entry.name] = (file, entry)
    if weight_map is not None:
        _check_index(folder, weight_map, entries)
    return CheckpointIndex(folder, entries, tuple(files), (*notes, *mtp_notes))


def has_weights(folder: Path) -> bool:
    """Return whether config.json and all weights that the index names are in a folder; nothing is held against them."""
    weight_map, _ = _weight_map(folder)
    files = set(weight_map.values()) if weight_map is not None else {SINGLE_FILE}
    return all((folder / name).is_file() for name in (CONFIG_FILE, *files))


def checked_path(folder: Path, file: str) -> Path:
    """Return folder/file if it is a plain, regular safetensors file that stays inside its repository.

    Raises:
        SecurityError: the name or what it points at leaves the folder, or is no regular file.
        InputError: there is no such file.
    """
    plain = file == Path(file).name and "\\" not in file and ":" not in file and file.isprintable()
    if not plain or file.startswith(".") or not file.endswith(SUFFIX):
        raise SecurityError(f"{folder / INDEX_FILE}: {file!r}", expected="a plain *.safetensors file name")
    path = folder / file
    check_link(path)
    if not path.exists():
        raise InputError(
            str(path),
            expected="a file that the index or the manifest names",
            found="none",
            next_step="The checkpoint is incomplete; fetch it again.",
        )
    if not stat.S_ISREG(path.stat().st_mode):
        raise SecurityError(str(path), expected="a regular file", found="something else")
    return path


def _weight_map(folder: Path) -> tuple[dict[str, str] | None, list[str]]:
    path = folder / INDEX_FILE
    if not path.exists():
        return None, []
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or any(type(v) is not str for v in weight_map.values()):
        raise InputError(str(path), expected="weight_map from tensor names to file names", found="none")
    return weight_map, []


def _single_file(folder: Path) -> str:
    found = sorted(path.name for path in folder.iterdir() if path.name.endswith(SUFFIX))
    if found == [SINGLE_FILE] or found == sorted([SINGLE_FILE, MTP_FILE]):
        return SINGLE_FILE
    if found:
        raise InputError(
            str(folder / INDEX_FILE),
            expected=f"an index for the {len(found)} safetensors files",
            found="none",
            next_step="The checkpoint is incomplete, still being written, or cut for ranks: --merge of shard joins it.",
        )
    pickled = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLE_SUFFIXES)
    if pickled:
        raise SecurityError(
            str(folder / pickled[0]),
            expected="safetensors",
            found="a pickled file",
            next_step="Pickled weights can run code and are never opened.",
        )
    raise InputError(str(folder), expected="safetensors files", found="none")


def _add_unlisted_mtp(folder: Path, files: list[str]) -> tuple[list[str], list[str]]:
    """Take in an mtp.safetensors that the index forgot: several published checkpoints have one."""
    if MTP_FILE in files or not (folder / MTP_FILE).exists():
        return files, []
    return [*files, MTP_FILE], [f"{MTP_FILE} is not in the index; its tensors were taken in."]


def _check_index(folder: Path, weight_map: dict[str, str], entries: dict[str, tuple[str, TensorEntry]]) -> None:
    path = folder / INDEX_FILE
    for name, file in weight_map.items():
        found = entries.get(name)
        if found is None or found[0] != file:
            raise InputError(
                f"tensor {name}",
                expected=f"in {file}, as {path} says",
                found=f"it in {found[0]}" if found else "it in no file",
            )
    for name, (file, _) in entries.items():
        if name not in weight_map and file != MTP_FILE:
            raise InputError(f"tensor {name}", expected=f"listed in {path}", found=f"only in {file}")
