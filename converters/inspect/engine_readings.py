"""How each engine reads an ignore list: which of its own modules it builds quantized.

Engines ask for modules by names of their own: q, k, v and gate, up are one, as are all routed experts of a layer, and
SGLang calls the MTP layer by another name. Source: vLLM 0.33 `should_ignore_layer`, `is_layer_skipped` and ModelOpt's
`is_layer_excluded`; SGLang 0.5.23 the same functions of its own; TensorRT-LLM of 2026
`apply_quant_config_exclude_modules`, which matches globs.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from converters.formats.compressed_tensors import ANY_LINEAR, QUANT_METHOD
from converters.formats.ignore import SGLANG_MTP
from converters.quant.policy import expert_key, fused_key, is_quantized, layer_module
from converters.schema import ModelSchema, Tensor

_REGEX = "re:"
_DEEPSEEK = "fp8"
_IGNORE_KEYS = ("ignore", "modules_to_not_convert", "exclude_modules")


class Engine(StrEnum):
    """An engine with an ignore-list dialect of its own."""

    VLLM = "vLLM"
    SGLANG = "SGLang"
    TENSORRT_LLM = "TensorRT-LLM"


class Reading(StrEnum):
    """What an engine makes of a module."""

    QUANTIZED = "quantized"
    PLAIN = "plain"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class EngineModule:
    """What engines build as one: a linear layer, a fused one, or all routed experts of a layer.

    Attributes:
        name: what engines call it.
        tensors: its weights in the checkpoint.
    """

    name: str
    tensors: tuple[Tensor, ...]

    @property
    def is_experts(self) -> bool:
        """Whether it is all routed experts of a layer."""
        return self.tensors[0].expert is not None

    @property
    def asked_for(self) -> tuple[str, ...]:
        """Names that vLLM and SGLang look up in the lists of compressed-tensors: its parts; of experts, the first's."""
        return tuple(tensor.module for tensor in self.tensors if tensor.expert == self.tensors[0].expert)


def engine_modules(schema: ModelSchema) -> list[EngineModule]:
    """Return all modules that engines may build quantized."""
    groups: dict[str, list[Tensor]] = {}
    for tensor in schema.tensors.values():
        if is_quantized(tensor):
            groups.setdefault(expert_key(tensor) or fused_key(tensor) or tensor.module, []).append(tensor)
    return [EngineModule(name, tuple(tensors)) for name, tensors in groups.items()]


@dataclass(frozen=True, slots=True)
class IgnoreList:
    """A quantization_config as engines read it: entries that are left out, targets that are taken."""

    method: str
    entries: tuple[str, ...]
    targets: tuple[str, ...]

    @classmethod
    def of(cls, block: Mapping[str, Any]) -> "IgnoreList":
        """Read a block of any dialect."""
        lists = (block.get(key) for key in _IGNORE_KEYS)
        entries = next((found for found in lists if isinstance(found, list)), [])
        groups = block.get("config_groups")
        named = [group.get("targets", []) for group in groups.values()] if isinstance(groups, Mapping) else []
        targets = [target for targets in named for target in targets] or [ANY_LINEAR]
        return cls(str(block.get("quant_method")), tuple(map(str, entries)), tuple(map(str, targets)))

    def reading(self, engine: Engine, module: EngineModule, schema: ModelSchema) -> Reading:
        """Return what an engine makes of a module."""
        if engine is Engine.TENSORRT_LLM:
            return self._tensorrt_llm(module, schema)
        rename = _sglang_names(schema) if engine is Engine.SGLANG else _unchanged
        whole, names = rename(module.tensors[0], module.name), _renamed(rename, module)
        if self.method == QUANT_METHOD:
            return self._compressed_tensors(engine, names)
        if self.method == _DEEPSEEK:
            return self._exact(whole, names, is_experts=module.is_experts)
        is_out = any(fnmatchcase(whole, entry) for entry in self.entries)
        return Reading.PLAIN if is_out else self._exact(whole, names, is_experts=module.is_experts)

    def _compressed_tensors(self, engine: Engine, names: Sequence[str]) -> Reading:
        ignored = [any(_matches(entry, name, engine) for entry in self.entries) for name in names]
        if any(ignored):
            return Reading.PLAIN if all(ignored) else Reading.REFUSED
        targeted = [
            any(target == ANY_LINEAR or _matches(target, name, engine) for target in self.targets) for name in names
        ]
        if all(targeted):
            return Reading.QUANTIZED
        # vLLM leaves out what no target names, SGLang raises
        return Reading.PLAIN if engine is Engine.VLLM and not any(targeted) else Reading.REFUSED

    def _exact(self, whole: str, names: Sequence[str], *, is_experts: bool) -> Reading:
        """Return the reading of exact names; experts are left out if any entry speaks of them."""
        if whole in self.entries or (is_experts and any(entry.startswith(f"{whole}.") for entry in self.entries)):
            return Reading.PLAIN
        ignored = [name in self.entries for name in names]
        if any(ignored):
            return Reading.PLAIN if all(ignored) else Reading.REFUSED
        # a name of the layer leaves out everything below it
        is_below = any(whole.startswith(f"{entry}.") for entry in self.entries)
        return Reading.PLAIN if is_below else Reading.QUANTIZED

    def _tensorrt_llm(self, module: EngineModule, schema: ModelSchema) -> Reading:
        names = [module.name, *(() if module.is_experts else module.asked_for)]
        if schema.mtp_layer is not None and module.tensors[0].layer == schema.mtp_layer:
            # the MTP layer is unquantized as a whole if its own name matches
            names.append(layer_module(module.tensors[0]))
        is_out = any(fnmatchcase(name, entry) for name in names for entry in self.entries)
        return Reading.PLAIN if is_out else Reading.QUANTIZED


def _unchanged(tensor: Tensor, name: str) -> str:
    return name


def _sglang_names(schema: ModelSchema) -> Callable[[Tensor, str], str]:
    def rename(tensor: Tensor, name: str) -> str:
        is_mtp = schema.mtp_layer is not None and tensor.layer == schema.mtp_layer
        return SGLANG_MTP + name.removeprefix(layer_module(tensor)) if is_mtp else name

    return rename


def _renamed(rename: Callable[[Tensor, str], str], module: EngineModule) -> tuple[str, ...]:
    return tuple(rename(module.tensors[0], name) for name in module.asked_for)


def _matches(entry: str, name: str, engine: Engine) -> bool:
    if entry.startswith(_REGEX):
        try:
            return re.match(entry.removeprefix(_REGEX), name) is not None
        except re.error:
            return False
    return entry == name or (engine is Engine.SGLANG and name.endswith(f".{entry}"))
