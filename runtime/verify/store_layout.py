"""What is in the file of a stored reference, and what has to agree before it may be compared.

What is kept is the final hidden state behind the norm, in fp32: 20 KiB a token at 5120 columns where logits take
592 KiB, and exact, since the head makes the same logits of it again. With it go what quick looks need (the loss, log Z
and the 64 most likely tokens of every prediction) and the experts of every token.

Shape suffixes: R rows, one for every token of every window, window after window; S scored tokens; D hidden, V
vocabulary, K experts per token, N most likely tokens.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import torch

from converters.config import Glm4MoeConfig
from runtime.streaming.one import OnPart as OnPart
from runtime.verify.store_file import TensorSpec
from runtime.verify.tokens import TOKEN_IDS, EncodedText
from runtime.verify.windows import WindowPlan

SCHEMA = "glm4moe.reference/1"
# part of what a figure means: raise it with every change of a definition
METRIC_VERSION = 1
TOP_N = 64
HIDDEN, WINDOWS, NLL, LOG_Z, TOP_IDS, TOP_LOGPROBS, HEAD, ABOUT = (
    "final_hidden",
    "windows",
    "nll",
    "log_z",
    "top_ids",
    "top_logprobs",
    "head",
    "about",
)


class RunOptions(Protocol):
    """How the model is run; those of the comparison."""

    @property
    def device(self) -> str:
        """Where."""

    @property
    def dtype(self) -> str:
        """Of compute."""

    @property
    def activations(self) -> str:
        """Full or as served."""


@dataclass(frozen=True, slots=True)
class ModelRun:
    """What one model made of a text.

    Attributes:
        final_hidden_RD: behind the final norm, (R, D) fp32.
        routing_ids: expert ids (R, K) by layer.
        norms: L2 norms (R,) of the hidden states behind each layer, as far as they are known.
    """

    final_hidden_RD: torch.Tensor
    routing_ids: Mapping[int, torch.Tensor]
    norms: Mapping[int, torch.Tensor] = field(default_factory=dict)


class Runner(Protocol):
    """Runs one model on a text; tells `on_part` what each layer is given and makes of it."""

    def __call__(
        self,
        folder: Path,
        text: EncodedText,
        options: RunOptions,
        on_part: OnPart | None = None,
        *,
        behind: int | None = None,
    ) -> ModelRun:
        """Return what the model made of the text; `behind` as in `runtime.streaming.one.planned_one`."""


@dataclass(frozen=True, slots=True)
class ReferenceFacts:
    """What a reference was made of; every field must agree before it is compared with anything.

    Attributes:
        metric_version: of the stored figures.
        version: of this program.
        torch: its version.
        source_digest: of the source's headers and config.
        head_digest: of the head's values; see `head_digest`.
        tokens_digest: of token ids and windows.
        vocab_size, hidden_size, num_hidden_layers, first_k_dense_replace, n_routed_experts, num_experts_per_tok: as in
            the source's config.json.
        dtype, device, activations: how it was run.
        plan: of the windows, without the windows themselves.
    """

    metric_version: int
    version: str
    torch: str
    source_digest: str
    head_digest: str
    tokens_digest: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    first_k_dense_replace: int
    n_routed_experts: int
    num_experts_per_tok: int
    dtype: str
    device: str
    activations: str
    plan: dict[str, Any]


# what gives two models states, routers and logits of the same shape
CONFIG_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "n_routed_experts",
    "num_experts_per_tok",
)


def routing_name(layer: int) -> str:
    """Return the tensor of the experts of a layer: (R, K), uint8 up to 256 experts, else uint16."""
    return f"routing.{layer}"


def norm_name(layer: int) -> str:
    """Return the tensor of the L2 norms of the hidden states behind a layer: (R,) fp32, NaN where nobody told."""
    return f"norms.{layer}"


def row_starts(plan: WindowPlan) -> list[int]:
    """Return the first row of each window, and behind the last the number of all rows."""
    return list(accumulate((window.end - window.begin for window in plan.windows), initial=0))


def tokens_digest(text: EncodedText) -> str:
    """Return sha256 of token ids and windows, as little-endian int64."""
    digest = hashlib.sha256(torch.tensor(text.token_ids, dtype=torch.int64).numpy().data)
    digest.update(windows_tensor(text.plan).numpy().data)
    return digest.hexdigest()


def windows_tensor(plan: WindowPlan) -> torch.Tensor:
    """Return (W, 3) int64: begin, first scored token and end of each window."""
    return torch.tensor([(window.begin, window.first_scored, window.end) for window in plan.windows])


def tensor_specs(
    config: Glm4MoeConfig, text: EncodedText, about_bytes: int, *, head_dtype: str | None
) -> list[TensorSpec]:
    """Return what the file holds; `head_dtype` is None where the head is not kept."""
    plan = text.plan
    rows, scored, width = row_starts(plan)[-1], plan.num_scored, config.hidden_size
    top = min(TOP_N, config.vocab_size)
    ids = "U8" if config.n_routed_experts <= 1 << 8 else "U16"
    layers = range(config.num_hidden_layers)
    routed = layers[config.first_k_dense_replace :]
    return [
        (HIDDEN, "F32", (rows, width)),
        (TOKEN_IDS, "I64", (len(text.token_ids),)),
        (WINDOWS, "I64", (len(plan.windows), 3)),
        (NLL, "F64", (scored,)),
        (LOG_Z, "F64", (scored,)),
        (TOP_IDS, "I32", (scored, top)),
        (TOP_LOGPROBS, "F32", (scored, top)),
        (ABOUT, "U8", (about_bytes,)),
        *((norm_name(layer), "F32", (rows,)) for layer in layers),
        *((routing_name(layer), ids, (rows, config.num_experts_per_tok)) for layer in routed),
        *([(HEAD, head_dtype, (config.vocab_size, width))] if head_dtype else []),
    ]
