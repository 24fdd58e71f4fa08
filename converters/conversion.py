"""A planned conversion: everything about it that is known before data is read."""

import json
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.checkpoint.disk_read import check_link, read_file
from converters.checkpoint.index import INDEX_FILE, PICKLE_SUFFIXES, SUFFIX
from converters.checkpoint.journal import LISTING_FILE, is_job_begun, state_folder
from converters.checkpoint.manifest import MANIFEST_FILE
from converters.checkpoint.plan import OutputPlan
from converters.config import CONFIG_FILE
from converters.errors import UsageError
from converters.pipeline import RunOptions, peak_block_bytes
from converters.source import Source

# code and pickles are never carried along; index and config are written anew
_NOT_COPIED_SUFFIXES = frozenset({SUFFIX, ".py", *PICKLE_SUFFIXES})
_WRITTEN_ANEW = frozenset({INDEX_FILE, CONFIG_FILE, MANIFEST_FILE})


@dataclass(frozen=True)
class Conversion:
    """Everything about a conversion that is known before data is read."""

    source: Source
    plan: OutputPlan
    config: dict[str, Any]
    passthrough: tuple[str, ...]
    command: str
    options: dict[str, Any]

    @property
    def has_index(self) -> bool:
        """Whether the result needs an index: one file by the standard name does not."""
        return len(self.plan.shards) > 1

    @property
    def source_bytes(self) -> int:
        """Bytes of tensor data to be read."""
        return sum(self.source.reader.entry(name).nbytes for name in self.plan.source_names)

    def summary(self, options: RunOptions) -> dict[str, Any]:
        """Return the plan in figures: bytes and counts, ready for a table or JSON."""
        return {
            "source_bytes": self.source_bytes,
            "output_bytes": self.plan.file_bytes,
            "shards": [{"file": shard.file, "bytes": shard.file_bytes} for shard in self.plan.shards],
            "tensors": len(self.plan.weight_map),
            "bytes_by_transform": self.plan.bytes_by_transform,
            "dropped_tensors": len(self.plan.dropped),
            "copied_files": list(self.passthrough),
            "workers": options.num_workers,
            "peak_block_bytes": peak_block_bytes(self.plan, self.source.reader, options),
            "notes": list(self.source.notes),
        }


def passthrough_files(folder: Path) -> tuple[str, ...]:
    """Return the files a conversion copies as they are: tokenizer, chat template, licence, generation config.

    Raises:
        SecurityError: such a file is a link that leaves the repository.
    """
    names = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _WRITTEN_ANEW or path.suffix in _NOT_COPIED_SUFFIXES:
            continue
        check_link(path)
        if path.exists() and stat.S_ISREG(path.stat().st_mode):
            names.append(path.name)
    return tuple(names)


def check_destination(src: Path, dst: Path) -> None:
    """Refuse a destination that is the source, lies inside it, is no folder, or holds anything but our own work.

    Raises:
        UsageError: with the folder's name.
    """
    if dst.resolve().is_relative_to(src.resolve()):
        raise UsageError(f"DST {dst}", expected="a folder outside SRC", found=f"one inside {src}")
    above = next(path for path in (dst, *dst.parents) if path.exists())
    if not above.is_dir():
        raise UsageError(f"DST {dst}", expected="a folder", found="a file" if above == dst else f"the file {above}")
    if is_job_begun(dst) or (dst / MANIFEST_FILE).is_file():
        return
    if (state_folder(dst) / LISTING_FILE).exists():
        raise UsageError(f"DST {dst}", expected="an empty or new folder", found="a download, finished or not")
    if dst.exists() and any(path != state_folder(dst) for path in dst.iterdir()):
        raise UsageError(
            f"DST {dst}",
            expected="an empty or new folder",
            found="files in it",
            next_step="Remove it or choose another; nothing is overwritten.",
        )


def config_bytes(conversion: Conversion) -> bytes:
    """Return config.json: the source's own bytes where nothing changed, else its keys in their order."""
    original = read_file(conversion.source.folder / CONFIG_FILE)
    if conversion.config == json.loads(original):
        return original
    return json.dumps(conversion.config, indent=2, ensure_ascii=False).encode() + b"\n"
