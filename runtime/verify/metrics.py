"""Per-token comparison of two models' logits; only one scalar per token and metric is kept.

Shape suffixes: T scored tokens, C tokens of one chunk, V vocabulary, N top-N.

p is the reference's distribution over the next token, q the candidate's. Logits are taken as they come, log-softmax
runs in fp32 and every sum in fp64. A row with a NaN or Inf logit on either side is marked and has NaN in all else.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

TOP_N, TOP_N_WIDE = 5, 10
# fp64 scratch of one chunk stays near 64 MB per buffer at any vocabulary size
_CHUNK_ELEMENTS = 1 << 23


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of T predictions; every field is a CPU tensor (T,), fp64 or bool.

    Attributes:
        kl_nats: sum over V of p (ln p - ln q), nats per token.
        nll_reference: -ln p(x) of the token x that follows, nats.
        nll_candidate: -ln q(x), nats.
        top1_same: argmax p equals argmax q, 0 or 1.
        top5_overlap: size of the intersection of both top-5 sets, divided by 5 (by V where V < 5).
        top1_in_top5: argmax p is among the candidate's top 5, 0 or 1.
        delta_p: q(x) - p(x), a difference of probabilities.
        logit_max_abs: largest |candidate - reference| over V, in logits.
        logit_mean_square: mean over V of (candidate - reference)^2, in squared logits.
        finite_reference: no NaN or Inf in the reference's row.
        finite_candidate: no NaN or Inf in the candidate's row.
        top10_overlap: as top5_overlap, of both top-10 sets, divided by 10 (by V where V < 10).
        gap_reference: ln p1 - ln p2 of the reference's two most likely tokens, nats; infinite where V = 1.
        max_p_reference: the reference's largest probability.
    """

    kl_nats: torch.Tensor
    nll_reference: torch.Tensor
    nll_candidate: torch.Tensor
    top1_same: torch.Tensor
    top5_overlap: torch.Tensor
    top1_in_top5: torch.Tensor
    delta_p: torch.Tensor
    logit_max_abs: torch.Tensor
    logit_mean_square: torch.Tensor
    finite_reference: torch.Tensor
    finite_candidate: torch.Tensor
    top10_overlap: torch.Tensor
    gap_reference: torch.Tensor
    max_p_reference: torch.Tensor

    @property
    def finite(self) -> torch.Tensor:
        """Rows (T,) bool that can be averaged: finite on both sides."""
        return self.finite_reference & self.finite_candidate

    def __len__(self) -> int:
        return self.kl_nats.numel()

    def select(self, mask: torch.Tensor) -> "TokenScores":
        """Return the rows where mask (T,) bool holds."""
        return TokenScores(*(getattr(self, field.name)[mask] for field in fields(self)))

    @classmethod
    def cat(cls, parts: Sequence["TokenScores"]) -> "TokenScores":
        """Return the rows of all parts, in order."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def score_tokens(reference_TV: torch.Tensor, candidate_TV: torch.Tensor, next_ids_T: torch.Tensor) -> TokenScores:
    """Compare two models' logits for the same positions, a chunk of rows at a time.

    Args:
        reference_TV: logits (T, V) of the reference, any float dtype; T at least 1.
        candidate_TV: logits (T, V) of the candidate, on the same device.
        next_ids_T: the tokens (T,) int64 that follow in the text.
    """
    assert reference_TV.shape == candidate_TV.shape, (reference_TV.shape, candidate_TV.shape)
    assert next_ids_T.shape == reference_TV.shape[:1], (next_ids_T.shape, reference_TV.shape)
    rows = max(1, _CHUNK_ELEMENTS // reference_TV.shape[1])
    chunks = zip(reference_TV.split(rows), candidate_TV.split(rows), next_ids_T.split(rows), strict=True)
    return TokenScores.cat([_score_chunk(*chunk) for chunk in chunks])


def _score_chunk(reference_CV: torch.Tensor, candidate_CV: torch.Tensor, next_ids_C: torch.Tensor) -> TokenScores:
    reference_CV, candidate_CV = reference_CV.float(), candidate_CV.float()
    finite_reference, finite_candidate = reference_CV.isfinite().all(-1), candidate_CV.isfinite().all(-1)
    log_p_CV = torch.log_softmax(reference_CV, -1).double()
    log_q_CV = torch.log_softmax(candidate_CV, -1).double()
    next_C1 = next_ids_C.to(log_p_CV.device)[:, None]
    log_p_C, log_q_C = log_p_CV.gather(1, next_C1)[:, 0], log_q_CV.gather(1, next_C1)[:, 0]
    top = _top_agreement(reference_CV, candidate_CV)
    best_C, gap_C = _confidence(log_p_CV)
    difference_CV = candidate_CV.double() - reference_CV.double()
    # argmax and top-k return something for a row of NaN; no such row may look like an agreement
    unusable_C = ~(finite_reference & finite_candidate)

    def clean(values_C: torch.Tensor) -> torch.Tensor:
        return values_C.double().masked_fill(unusable_C, torch.nan).cpu()

    return TokenScores(
        kl_nats=clean(kl_divergence(log_p_CV, log_q_CV)),
        nll_reference=clean(-log_p_C),
        nll_candidate=clean(-log_q_C),
        top1_same=clean(top.top1_same),
        top5_overlap=clean(top.top5_overlap),
        top1_in_top5=clean(top.top1_in_top5),
        delta_p=clean(log_q_C.exp() - log_p_C.exp()),
        logit_max_abs=clean(difference_CV.abs().amax(-1)),
        logit_mean_square=clean(difference_CV.square().mean(-1)),
        finite_reference=finite_reference.cpu(),
        finite_candidate=finite_candidate.cpu(),
        top10_overlap=clean(top.top10_overlap),
        gap_reference=clean(gap_C),
        max_p_reference=clean(best_C.exp()),
    )


def kl_divergence(log_p_TV: torch.Tensor, log_q_TV: torch.Tensor) -> torch.Tensor:
    """Return KL(p||q) (T,) fp64 in nats: sum over V of p (ln p - ln q), from log-probabilities (T, V) fp64.

    Summed over the vocabulary, never averaged over it: `F.kl_div(reduction="mean")` would come out V times too small.
    Values slightly below zero are rounding of the fp32 log-softmax and are left as they are; the summary counts them.
    """
    return (log_p_TV.exp() * (log_p_TV - log_q_TV)).sum(-1)


class _TopAgreement(NamedTuple):
    """Of C tokens: argmax equal, overlap of the top-5 and top-10 sets, reference argmax in the candidate's top 5."""

    top1_same: torch.Tensor
    top5_overlap: torch.Tensor
    top10_overlap: torch.Tensor
    top1_in_top5: torch.Tensor


