"""The oracle of the streamed comparison: both models in memory, window by window, each scored and forgotten.

Shape suffixes: T tokens of a window, R rows scored at a time, D hidden, V vocabulary, K experts per token.

Peak memory: both models in the dtype of compute (FP8 weights stay FP8), one window's activations, and the logits of
_LOGIT_ROWS positions of each model, whatever the length of the text.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from converters.config import CONFIG_FILE, Glm4MoeConfig
from converters.errors import InputError
from converters.formats.inputs import FULL
from runtime.config import EngineConfig
from runtime.model.decoder import CausalLM
from runtime.model.loader import load_model
from runtime.moe.router import Routing
from runtime.verify.metrics import TokenScores, score_tokens
from runtime.verify.routing import LayerRouting, RoutingCounter
from runtime.verify.store_layout import ModelRun, OnPart, RunOptions
from runtime.verify.summary import LogitSummary, summarize
from runtime.verify.tokens import EncodedText as EncodedText
from runtime.verify.tokens import encode_text as encode_text
from runtime.verify.windows import DEFAULT_CONTEXT_LENGTH, Window

# 128 x 151552 fp32 = 74 MiB a model
_LOGIT_ROWS = 128
# fields that give both models the same logits and the same routers to compare
_COMMON_FIELDS = ("vocab_size", "num_hidden_layers", "first_k_dense_replace", "n_routed_experts", "num_experts_per_tok")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsOptions:
    """How to compare.

    `dtype` is that of compute; fp32 keeps the runtime's own rounding out of the result. `activations` are those of
    `EngineConfig`: full, so that weights alone are compared, or as served.
    """

    context_length: int = DEFAULT_CONTEXT_LENGTH
    stride: int | None = None
    num_tokens: int | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    activations: str = FULL


@dataclass(frozen=True, slots=True)
class NonFinite:
    """Predictions with a NaN or Inf logit: how many, and the first: which token of the text, in which window."""

    model: str
    num_tokens: int
    first_token: int
    first_window: int


@dataclass(frozen=True, slots=True)
class LogitsComparison:
    """What two models' logits have in common.

    `summary` is None where no position is finite on both sides; `notes` say what was accepted although it is unusual.
    """

    protocol: str
    dtype: str
    device: str
    num_scored: int
    summary: LogitSummary | None
    routing: tuple[LayerRouting, ...]
    non_finite: tuple[NonFinite, ...]
    notes: tuple[str, ...] = ()
    activations: str = FULL


def compare_logits(
    source: Path, candidate: Path, text: EncodedText, options: LogitsOptions, on_window: Callable[[Window], None]
) -> LogitsComparison:
    """Load both checkpoints, the source as reference, and compare them on a text; on_window hears of each window.

    Raises:
        InputError: a checkpoint that cannot be loaded, or two models whose logits or routers do not correspond.
    """
    ours, theirs = Glm4MoeConfig.from_folder(source), Glm4MoeConfig.from_folder(candidate)
    for name in _COMMON_FIELDS:
        if getattr(ours, name) != getattr(theirs, name):
            raise InputError(
                f"{candidate / CONFIG_FILE}: {name}",
                expected=f"{getattr(ours, name)}, as in the source",
                found=str(getattr(theirs, name)),
                next_step="See --level structure for all differences.",
            )
    engine = EngineConfig(dtype=options.dtype, device=options.device, activations=options.activations)
    reference = load_model(source, engine, with_mtp=False)
    converted = load_model(candidate, engine, with_mtp=False)
    found = compare_models(reference.model, converted.model, text, options, on_window)
    notes = [f"reference: {note}" for note in reference.notes] + [f"candidate: {note}" for note in converted.notes]
    return replace(found, notes=tuple(notes))


@torch.inference_mode()
def compare_models(
    reference: CausalLM,
    candidate: CausalLM,
    text: EncodedText,
    options: LogitsOptions,
    on_window: Callable[[Window], None],
) -> LogitsComparison:
    """Compare two loaded models on a text; see `compare_logits`."""
    record = _Record()
    for window in text.plan.windows:
        ids_T = torch.tensor(text.token_ids[window.begin : window.end], device=options.device)
        record.add(window, _run(reference, ids_T, window), _run(candidate, ids_T, window), ids_T)
        on_window(window)
    scores, windows_T, tokens_T = record.tensors()
    return LogitsComparison(
        protocol=text.plan.protocol,
        dtype=options.dtype,
        device=options.device,
        num_scored=len(scores),
        summary=summarize(scores, windows_T, seed=options.seed),
        routing=record.routing.result(),
        non_finite=(
            *_non_finite("reference", scores.finite_reference, windows_T, tokens_T),
            *_non_finite("candidate", scores.finite_candidate, windows_T, tokens_T),
        ),
        activations=options.activations,
    )


@dataclass(frozen=True, slots=True)
class _Pass:
    """One model's way through a window: hidden states (rows, D) of the scored rows, and topk_ids (rows, K) by layer."""

    model: CausalLM
    hidden_TD: torch.Tensor
    topk_ids: dict[int, torch.Tensor]


