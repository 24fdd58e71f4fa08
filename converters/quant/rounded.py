"""Weights that were rounded with the help of a text: codes and scales as they will stand in the result.

A folder that a calibration writes beside its statistics, and that a quantization copies from:

    gptq-layer-00003.safetensors   the quantized weights of a layer, under the names, dtypes and shapes of the result
    rounded.json                   written last: how each weight is stored, what it cost, and sha256 of every file
"""

import hashlib
import json
from collections.abc import Container, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from converters.checkpoint.disk_read import read_file
from converters.checkpoint.header import TensorEntry, read_header
from converters.checkpoint.index import checked_path
from converters.checkpoint.plan import OutputTensor, SourceRows, Unit
from converters.config import read_json
from converters.errors import InputError, UsageError
from converters.quant.identity import described, model_digest
from converters.quant.quality import TensorQuality
from converters.quant.scheme import Recipe
from converters.schema import Tensor
from converters.source import Source
from converters.transforms.rows import Copy

SCHEMA = "glm4moe.rounded/1"
MANIFEST = "rounded.json"
_MAX_MANIFEST_BYTES = 256 << 20
# keeps names of the result apart from those of the source, of which one may be the same
_PREFIX = "gptq:"
_HASH_BYTES = 8 << 20


def rounded_folder(stats: Path) -> Path:
    """Return the folder that belongs to a file of statistics."""
    return stats.with_name(f"{stats.name}.gptq")


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


def prove_files(folder: Path, digests: Mapping[str, str]) -> None:
    """Read files of a folder and hold each against its sha256.

    Raises:
        InputError: one is not what was written, or is not there.
    """
    for file, expected in digests.items():
        found = file_digest(checked_path(folder, file))
        if found != expected:
            raise InputError(
                str(folder / file),
                expected=f"sha256 {expected[:12]}",
                found=found[:12],
                next_step="Remove the folder and calibrate anew.",
            )


def _renamed(place: tuple[str, TensorEntry], name: str) -> tuple[str, TensorEntry]:
    return place[0], replace(place[1], name=name)


def file_digest(path: Path) -> str:
    """Return sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_HASH_BYTES):
            digest.update(block)
    return digest.hexdigest()
