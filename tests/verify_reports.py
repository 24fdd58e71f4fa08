"""Made-up results of a verification, of any size, for tests of what reports make of them."""

import math
from typing import Any

import torch

from converters.quant.certificate import Certificate, Relation, TensorFigures
from runtime.verify.metrics import score_tokens
from runtime.verify.results import (
    ExpertDifference,
    FloorSummary,
    LayerDifference,
    ModelComparison,
    MtpDifference,
    OutputError,
    RouterDifference,
    Spent,
    TokenTable,
)
from runtime.verify.summary import summarize
from runtime.verify.windows import plan_windows

VOCABULARY = 50


def output_error(relative: float, token: int = 3) -> OutputError:
    """An error with everything else derived from its size."""
    decibels = math.inf if relative == 0 else -20 * math.log10(relative) if math.isfinite(relative) else relative
    return OutputError(relative, 1.5 * relative, token, 1 - relative**2 / 2, decibels, 1 - relative / 10, 0.004)


def router(changed: float, unexplained: int = 0) -> RouterDifference:
    return RouterDifference(changed, 1 - changed / 8, unexplained, 2e-3, 1.5e-3, 17, changed / 20, changed / 3, 0.02)


def layer(
    index: int,
    num_experts: int,
    generator: torch.Generator,
    *,
    num_tokens: int = 4096,
    is_mtp: bool = False,
    scale: float = 0.03,
) -> LayerDifference:
    """A layer with errors around `scale`; without experts it is a dense one."""
    noise = torch.rand(4, generator=generator).tolist()
    load = torch.rand(num_experts, generator=generator).square().mul(1.9 * num_tokens * 8 / max(1, num_experts)).long()
    moved = load.double().mul(1 + 0.08 * torch.randn(num_experts, generator=generator)).long()
    errors = scale * (1 + 0.12 * torch.randn(num_experts, generator=generator)).clamp(min=0.2)
    experts = tuple(
        ExpertDifference(expert, tokens, other, error if tokens else None, 1 - error / 20 if tokens else None)
        for expert, (tokens, other, error) in enumerate(
            zip(load.tolist(), moved.tolist(), errors.tolist(), strict=True)
        )
    )
    return LayerDifference(
        layer=index,
        is_mtp=is_mtp,
        attention=output_error(scale * (0.7 + 0.1 * noise[0])),
        mlp=output_error(scale * (0.95 + 0.1 * noise[1])),
        residual=output_error(scale * (0.5 + 0.02 * index + 0.1 * noise[2])),
        router=router(0.004 * noise[3]) if num_experts else None,
        router_own=router(0.02 + 0.03 * noise[3]) if num_experts else None,
        experts=experts,
    )


def comparison(
    num_layers: int = 4, num_experts: int = 8, *, num_tokens: int = 200, dense: int = 1, mtp: bool = True, seed: int = 0
) -> ModelComparison:
    """Layers, the last of them an MTP layer, and the scores of so many tokens."""
    generator = torch.Generator().manual_seed(seed)
    layers = [
        layer(index, 0 if index < dense else num_experts, generator, is_mtp=mtp and index == num_layers)
        for index in range(num_layers + mtp)
    ]
    tokens = token_table(num_tokens, generator)
    summary = summarize(tokens.scores, tokens.windows_T, seed=0)
    return ModelComparison(
        protocol=f"first {num_tokens} of {num_tokens} tokens",
        dtype="float32",
        device="cpu",
        activations="full",
        layers=tuple(layers),
        tokens=tokens,
        summary=summary,
        mtp=MtpDifference(summary, 0.71, 0.68) if mtp else None,
        floor=FloorSummary(num_tokens, 8.1e-4, 0.995, 1.2e-4),
        spent=Spent(345.6, 78.9, 1_070_000_000_000, 6_900_000_000),
    )


def token_table(num_tokens: int, generator: torch.Generator, context_length: int = 50) -> TokenTable:
    """Scores of random logits, those of the candidate with noise of very different sizes."""
    plan = plan_windows(num_tokens, context_length=context_length)
    ids_T = torch.randint(VOCABULARY, (num_tokens,), generator=generator)
    positions_T = torch.cat([torch.arange(window.first_scored, window.end) for window in plan.windows])
    windows_T = torch.cat([torch.full((window.num_scored,), window.index) for window in plan.windows])
    logits_TV = 3 * torch.randn(len(positions_T), VOCABULARY, generator=generator)
    noise_T1 = 10 ** (-2.5 + 1.2 * torch.randn(len(positions_T), 1, generator=generator)).clamp(max=0.3)
    candidate_TV = logits_TV + noise_T1 * torch.randn(logits_TV.shape, generator=generator)
    scores = score_tokens(logits_TV, candidate_TV, ids_T[positions_T])
    return TokenTable(scores, tuple(ids_T.tolist()), positions_T, windows_T, plan.windows)


def figures(tensor: str, error: float = 0.026, **changes: Any) -> TensorFigures:
    """A tensor of a certificate."""
    values: dict[str, Any] = {
        "tensor": tensor,
        "relation": Relation.ROUNDED,
        "scheme": "fp8-block",
        "division": "exact",
        "elements": 1536 * 5120,
        "outside": 0,
        "first": "",
        "scales": 480,
        "wrong_scales": 0,
        "first_scale": "",
        "relative_error": error,
        "slope": 0.9999,
        "clipped": 0.0,
        "amax": 0.31,
    }
    return TensorFigures(**{**values, **changes})


def certificate(num_layers: int = 4, num_experts: int = 8, **changes: Any) -> Certificate:
    """A certificate of the experts' tensors; changes are those of the first of them."""
    names = [
        f"model.layers.{layer}.mlp.experts.{expert}.{name}_proj.weight"
        for layer in range(1, num_layers)
        for expert in range(num_experts)
        for name in ("gate", "up", "down")
    ]
    tensors = [figures(name, 0.0255 + 0.0003 * (number * 7919 % 13)) for number, name in enumerate(names)]
    tensors[0] = figures(changes.pop("tensor", names[0]), **changes)
    found = tuple(finding for tensor in tensors for finding in tensor.findings())
    return Certificate(tuple(tensors), found, 123_456_789)
