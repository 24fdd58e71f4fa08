"""Weights that were rounded with the help of a text: codes and scales as they will stand in the result.

A folder that a calibration writes beside its statistics, and that a quantization copies from:

    gptq-layer-00003.safetensors   the quantized weights of a layer, under the names, dtypes and shapes of the result
    rounded.json                   written last: how each weight is stored, what it cost, and sha256 of every file
"""

import hashlib
import json
import os
import re
from collections.abc import Container, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from converters.blocks import as_bytes
from converters.checkpoint.disk_read import read_file
from converters.checkpoint.header import TensorEntry, read_header
from converters.checkpoint.index import checked_path
from converters.checkpoint.plan import OutputTensor, Shard, SourceRows, Unit
from converters.checkpoint.writer import ShardWriter, disk_errors, remove_partials, write_file
from converters.config import read_json
from converters.errors import InputError, UsageError
from converters.quant.identity import described, model_digest
from converters.quant.quality import TensorQuality
from converters.quant.scheme import Recipe
from converters.schema import Tensor
from converters.source import Source
from converters.transforms.rows import Copy

if TYPE_CHECKING:
    import torch

SCHEMA = "glm4moe.rounded/1"
MANIFEST = "rounded.json"
_MAX_MANIFEST_BYTES = 256 << 20
# keeps names of the result apart from those of the source, of which one may be the same
_PREFIX = "gptq:"
_HASH_BYTES = 8 << 20
_LAYER = re.compile(r"gptq-layer-\d{5}\.safetensors")


def rounded_folder(stats: Path) -> Path:
    """Return the folder that belongs to a file of statistics."""
    return stats.with_name(f"{stats.name}.gptq")


def layer_file(layer: int) -> str:
    """Return the name of a layer's file."""
    return f"gptq-layer-{layer:05d}.safetensors"


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe in values that JSON has."""
    return {name: value if isinstance(value, int) else str(value) for name, value in asdict(recipe).items()}


@dataclass(frozen=True)
class Rounded:
    """A finished folder.

    Args:
        folder: where it lies.
        provenance: that of the statistics it was made with.
        recipes: how each weight is stored, by the tensor's name.
        entries: file and place of each tensor, by the name it has in the result.
        digests: sha256 of each file.
        sha256: of rounded.json, which has the digests of all files.
        quality: errors of the codes, by the name of the tensor that holds them.
    """

    folder: Path
    provenance: dict[str, Any]
    recipes: dict[str, dict[str, Any]]
    entries: dict[str, tuple[str, TensorEntry]]
    digests: dict[str, str]
    sha256: str
    quality: dict[str, TensorQuality]

    @classmethod
    def load(cls, folder: Path) -> "Rounded":
        """Read manifest and headers; data is not read.

        Raises:
            UsageError: there is none, or it is unfinished. InputError: it is damaged.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise UsageError(
                f"rounded weights {folder}",
                expected=f"a folder with {MANIFEST}",
                found="an unfinished one" if folder.is_dir() else "none",
                next_step="Run 'glm4moe calibrate' with --method gptq again, or quantize with --calibrate TEXT.",
            )
        raw = read_json(path, _MAX_MANIFEST_BYTES)
        if raw.get("schema") != SCHEMA or not all(
            isinstance(raw.get(key), dict) for key in ("files", "recipes", "provenance", "quality")
        ):
            raise InputError(str(path), expected=f"a manifest of the form {SCHEMA}", found="something else")
        entries = {
            entry.name: (file, entry)
            for file in sorted(raw["files"])
            for entry in read_header(checked_path(folder, file))
        }
        digest = hashlib.sha256(read_file(path)).hexdigest()
        quality = {name: TensorQuality(**errors) for name, errors in raw["quality"].items()}
        return cls(folder, raw["provenance"], raw["recipes"], entries, raw["files"], digest, quality)

    def prove(self) -> None:
        """Read every file and hold it against its digest.

        Raises:
            InputError: one is not what was written.
        """
        prove_files(self.folder, self.digests)

    def beside(self, source: Source, recipes: Container[str]) -> Source:
        """Return a source whose reader also has the codes and scales of these weights, under names of their own.

        Raises:
            UsageError: they were made of another model.
        """
        digest, found = model_digest(source), self.provenance.get("model_digest")
        if found != digest:
            raise UsageError(
                f"rounded weights {self.folder}",
                expected=f"those of the model in {source.folder}",
                found=described(found, digest),
                next_step="Run quantize with --method gptq and --calibrate TEXT.",
            )
        index = source.reader.index
        names = [name for name in self.entries if source.schema.locate(name).name in recipes]
        added = {f"{_PREFIX}{name}": _renamed(self.entries[name], f"{_PREFIX}{name}") for name in names}
        elsewhere = dict.fromkeys((file for file, _ in added.values()), self.folder)
        wider = replace(index, entries={**index.entries, **added}, elsewhere={**index.elsewhere, **elsewhere})
        return replace(source, reader=source.reader.widened(wider))

    @property
    def _copy(self) -> Copy:
        # two calibrations round a weight differently: what one made is not to be taken for the other's
        return Copy(name=f"gptq {self.sha256[:12]}")

    def units(self, tensor: Tensor, wanted: Unit, recipe: Recipe) -> list[Unit]:
        """Return what copies the codes and scales of a weight that a unit would make by rounding.

        Raises:
            UsageError: the weight is not in the folder, or is stored otherwise there.
        """
        found = self.recipes.get(tensor.name)
        if found != recipe_json(recipe):
            raise UsageError(
                f"rounded weights {self.folder}: {tensor.module}",
                expected=json.dumps(recipe_json(recipe)),
                found="nothing" if found is None else json.dumps(found),
                next_step="They were made with other options; calibrate anew with these.",
            )
        units = []
        for number, output in enumerate(wanted.outputs):
            entry = self.entries[output.name][1] if output.name in self.entries else None
            if entry is None or (entry.dtype, entry.shape) != (output.dtype, output.shape):
                raise InputError(
                    f"{self.folder}: tensor {output.name}",
                    expected=f"{output.dtype} {list(output.shape)}",
                    found="none" if entry is None else f"{entry.dtype} {list(entry.shape)}",
                )
            rows = SourceRows(f"{_PREFIX}{output.name}", 0, output.rows)
            whole = OutputTensor(output.name, output.dtype, output.shape)
            equals = () if number else wanted.sources
            units.append(Unit((whole,), (rows,), self._copy, equals, quality=self.quality.get(output.name)))
        return units