def _top_agreement(reference_CV: torch.Tensor, candidate_CV: torch.Tensor) -> _TopAgreement:
    few, many = (min(count, reference_CV.shape[1]) for count in (TOP_N, TOP_N_WIDE))
    reference_CN = reference_CV.topk(many).indices
    candidate_CN = candidate_CV.topk(many).indices
    best_C = reference_CV.argmax(-1)
    return _TopAgreement(
        top1_same=best_C == candidate_CV.argmax(-1),
        top5_overlap=set_overlap(reference_CN[:, :few], candidate_CN[:, :few]),
        top10_overlap=set_overlap(reference_CN, candidate_CN),
        top1_in_top5=(candidate_CN[:, :few] == best_C[:, None]).any(-1),
    )


def _confidence(log_p_CV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (C,) each: ln of the largest probability, and how far ln of the second is below it."""
    if log_p_CV.shape[1] == 1:
        return log_p_CV[:, 0], torch.full_like(log_p_CV[:, 0], torch.inf)
    first_C, second_C = log_p_CV.topk(2).values.unbind(-1)
    return first_C, first_C - second_C


def set_overlap(ids_TN: torch.Tensor, other_TN: torch.Tensor) -> torch.Tensor:
    """Return the share (T,) fp64 of each row's N distinct ids that the other row has too, whatever their order."""
    shared_T = (ids_TN[:, :, None] == other_TN[:, None, :]).sum((1, 2))
    return shared_T.double() / ids_TN.shape[1]
