"""Random models, formats, layouts and mappings that fit each other, and commands on them."""

import json
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import torch
from builders import small_checkpoint
from quantized import BLOCK, DIALECTS, quantized_checkpoint
from safetensors.torch import load_file

from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.shard.mapping import ParallelMapping, Placement, SharedExperts
from converters.shard.naming import ShardLayout
from converters.shard.plan import ShardOptions, plan_merge, plan_shard
from converters.shard.source import is_sharded, open_sharded
from converters.source import open_source

PLAIN = "bf16"
# rows and columns that must stay together: both sides of a block, a group, a word
UNITS = dict.fromkeys(DIALECTS, 16) | {PLAIN: 2}
UNITS |= {name: BLOCK[0] * BLOCK[1] // 16 for name in DIALECTS if "block" in name}
UNITS |= {name: 4 for name in DIALECTS if "channel" in name or "tensor" in name}


@dataclass(frozen=True)
class Case:
    """A model in a format and a layout, and two mappings that fit it."""

    dialect: str
    layout: Layout
    model: dict[str, Any]
    first: ParallelMapping
    second: ParallelMapping
    files: ShardLayout


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def random_mapping(rng: Random, tp: int, model: dict[str, Any], layout: Layout) -> ParallelMapping:
    """Return a mapping over tp ranks that a model of fitting widths allows."""
    experts = model["n_routed_experts"]
    redundant_sizes = {
        ep: [n for n in range(experts + 1) if (experts + n) % ep == 0 and (ep > 1 or n == 0)][:3]
        for ep in _divisors(tp)
    }
    ep = rng.choice([ep for ep, sizes in redundant_sizes.items() if sizes])
    is_slot_cut = layout is Layout.FUSED_SHARED and tp > ep
    return ParallelMapping(
        tp=tp,
        ep=ep,
        pp=rng.randint(1, model["num_hidden_layers"]),
        placement=rng.choice(list(Placement)),
        redundant_experts=rng.choice(redundant_sizes[ep]),
        shared_experts=SharedExperts.SPLIT if is_slot_cut else rng.choice(list(SharedExperts)),
    )


def random_case(rng: Random, dialect: str, layout: Layout) -> Case:
    """Return a random case; sizes are built so that they fit."""
    unit, most = UNITS[dialect], rng.choice([2, 3, 4, 8])
    tp_sizes = _divisors(most)
    layers = rng.randint(1, 3)
    model = {
        "num_hidden_layers": layers,
        "first_k_dense_replace": rng.randint(0, layers),
        "hidden_size": 16 * rng.randint(1, 2),
        "moe_intermediate_size": unit * most,
        "intermediate_size": unit * most,
        "n_routed_experts": rng.choice([3, 4, 6]),
        "n_shared_experts": rng.randint(1, 2) if dialect == PLAIN else 1,
        "num_attention_heads": most * rng.randint(1, 2),
        "num_key_value_heads": rng.choice(tp_sizes),
        "head_dim": unit,
        "vocab_size": unit * most,
        "use_qk_norm": rng.random() < 0.5,
        "attention_bias": rng.random() < 0.5,
        "partial_rotary_factor": 1.0,
    }
    first, second = (random_mapping(rng, rng.choice(tp_sizes[1:]), model, layout) for _ in range(2))
    files = rng.choice([ShardLayout.RANK, ShardLayout.TENSORRT_LLM])
    return Case(dialect, layout, model, first, second, files)


def make(folder: Path, case: Case) -> Path:
    """Write the checkpoint of a case and return its folder."""
    if case.dialect == PLAIN:
        src = small_checkpoint(folder / "split", num_shards=1, mtp_copies=case.model["use_qk_norm"], **case.model)
    else:
        src, _ = quantized_checkpoint(folder / "split", DIALECTS[case.dialect], **case.model)
    if case.layout is Layout.SPLIT:
        return src
    with open_source(src) as source:
        run(plan_convert(source, ConvertOptions(layout=case.layout)), folder / "src", RunOptions(1), lambda _: None)
    return folder / "src"


def shard(src: Path, dst: Path, mapping: ParallelMapping, files: ShardLayout, **convert: Any) -> Path:
    """Cut a whole or a sharded checkpoint."""
    with open_sharded(src) if is_sharded(src) else open_source(src) as source:
        options = ShardOptions(mapping=mapping, files=files, convert=ConvertOptions(**convert))
        run(plan_shard(source, options), dst, RunOptions(2, 32 << 20), lambda _: None)
    return dst


def merge(src: Path, dst: Path) -> Path:
    """Restore the whole checkpoint."""
    with open_sharded(src) as source:
        run(plan_merge(source), dst, RunOptions(2, 32 << 20), lambda _: None)
    return dst


def rank_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of all ranks through the safetensors library, by rank and name."""
    shards = json.loads((folder / "glm4moe-manifest.json").read_text())["shards"]
    return {
        f"{facts['rank']}/{name}": value
        for file, facts in shards.items()
        for name, value in load_file(folder / file).items()
    }
