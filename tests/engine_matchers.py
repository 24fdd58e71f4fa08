"""How engines read ignore lists, written anew from their sources: vLLM 0.33, SGLang 0.5.23, TensorRT-LLM of 2026.

Each engine asks for its own modules by its own names: q, k, v fused into one, gate and up into one, all routed experts
of a layer as one; SGLang calls the MTP layer `model.decoder`. A matcher returns the index of the config group that the
module gets, or None where it is built unquantized.
"""

import fnmatch
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from converters.schema import DtypePolicy, ModelSchema, Role

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
EXPERT_SHARDS = (".0.gate_proj", ".0.up_proj", ".0.down_proj")


class EngineRefusal(Exception):
    """What an engine raises for a list that treats the shards of one module differently."""


@dataclass(frozen=True)
class EngineModule:
    """A module as an engine names it, with the official weights in it."""

    name: str
    weights: tuple[str, ...]
    is_experts: bool = False
    layer: int = -1
    is_mtp: bool = False


def engine_modules(schema: ModelSchema, mtp_name: str | None = None) -> Iterator[EngineModule]:
    """Yield every module that engines may quantize."""
    found: dict[str, list[str]] = {}
    facts: dict[str, tuple[bool, int, bool]] = {}
    for tensor in schema.tensors.values():
        if tensor.spec.dtype is not DtypePolicy.QUANTIZABLE:
            continue
        name, is_experts = tensor.module, tensor.spec.role is Role.EXPERT
        if is_experts:
            name = name.rsplit(".", 2)[0]
        elif tensor.spec.fuse:
            name = f"{name.rpartition('.')[0]}.{tensor.spec.fuse.group}"
        is_mtp = tensor.layer == schema.mtp_layer
        if is_mtp and mtp_name:
            name = name.replace(f"model.layers.{tensor.layer}", mtp_name)
        found.setdefault(name, []).append(tensor.name)
        facts[name] = is_experts, tensor.layer or 0, is_mtp
    for name, weights in found.items():
        yield EngineModule(name, tuple(weights), *facts[name])


def shards(name: str) -> tuple[str, ...]:
    last = name.rpartition(".")[2]
    return tuple(name.replace(last, shard) for shard in FUSED[last]) if last in FUSED else (name,)


def agree(answers: set[Any], name: str) -> Any:
    if len(answers) > 1:
        raise EngineRefusal(f"{name}: {answers}")
    return answers.pop()


def _entry_matches(entry: str, name: str, style: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    if style == "contains":
        return entry.lower() in name.lower()
    if style == "dotted":
        return name == entry or name.endswith(f".{entry}")
    return name == entry


def compressed_tensors_group(module: EngineModule, config: dict[str, Any], style: str, *, strict: bool) -> int | None:
    """vLLM (style exact) and SGLang (style dotted, before that contains; strict: what no target has is an error)."""
    names = tuple(module.name + shard for shard in EXPERT_SHARDS) if module.is_experts else shards(module.name)
    ignored = {any(_entry_matches(entry, name, style) for entry in config["ignore"]) for name in names}
    if agree(ignored, module.name):
        return None

    def target(name: str) -> int | None:
        for number, group in enumerate(config["config_groups"].values()):
            for entry in group["targets"]:
                if entry == "Linear" or _entry_matches(entry, name, "exact"):
                    return number
        return None

    found = agree({target(name) for name in names}, module.name)
    if found is None and strict:
        raise EngineRefusal(f"{module.name} matches no target")
    return found


def tensorrt_llm_group(module: EngineModule, exclude: list[str]) -> int | None:
    """Globs on own names; a fused module is left out with any of its shards, the MTP layer by its own name."""
    candidates = [module.name, *shards(module.name)]
    if module.is_mtp:
        candidates.append(f"model.layers.{module.layer}")
    is_excluded = any(fnmatch.fnmatchcase(name, entry) for name in candidates for entry in exclude)
    return None if is_excluded else 0


def _is_skipped(module: EngineModule, entries: list[str]) -> bool:
    """What vLLM does with lists of exact names, for `fp8` and first of all for ModelOpt."""
    last = module.name.rpartition(".")[2]
    if last in FUSED:
        return bool(agree({name in entries for name in shards(module.name)}, module.name))
    if "experts" in module.name:
        return any(module.name in entry for entry in entries if "experts" in entry)
    return module.name in entries


def vllm_fp8_group(module: EngineModule, entries: list[str]) -> int | None:
    return None if _is_skipped(module, entries) else 0


def sglang_fp8_group(module: EngineModule, entries: list[str]) -> int | None:
    def matches(name: str) -> bool:
        return any(f".{entry}." in f".{name}." for entry in entries)

    return None if agree({matches(name) for name in shards(module.name)}, module.name) else 0


def transformers_fp8_group(weight: str, entries: list[str]) -> int | None:
    """By official module; an entry is a pattern for the beginning, or the end as it is."""
    module = weight.removesuffix(".weight")
    is_kept = any(re.match(f"{entry}(\\.|$)", module) or module.endswith(entry) for entry in entries)
    return None if is_kept else 0


def vllm_modelopt_group(module: EngineModule, entries: list[str]) -> int | None:
    is_excluded = (
        _is_skipped(module, entries)
        or any(entry != module.name and entry in module.name for entry in entries)
        or any(fnmatch.fnmatchcase(module.name, entry) for entry in entries)
    )
    return None if is_excluded else 0


def sglang_modelopt_group(module: EngineModule, entries: list[str], *, is_nvfp4: bool) -> int | None:
    if module.is_mtp and is_nvfp4:
        return None
    names = {module.name, *module.name.split(".")}
    by_glob = any(
        re.fullmatch(entry.replace(".", r"\.").replace("*", ".*"), name) for entry in entries for name in names
    )
    by_name = agree({name in entries for name in shards(module.name)}, module.name)
    return None if by_glob or by_name else 0