class RoundedWriter:
    """Writes a folder, layer by layer; a layer's file has its name only when it is complete.

    Args:
        folder: made if need be; what an earlier, unfinished run left in it is written over.
        can_resume: whoever began it goes on with it later: what is finished stays where a run does not end well.
    Attributes:
        digests: sha256 of each finished file; a run that goes on puts in those of its predecessor.
    """

    def __init__(self, folder: Path, *, can_resume: bool = False) -> None:
        self.folder = folder
        self.digests: dict[str, str] = {}
        self._can_resume = can_resume
        self._layer: ShardWriter | None = None
        with disk_errors(folder):
            folder.mkdir(exist_ok=True)
            remove_partials(folder, {MANIFEST})
            (folder / MANIFEST).unlink(missing_ok=True)

    def clear(self) -> None:
        """Remove what an earlier run left."""
        remove_unfinished(self.folder)
        with disk_errors(self.folder):
            self.folder.mkdir(exist_ok=True)

    def begin(self, layer: int, outputs: Sequence[OutputTensor]) -> None:
        """Make room for the tensors of a layer.

        Raises:
            ResourceError: the disk has none.
        """
        assert self._layer is None, self._layer
        units = tuple(Unit((output,), (), Copy()) for output in outputs)
        remove_partials(self.folder, {layer_file(layer)})
        self._layer = ShardWriter(self.folder, Shard(layer_file(layer), units))
        self._layer.open()

    def write(self, name: str, value: "torch.Tensor") -> None:
        """Write a tensor of the layer that was begun."""
        assert self._layer is not None, name
        self._layer.write(name, 0, as_bytes(value.reshape(-1)))

    def end(self) -> None:
        """Give the layer's file its name."""
        assert self._layer is not None
        self._layer.finish()
        self.digests[self._layer.path.name] = _digest(self._layer.path)
        self._layer = None

    def __enter__(self) -> "RoundedWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Remove what is unfinished if the run did not end well; everything, unless it can be gone on with."""
        if kind is None:
            return
        if self._layer is not None:
            self._layer.abort()
        if self._can_resume and self.digests:
            return
        with suppress(OSError):
            for file in self.digests:
                (self.folder / file).unlink(missing_ok=True)
            self.folder.rmdir()

    def finish(
        self,
        provenance: Mapping[str, Any],
        recipes: Mapping[str, Recipe],
        report: Mapping[str, Any],
        quality: Mapping[str, TensorQuality],
    ) -> None:
        """Write the manifest; with it, the folder is finished.

        Args:
            provenance: of the statistics.
            recipes: how each weight is stored, by the tensor's name.
            report: errors on the text, by module.
            quality: errors of the codes, by the name of the tensor that holds them.
        """
        facts = {
            "schema": SCHEMA,
            "provenance": provenance,
            "files": self.digests,
            "recipes": {name: recipe_json(recipe) for name, recipe in recipes.items()},
            "errors": report,
            "quality": {name: asdict(errors) for name, errors in quality.items()},
        }
        text = json.dumps(facts, indent=1, sort_keys=True, allow_nan=False)
        write_file(self.folder / MANIFEST, text.encode() + b"\n")


def prove_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Read files of a folder and hold each against its sha256.

    Raises:
        InputError: one is not what was written, or is not there.
    """
    for file, expected in digests.items():
        found = _digest(checked_path(folder, file))
        if found != expected:
            raise InputError(
                str(folder / file),
                expected=f"sha256 {expected[:12]}",
                found=found[:12],
                next_step="Remove the folder and calibrate anew.",
            )


def remove_unfinished(folder: Path) -> None:
    """Remove what runs left that did not come to their end; a finished folder stays as it is."""
    if (folder / MANIFEST).is_file() or not folder.is_dir():
        return
    with disk_errors(folder):
        layers = {match[0] for entry in os.listdir(folder) if (match := _LAYER.search(entry))}
        remove_partials(folder, {*layers, MANIFEST})
        for layer in layers:
            (folder / layer).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def _renamed(place: tuple[str, TensorEntry], name: str) -> tuple[str, TensorEntry]:
    return place[0], replace(place[1], name=name)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
