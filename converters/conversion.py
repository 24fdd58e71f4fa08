"""A planned conversion: everything about it that is known before data is read."""

import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import converters
from converters.checkpoint.disk_read import check_link, read_file
from converters.checkpoint.index import INDEX_FILE, PICKLE_SUFFIXES, SUFFIX
from converters.checkpoint.journal import LISTING_FILE, TensorRecord, is_job_begun, state_folder
from converters.checkpoint.manifest import MANIFEST_FILE, plan_digest, source_digest
from converters.checkpoint.plan import OutputPlan, Shard, Unit
from converters.config import CONFIG_FILE
from converters.errors import InputError, UsageError
from converters.pipeline import RunOptions, block_kinds, peak_block_bytes
from converters.source import Source

# code and pickles are never carried along; index and config are written anew
_NOT_COPIED_SUFFIXES = frozenset({SUFFIX, ".py", *PICKLE_SUFFIXES})
_WRITTEN_ANEW = frozenset({INDEX_FILE, CONFIG_FILE, MANIFEST_FILE})
FromRecords = Callable[[Mapping[str, TensorRecord]], bytes]


@dataclass(frozen=True)
class Conversion:
    """Everything about a conversion that is known before data is read.

    Attributes:
        source: where it reads.
        plan: the shards.
        config: config.json of the result.
        passthrough: files that are copied as they are.
        command: who planned it.
        options: what makes it another job.
        generated: further files of the result, by name: their content, or what makes it from the tensors' records.
        notes: what the user should know of the result, a sentence each.
        limits: which parallel sizes it fits, by part of the model; empty where nothing limits them but the model.
        engines: what loads it; None: whatever loads its layout.
    """

    source: Source
    plan: OutputPlan
    config: dict[str, Any]
    passthrough: tuple[str, ...]
    command: str
    options: dict[str, Any]
    generated: "Mapping[str, bytes | FromRecords]" = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    limits: Mapping[str, str] = field(default_factory=dict)
    engines: tuple[str, ...] | None = None

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the job is, as JSON has it; two runs with the same identity write the same bytes."""
        return {
            "command": self.command,
            "version": converters.__version__,
            "options": json.loads(json.dumps(self.options)),
            "source": source_digest(self.source.reader, self.source.raw_config),
            "plan": plan_digest(self.plan),
        }

    @property
    def has_index(self) -> bool:
        """Whether the result needs an index: one file by the standard name does not, nor do files for ranks."""
        return len(self.plan.shards) > 1 and self.plan.distribution is None

    @property
    def source_bytes(self) -> int:
        """Bytes of tensor data to be read."""
        return sum(self.source.reader.entry(name).nbytes for name in self.plan.source_names)

    @cached_property
    def _block_kinds(self) -> list[tuple[Unit, int]]:
        return block_kinds(self.plan, self.source.reader)

    def peak_block_bytes(self, options: RunOptions) -> int:
        """Return the most bytes that blocks take at once; see `pipeline.peak_block_bytes`.

        Raises:
            ResourceError: max_memory does not hold one row for each worker.
        """
        return peak_block_bytes(self._block_kinds, options)

    def summary(self, options: RunOptions) -> dict[str, Any]:
        """Return the plan in figures: bytes and counts, ready for a table or JSON."""
        return {
            "source_bytes": self.source_bytes,
            "output_bytes": self.plan.file_bytes,
            "shards": [_shard_summary(shard) for shard in self.plan.shards],
            "tensors": self.plan.num_tensors,
            "bytes_by_transform": self.plan.bytes_by_transform,
            "dropped_tensors": len(self.plan.dropped),
            "copied_files": list(self.passthrough),
            "workers": options.num_workers,
            "peak_block_bytes": self.peak_block_bytes(options),
            "notes": [*self.source.notes, *self.notes],
            **({"limits": dict(self.limits)} if self.limits else {}),
            **({"distribution": self.plan.distribution.as_json()} if self.plan.distribution else {}),
        }


def _shard_summary(shard: Shard) -> dict[str, Any]:
    facts: dict[str, Any] = {"file": shard.file, "bytes": shard.file_bytes}
    return facts if shard.rank is None else {**facts, "rank": shard.rank}


def passthrough_files(folder: Path) -> tuple[str, ...]:
    """Return the files a conversion copies as they are: tokenizer, chat template, licence, generation config.

    Raises:
        SecurityError: such a file is a link that leaves the repository. InputError: its name is not UTF-8.
    """
    names = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.name in _WRITTEN_ANEW or path.suffix in _NOT_COPIED_SUFFIXES:
            continue
        check_link(path)
        if path.exists() and stat.S_ISREG(path.stat().st_mode):
            names.append(_utf8_name(path))
    return tuple(names)


def _utf8_name(path: Path) -> str:
    """Return the file's name: the journal and the manifest hold it, and they are UTF-8."""
    try:
        path.name.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{path.parent}: file {path.name!r}",
            expected="a name in UTF-8",
            found="other bytes",
            next_step="Rename it or remove it.",
        ) from error
    return path.name


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
    # before the records are looked for: of another run, they come before any other file and go after all are there
    has_files = dst.exists() and any(path != state_folder(dst) for path in dst.iterdir())
    if is_job_begun(dst) or (dst / MANIFEST_FILE).is_file():
        return
    if (state_folder(dst) / LISTING_FILE).exists():
        raise UsageError(f"DST {dst}", expected="an empty or new folder", found="a download, finished or not")
    if has_files:
        raise UsageError(
            f"DST {dst}",
            expected="an empty or new folder",
            found="files in it",
            next_step="Remove it or choose another; nothing is overwritten.",
        )


def side_bytes(conversion: Conversion, name: str, records: Mapping[str, TensorRecord]) -> bytes:
    """Return the content of a file beside the weights: copied from the source, or generated.

    Args:
        name: of the file.
        records: of all written tensors.
    """
    generated = conversion.generated.get(name)
    if generated is None:
        return read_file(conversion.source.folder / name)
    return generated if isinstance(generated, bytes) else generated(records)


def config_bytes(conversion: Conversion) -> bytes:
    """Return config.json: the source's own bytes where nothing changed, else its keys in their order."""
    original = read_file(conversion.source.folder / CONFIG_FILE)
    if conversion.config == json.loads(original):
        return original
    return json.dumps(conversion.config, indent=2, ensure_ascii=False).encode() + b"\n"