def _run(model: CausalLM, ids_T: torch.Tensor, window: Window) -> _Pass:
    topk_ids: dict[int, torch.Tensor] = {}

    def observe(routing: Routing) -> None:
        topk_ids[routing.layer] = routing.topk_ids_TK[window.logit_rows]

    hidden_1TD = model(ids_T[None], observer=observe)
    return _Pass(model, hidden_1TD[0, window.logit_rows], topk_ids)


@torch.inference_mode()
def run_in_memory(
    folder: Path, text: EncodedText, options: RunOptions, on_part: OnPart | None = None, *, behind: int | None = None
) -> ModelRun:
    """Load a whole model and run it, window by window; what a streamed run must equal."""
    assert on_part is None, "parts of layers are told by streamed runs alone"
    engine = EngineConfig(dtype=options.dtype, device=options.device, activations=options.activations)
    model = load_model(folder, engine, with_mtp=False).model
    hidden, topk_ids = list[torch.Tensor](), dict[int, list[torch.Tensor]]()

    def observe(routing: Routing) -> None:
        topk_ids.setdefault(routing.layer, []).append(routing.topk_ids_TK.cpu())

    for window in text.plan.windows:
        ids_T = torch.tensor(text.token_ids[window.begin : window.end], device=options.device)
        hidden.append(model(ids_T[None], observer=observe)[0].float().cpu())
    return ModelRun(torch.cat(hidden), {layer: torch.cat(parts) for layer, parts in topk_ids.items()})


@dataclass(slots=True)
class _Record:
    """Scores of the windows so far: a few numbers a token."""

    routing: RoutingCounter = field(default_factory=RoutingCounter)
    _scores: list[TokenScores] = field(default_factory=list)
    _windows: list[Window] = field(default_factory=list)

    def add(self, window: Window, reference: _Pass, candidate: _Pass, ids_T: torch.Tensor) -> None:
        next_ids_T = ids_T[window.first_scored - window.begin :]
        rows = zip(
            *(values.split(_LOGIT_ROWS) for values in (reference.hidden_TD, candidate.hidden_TD, next_ids_T)),
            strict=True,
        )
        self._scores += [
            score_tokens(reference.model.logits(ours_RD), candidate.model.logits(theirs_RD), next_R)
            for ours_RD, theirs_RD, next_R in rows
        ]
        self._windows.append(window)
        self.routing.add(reference.topk_ids, candidate.topk_ids)

    def tensors(self) -> tuple[TokenScores, torch.Tensor, torch.Tensor]:
        """Return the scores of all tokens, each token's window index, and its index in the text."""
        windows_T = torch.cat([torch.full((window.num_scored,), window.index) for window in self._windows])
        tokens_T = torch.cat([torch.arange(window.first_scored, window.end) for window in self._windows])
        return TokenScores.cat(self._scores), windows_T, tokens_T


def _non_finite(
    model: str, finite_T: torch.Tensor, windows_T: torch.Tensor, tokens_T: torch.Tensor
) -> tuple[NonFinite, ...]:
    bad = (~finite_T).nonzero()[:, 0]
    if not len(bad):
        return ()
    return (NonFinite(model, len(bad), int(tokens_T[bad[0]]), int(windows_T[bad[0]])),)
