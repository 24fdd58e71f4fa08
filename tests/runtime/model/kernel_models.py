"""One small model on torch, on the twins of kernels, and on kernels, wherever these run."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from converters.config import Glm4MoeConfig
from converters.schema import expand
from runtime.config import EngineConfig
from runtime.engine.engine import Engine
from runtime.engine.request import SamplingParams
from runtime.model.decoder import new_cache
from runtime.model.loader import LoadedModel, load_model
from runtime.model.ops import LayerOps
from tests.builders import random_tensors, small_config, write_checkpoint
from tests.runtime.kernels.budgets import UNIT

# every expert sees every token, so that no choice can flip
SIZES = {"num_hidden_layers": 2, "n_routed_experts": 2, "num_experts_per_tok": 2}
PROMPT = [5, 17, 40, 3, 7, 63, 23, 12, 9]
NEXT = [31, 2, 60]
# of a value, one behind the other: in the sums of the products and norms of each layer; then in norm and head
ROUNDINGS = 2 * (48 + 16 + 12 + 96 + 48 + 48 + 24 + 16) + 48 + 48
# errors of either sign add up as a random walk does; four standard deviations of it, on either side
SHARE = 2 * 4 * ROUNDINGS**0.5 * UNIT[torch.float32]


def write_model(folder: Path, **changes: Any) -> Path:
    """Save a random checkpoint; values of bf16 fit every dtype of compute."""
    config = small_config(**SIZES, **changes)
    schema = expand(Glm4MoeConfig.from_hf(config))
    return write_checkpoint(folder, random_tensors(schema), config, num_shards=1)


@dataclass(frozen=True)
class Outputs:
    """Logits (B, T, V) of the main model, prefill in two chunks and then token by token, and of drafts."""

    logits: torch.Tensor
    drafts: torch.Tensor


def outputs(loaded: LoadedModel, *, batch_size: int = 1, capacity_tokens: int = 12) -> Outputs:
    """Return what a model says, through caches of its own kind."""
    model, mtp = loaded.model, loaded.mtp
    assert mtp is not None
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor([PROMPT + NEXT] * batch_size, device=device)
    ids[-1] = ids[-1].flip(0) if batch_size > 1 else ids[-1]
    chunks = ids.split([5, 4, 1, 1, 1], 1)
    cache = new_cache(model, capacity_tokens, batch_size=batch_size)
    hidden = torch.cat([model(chunk, cache=cache) for chunk in chunks], 1)
    own = new_cache(model, capacity_tokens, batch_size=batch_size, num_layers=1)
    drafted = [
        mtp.draft(model.embed(part), state, cache=own)
        for part, state in zip(ids[:, 1:].split([8, 3], 1), hidden[:, :-1].split([8, 3], 1), strict=True)
    ]
    return Outputs(model.logits(hidden).cpu(), model.logits(torch.cat(drafted, 1)).cpu())


def tokens(loaded: LoadedModel, engine: EngineConfig, **params: Any) -> list[int]:
    """Return what the engine generates."""
    generated = Engine(loaded.model, engine, frozenset()).generate(PROMPT, SamplingParams(max_tokens=4, **params))
    return [token.token_id for token in generated]


def excess(found: Outputs, exact: Outputs) -> float:
    """Return the largest difference between two fp32 models, as a share of what the order of adding may change."""
    budget = SHARE * float(exact.logits.abs().max())
    pairs = ((found.logits, exact.logits), (found.drafts, exact.drafts))
    return max(float((ours - theirs).abs().max()) for ours, theirs in pairs) / budget


def cost(found: Outputs, exact: Outputs) -> float:
    """Return the root of the mean square of what bf16 costs."""
    return float((found.logits - exact.logits).square().mean().sqrt())


def compare(device: str) -> dict[str, Any]:
    """Return how kernels differ from torch, by what is compared."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_model(Path(name) / "model")
        return {**_fp32(folder, device), **_bf16(folder, device)}


def _fp32(folder: Path, device: str) -> dict[str, Any]:
    exact_engine = EngineConfig(dtype="float32", device=device)
    exact = load_model(folder, exact_engine)
    engine = replace(exact_engine, kernels="triton")
    ours = load_model(folder, engine)
    coded = load_model(folder, replace(engine, kv_cache_dtype="fp8"))
    coded_twin = load_model(folder, replace(exact_engine, kv_cache_dtype="fp8"))
    # experts as well: the whole model on kernels, whose tiles of fp32 are for the interpreter alone
    experts = load_model(folder, replace(engine, moe_backend="triton" if device == "cpu" else "batched"))
    expected = outputs(coded_twin)
    draws = {"temperature": 1.3, "top_k": 40, "top_p": 0.9}
    return {
        "fp32": excess(outputs(ours), outputs(exact)),
        # more room than a run of tokens: decoding is split
        "fp32 batch, split": excess(
            outputs(ours, batch_size=2, capacity_tokens=600), outputs(exact, batch_size=2, capacity_tokens=600)
        ),
        "fp32 without cache": _without_cache(ours, exact),
        "fp8 cache": excess(outputs(coded), expected),
        "fp8 cache is seen": excess(expected, outputs(exact)),
        "experts too": excess(outputs(experts), outputs(exact)),
        "greedy": [tokens(model, how) for model, how in ((ours, engine), (experts, engine), (exact, exact_engine))],
        "greedy fp8 cache": [tokens(model, exact_engine) for model in (coded, coded_twin)],
        "drawn": [[tokens(model, engine, seed=seed, **draws) for seed in (0, 1)] for model in (ours, exact)],
    }


def _without_cache(ours: LoadedModel, exact: LoadedModel) -> float:
    ids = torch.tensor([PROMPT, PROMPT[::-1]], device=ours.model.model.embed_tokens.weight.device)
    found = [model.logits(model(ids)).cpu() for model in (ours.model, exact.model)]
    return float((found[0] - found[1]).abs().max() / (SHARE * found[1].abs().max()))


def _bf16(folder: Path, device: str) -> dict[str, Any]:
    rounded = EngineConfig(dtype="bfloat16", device=device)
    exact = outputs(load_model(folder, EngineConfig(dtype="float32", device=device)))
    theirs = load_model(folder, rounded)
    found = {name: load_model(folder, replace(rounded, kernels=name)) for name in ("torch", "triton")}
    found["experts too"] = load_model(folder, replace(rounded, kernels="triton", moe_backend="triton"))
    return {
        "bf16": {name: cost(outputs(model), exact) for name, model in found.items()},
        "bf16 greedy": [tokens(model, rounded) for model in (found["triton"], found["experts too"], theirs)],
    }


def with_twins(loaded: LoadedModel) -> LoadedModel:
    """Put the twins of the kernels under a model."""
    loaded.model.use(LayerOps.of_twins())
    return loaded
