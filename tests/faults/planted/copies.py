"""Copies of the trained fixture in memory, in several formats, and tools to damage them as converters would."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from builders import read_tensors
from quantized_from import MAKERS, plain_modules, quantize
from safetensors.torch import save_file

from converters.config import Glm4MoeConfig
from converters.job import run
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.schema import ModelSchema, Role, Tensor
from converters.shard.mapping import ParallelMapping
from converters.shard.plan import ShardOptions, plan_shard
from converters.source import open_source

TINY = Path(__file__).resolve().parents[3] / "fixtures" / "tiny"
BF16, FP8, FP8_BLOCK, INT8, INT8_PACKED, NVFP4 = "bf16", "fp8", "fp8-block", "int8", "int8-packed", "nvfp4"
SHARDED, SHARDED_FP8 = "sharded bf16", "sharded fp8"
_SCHEMES = {FP8: "fp8", INT8: "int8", INT8_PACKED: "int8-weight-only", NVFP4: "nvfp4-weight-only"}
Tensors = dict[str, torch.Tensor]


@dataclass
class Copy:
    """A checkpoint in memory.

    Attributes:
        tensors: stored tensors by name.
        config: of config.json.
        files: bytes of the files beside the weights.
        unlisted: tensors that the index does not list.
    """

    tensors: Tensors
    config: dict[str, Any]
    files: dict[str, bytes]
    unlisted: set[str] = field(default_factory=set)

    def fresh(self) -> "Copy":
        """Return a copy that can be changed; tensors are only ever replaced, never written into."""
        return replace(
            self,
            tensors=dict(self.tensors),
            config=json.loads(json.dumps(self.config)),
            files=dict(self.files),
            unlisted=set(),
        )

    @property
    def schema(self) -> ModelSchema:
        return schema()

    def write(self, folder: Path) -> Path:
        """Write it in one file, with an index, and no manifest that would tell of any change."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        (folder / "config.json").write_text(json.dumps(self.config))
        file = "model-00001-of-00001.safetensors"
        save_file({name: value.contiguous() for name, value in self.tensors.items()}, folder / file)
        listed = {name: file for name in self.tensors if name not in self.unlisted}
        index = {"metadata": {}, "weight_map": listed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return folder

    # tensors by what they are

    def name(self, role: Role, part: str, layer: int | None = None, expert: int | None = None) -> str:
        return self.schema.tensor(role, part, layer, expert).name

    def parts(self, name: str) -> dict[str, str]:
        """Return the stored parts of a weight by suffix; a tensor without companions has one, the empty one."""
        if name in self.tensors and not name.endswith(".weight"):
            return {"": name}
        module = name.removesuffix("weight")
        return {stored.removeprefix(module): stored for stored in self.tensors if stored.startswith(module + "weight")}

    def exchange(self, first: str, second: str) -> None:
        """Let two weights hold each other's parts."""
        ours, theirs = self.parts(first), self.parts(second)
        assert ours.keys() == theirs.keys(), (ours, theirs)
        for suffix, name in ours.items():
            other = theirs[suffix]
            self.tensors[name], self.tensors[other] = self.tensors[other], self.tensors[name]

    def assign(self, to: str, source: str) -> None:
        """Let a weight hold another one's parts too."""
        theirs = self.parts(source)
        for suffix, name in self.parts(to).items():
            self.tensors[name] = self.tensors[theirs[suffix]].clone()

    def change(self, name: str, how: Callable[[torch.Tensor], torch.Tensor], suffix: str | None = None) -> None:
        """Replace one part: of that suffix, else values or codes."""
        parts = self.parts(name)
        if suffix is None:
            suffix = next(one for one in ("", "weight", "weight_packed") if one in parts)
        stored = self.tensors[parts[suffix]]
        self.tensors[parts[suffix]] = how(stored).to(stored.dtype).contiguous()

    def multiply(self, name: str, factor: float) -> None:
        """Multiply what a weight stands for."""
        parts = self.parts(name)
        if "weight_global_scale" in parts:
            self.change(name, lambda value: value / factor, "weight_global_scale")
        elif "weight_scale" in parts:
            self.change(name, lambda value: value.float() * factor, "weight_scale")
        else:
            self.change(name, lambda value: value.float() * factor)

    def reorder(self, name: str, index: torch.Tensor) -> None:
        """Put rows into another order, scales of rows with them."""
        for stored in self.parts(name).values():
            if self.tensors[stored].dim() and len(self.tensors[stored]) == len(index):
                self.tensors[stored] = self.tensors[stored][index]

    def blank(self, name: str) -> None:
        """Make a weight zero."""
        for suffix in self.parts(name):
            if suffix in ("", "weight", "weight_packed"):
                self.change(name, torch.zeros_like, suffix)


@cache
def schema() -> ModelSchema:
    with open_source(TINY) as source:
        return source.schema


def layer_tensors(layer: int) -> list[Tensor]:
    return [tensor for tensor in schema().tensors.values() if tensor.layer == layer]


def plain_copy() -> Copy:
    files = {
        path.name: path.read_bytes()
        for path in TINY.iterdir()
        if path.name != "config.json" and not path.name.startswith("model")
    }
    return Copy(read_tensors(TINY), json.loads((TINY / "config.json").read_text()), files)


class Copies:
    """Undamaged copies in every format, made once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._made: dict[str, Copy] = {}

    def get(self, form: str) -> Copy:
        """Return a copy that can be changed."""
        if form not in self._made:
            self._made[form] = self._make(form)
        return self._made[form].fresh()

    def _make(self, form: str) -> Copy:
        plain = plain_copy()
        if form == BF16:
            return plain
        if form == FP8_BLOCK:
            maker = MAKERS["ct-fp8-block"]
            block = {**maker.config, "ignore": plain_modules(schema())}
            stored = quantize(schema(), plain.tensors, maker)
            return replace(plain, tensors=stored, config={**plain.config, "quantization_config": block})
        made = self.folder / f"made {form}"
        with open_source(TINY) as source:
            run(plan_quantize(source, QuantizeOptions(scheme=_SCHEMES[form])), made, RunOptions(1), lambda _: None)
        config = json.loads((made / "config.json").read_text())
        copy = replace(plain, tensors=read_tensors(made), config=config)
        shutil.rmtree(made)
        return copy


def shard(folder: Path, to: Path, *, tp: int = 2, ep: int = 2) -> Path:
    """Cut a checkpoint for ranks."""
    with open_source(folder) as source:
        options = ShardOptions(mapping=ParallelMapping(tp=tp, ep=ep))
        run(plan_shard(source, options), to, RunOptions(1), lambda _: None)
    return to


def config_of(copy: Copy) -> Glm4MoeConfig:
    return Glm4MoeConfig.from_hf(copy.config)
