"""Writes what `converters.quant.rounded` describes, layer by layer, and removes what was not finished."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from converters.blocks import as_bytes
from converters.checkpoint.plan import OutputTensor, Shard, Unit
from converters.checkpoint.writer import ShardWriter, disk_errors, remove_partials, write_file
from converters.quant.quality import TensorQuality
from converters.quant.rounded import MANIFEST, SCHEMA, file_digest, recipe_json
from converters.quant.scheme import Recipe
from converters.transforms.rows import Copy

if TYPE_CHECKING:
    import torch

_LAYER = re.compile(r"gptq-layer-\d{5}\.safetensors")


def layer_file(layer: int) -> str:
    """Return the name of a layer's file."""
    return f"gptq-layer-{layer:05d}.safetensors"


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
        self.digests[self._layer.path.name] = file_digest(self._layer.path)
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
