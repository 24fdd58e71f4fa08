"""What a layer-by-layer comparison of two models yields; plain values, ready for JSON, tables and verdicts.

Reference: the source, on its own hidden states. Candidate, teacher-forced: its weights on the reference's input with
the reference's routing, so that each layer answers for itself. Candidate, free-running: on its own hidden states, so
that errors add up. Floor: the reference on an input with relative noise of 2^-9, what bf16 rounding would do.
"""

from dataclasses import dataclass

import torch

from runtime.verify.metrics import TokenScores
from runtime.verify.summary import LogitSummary
from runtime.verify.windows import Window


@dataclass(frozen=True, slots=True)
class OutputError:
    """How far outputs u_hat (T, D) are from u (T, D), over all elements unless said otherwise.

    Attributes:
        relative: |u_hat - u| / |u|, Frobenius norms.
        worst_token_relative: the largest of that over single tokens.
        worst_token: its index among the tokens of the text.
        cosine: <u, u_hat> / (|u| |u_hat|).
        sqnr_db: -20 log10(relative); infinite where they are equal.
        slope: <u, u_hat> / <u, u>; 1 where nothing is scaled.
        floor_relative: `relative` of the floor for the same tokens; None where it was not measured.
    """

    relative: float
    worst_token_relative: float
    worst_token: int
    cosine: float
    sqnr_db: float
    slope: float
    floor_relative: float | None = None


@dataclass(frozen=True, slots=True)
class RouterDifference:
    """Decisions of the candidate's router against the reference's for the same T tokens.

    The margin of a token is the k-th less the (k+1)-th biased score of the reference, sigmoid + correction bias.

    Attributes:
        changed: share of tokens whose expert set differs.
        overlap: mean of |both sets| / K.
        unexplained: tokens whose set differs although their margin exceeds `margin_limit`.
        margin_limit: 4 times the 99th percentile of |change of a score| in the floor run, or its default.
        worst_margin: the largest margin of a token whose set differs; 0 where none does.
        worst_token: that token's index in the text, None where none differs.
        weight_moved: mean of half the sum over experts of |change of the routing weight|, by the sum of weights.
        load_shift: total variation between both histograms of expert loads, 0 to 1.
        logit_max_abs: largest change of a router logit.
        weight_moved_floor: `weight_moved` of the floor for the same tokens; None where it was not measured.
    """

    changed: float
    overlap: float
    unexplained: int
    margin_limit: float
    worst_margin: float
    worst_token: int | None
    weight_moved: float
    load_shift: float
    logit_max_abs: float
    weight_moved_floor: float | None = None


@dataclass(frozen=True, slots=True)
class ExpertDifference:
    """One routed expert: its output on the tokens that the reference sends it, unweighted.

    Attributes:
        expert: index within the layer.
        num_tokens: tokens that the reference sends it.
        num_tokens_candidate: tokens that the free-running candidate sends it.
        relative: as in OutputError; None without tokens.
        slope: as in OutputError; None without tokens.
    """

    expert: int
    num_tokens: int
    num_tokens_candidate: int
    relative: float | None
    slope: float | None


@dataclass(frozen=True, slots=True)
class LayerDifference:
    """One layer; the MTP layer is the last, `is_mtp`.

    Attributes:
        layer: index in the checkpoint.
        attention: attention output before the residual sum, teacher-forced.
        mlp: output of the dense MLP, or of the MoE block with the reference's routing and the shared expert.
        residual: hidden states behind the layer, free-running.
        router: teacher-forced, None for a dense layer.
        router_own: free-running, None for a dense layer.
        experts: of an MoE layer, by index; empty where the reference's are not known.
        first_non_finite: where the candidate or the reference first has NaN or Inf in this layer, e.g.
            "candidate: attention output, token 17"; None where all is finite.
        mlp_norm: the candidate's norm in front of the MLP on the reference's state: `mlp` is measured behind the
            reference's norm; None where it was not measured.
    """

    layer: int
    is_mtp: bool
    attention: OutputError
    mlp: OutputError
    residual: OutputError
    router: RouterDifference | None
    router_own: RouterDifference | None
    experts: tuple[ExpertDifference, ...]
    first_non_finite: str | None = None
    mlp_norm: OutputError | None = None


@dataclass(frozen=True, slots=True)
class EndsDifference:
    """What lies in front of the layers and behind them, each on what the reference gives it.

    Attributes:
        embedding: rows of the tokens, one for every token of every window.
        final_norm: the norm behind the last layer.
        head: logits of the reference's final hidden states.
        mtp_norm: the norm behind the MTP layer; None where that was not run.
    """

    embedding: OutputError
    final_norm: OutputError
    head: OutputError
    mtp_norm: OutputError | None = None


@dataclass(frozen=True, slots=True)
class MtpDifference:
    """The MTP layer's predictions of the token after the next, both sides on their own states.

    Attributes:
        summary: KL and agreement of both MTP heads' distributions.
        acceptance_reference: share of positions where the reference's greedy draft is its main head's greedy token.
        acceptance_candidate: the same of the candidate.
    """

    summary: LogitSummary | None
    acceptance_reference: float
    acceptance_candidate: float


@dataclass(frozen=True, slots=True)
class FloorSummary:
    """The reference against itself with noise of 2^-9 behind every layer: what is too small to mean anything."""

    num_tokens: int
    kl_mean: float
    top1: float
    ln_ppl_ratio: float


@dataclass(frozen=True)
class TokenTable:
    """Per-token scores and where each token is.

    Attributes:
        scores: T predictions.
        token_ids: of the text that was run, all windows' range; index i is token i of the text.
        positions_T: int64, the index in token_ids of the token that is predicted.
        windows_T: int64, its window.
        windows: the windows.
    """

    scores: TokenScores
    token_ids: tuple[int, ...]
    positions_T: torch.Tensor
    windows_T: torch.Tensor
    windows: tuple[Window, ...]


@dataclass(frozen=True, slots=True)
class Spent:
    """What a run took.

    Attributes:
        seconds: in all.
        seconds_waiting: of them, for reads.
        bytes_read: of both checkpoints.
        planned_peak_bytes: of memory.
        bytes_skipped: of experts that no token goes to, which are left out.
    """

    seconds: float
    seconds_waiting: float
    bytes_read: int
    planned_peak_bytes: int
    bytes_skipped: int = 0


@dataclass(frozen=True, slots=True)
class ModelComparison:
    """Everything that running both models found.

    Attributes:
        protocol: windows and stride in words.
        dtype: of compute.
        device: of compute.
        activations: full or as-served.
        layers: in order, the MTP layer last; empty where layers were not asked for.
        tokens: per-token scores; None where logits were not asked for.
        summary: of the logits, None where none is finite or asked for.
        mtp: None where a side has no MTP layer.
        floor: None where it was not measured.
        notes: what was accepted although it is unusual.
        spent: None where nobody measured.
        ends: embedding, final norm and head; None where layers were not asked for.
        first_non_finite: where each model that has NaN or Inf first has it on its own states, e.g. "candidate: layer 3,
            MLP output, token 17"; empty where layers were asked for, which say it themselves.
    """

    protocol: str
    dtype: str
    device: str
    activations: str
    layers: tuple[LayerDifference, ...]
    tokens: TokenTable | None
    summary: LogitSummary | None
    mtp: MtpDifference | None
    floor: FloorSummary | None
    notes: tuple[str, ...] = ()
    spent: Spent | None = None
    first_non_finite: tuple[str, ...] = ()
    ends: EndsDifference | None = None
