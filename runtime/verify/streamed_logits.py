"""Scores of the predictions of two streamed models, main heads and MTP layers.

Shapes: R rows, T predictions, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from runtime.model.linear import Linear
from runtime.streaming.head import logits_of
from runtime.streaming.plan import LOGIT_ROWS
from runtime.streaming.rows import RowPlan
from runtime.verify.layer_metrics import OutputErrorSum
from runtime.verify.metrics import TokenScores, score_tokens
from runtime.verify.results import FloorSummary, MtpDifference, OutputError, TokenTable
from runtime.verify.summary import summarize
from runtime.verify.tokens import EncodedText
from runtime.verify.windows import Window

Pair = tuple[torch.Tensor, torch.Tensor]


def head_error(heads: tuple[Linear, Linear], final_RD: torch.Tensor, plan: RowPlan) -> OutputError:
    """Return how far the candidate's logits are from the reference's, both of the reference's final hidden states.

    Args:
        heads: of reference and candidate; where they are one, a block of rows says it all.
        final_RD: behind the reference's final norm.
        plan: which token is in which row.
    """
    sums, rows_R = OutputErrorSum(), torch.arange(plan.num_rows)
    for block_R in rows_R.split(LOGIT_ROWS):
        ours_RV, theirs_RV = logits_of(heads, (final_RD, final_RD), block_R)
        sums.add(ours_RV, theirs_RV, plan.positions[block_R])
        if heads[0] is heads[1]:
            break
    return sums.result()


@dataclass(frozen=True, slots=True)
class Scorer:
    """Scores rows of two models.

    Args:
        text: tokens and windows.
        plan: the rows of its windows.
        heads: of reference and candidate.
        seed: of the bootstrap.
        by_window: take no rows of two windows together, as the model in memory does.
        best: greedy tokens by row that were met on the way; -1 where there is none.
    """

    text: EncodedText
    plan: RowPlan
    heads: tuple[Linear, Linear]
    seed: int
    by_window: bool
    best: dict[str, Pair] = field(default_factory=dict)

    def main(self, hidden: Pair) -> TokenTable:
        """Return the scores of the main heads, from the final hidden states of both."""
        windows, ids = self.text.plan.windows, self.text.token_ids
        rows = [self._scored(window, begin) for window, begin in self._starts()]
        positions = [torch.arange(window.first_scored, window.end) for window in windows]
        return TokenTable(
            scores=self._score("main", hidden, rows, positions),
            token_ids=ids,
            positions_T=torch.cat(positions),
            windows_T=torch.cat([torch.full((window.num_scored,), window.index) for window in windows]),
            windows=windows,
        )

    def floor(self, reference_TD: torch.Tensor, noisy_TD: torch.Tensor) -> FloorSummary | None:
        """Return what noise does to the reference's predictions in the leading windows; None where none is finite."""
        head, limit = self.heads[0], len(noisy_TD)
        inside = [(window, begin) for window, begin in self._starts() if begin + window.end - window.begin <= limit]
        scorer = Scorer(self.text, self.plan, (head, head), self.seed, self.by_window)
        rows = [self._scored(window, begin) for window, begin in inside]
        positions = [torch.arange(window.first_scored, window.end) for window, _ in inside]
        scores = scorer._score("floor", (reference_TD, noisy_TD), rows, positions)
        scores = scores.select(scores.finite)
        if not len(scores):
            return None
        return FloorSummary(
            num_tokens=len(scores),
            kl_mean=scores.kl_nats.mean().item(),
            top1=scores.top1_same.mean().item(),
            ln_ppl_ratio=(scores.nll_candidate - scores.nll_reference).mean().item(),
        )

    def mtp(self, final: Pair, drafts: Pair) -> MtpDifference:
        """Return what the MTP layers predict, and how often a greedy draft is the main head's greedy token.

        The draft at position t, from h_t and token t + 1, is for token t + 2, as the main head's at t + 1. All
        positions of all windows count for the acceptance; for the KL those whose token t + 2 the window scores.
        """
        rows, positions, windows, drafted = [], [], [], []
        for (window, begin), (first, end) in zip(self._starts(), self.plan.bounds, strict=True):
            shift = window.begin - begin
            own = torch.arange(max(begin, window.first_scored - 2 - shift), end - 2)
            rows.append(own)
            positions.append(own + shift + 2)
            windows.append(torch.full(own.shape, window.index))
            drafted.append(torch.arange(first, end - 1))
        scores = self._score("mtp", drafts, rows, positions) if sum(map(len, rows)) else None
        rows_R = torch.cat(drafted)
        self._complete("mtp", drafts, rows_R)
        self._complete("main", final, rows_R + 1)
        shares = [
            ((draft_R[rows_R] == target_R[rows_R + 1]) & (draft_R[rows_R] >= 0)).double().mean().item()
            for draft_R, target_R in zip(self.best["mtp"], self.best["main"], strict=True)
        ]
        summary = None if scores is None else summarize(scores, torch.cat(windows), seed=self.seed)
        return MtpDifference(summary, *shares)

    def _starts(self) -> list[tuple[Window, int]]:
        """Return each window with its first row."""
        return [(window, begin) for window, (begin, _) in zip(self.text.plan.windows, self.plan.bounds, strict=True)]

    def _scored(self, window: Window, begin: int) -> torch.Tensor:
        rows = window.logit_rows
        return torch.arange(begin + rows.start, begin + rows.stop)

    def _score(
        self, kind: str, hidden: Pair, rows: Sequence[torch.Tensor], positions: Sequence[torch.Tensor]
    ) -> TokenScores:
        """Score rows, window by window or all together, against the tokens at these positions of the text."""
        ids_T = torch.tensor(self.text.token_ids)
        if not self.by_window:
            rows, positions = [torch.cat(list(rows))], [torch.cat(list(positions))]
        found = []
        for rows_R, positions_R in zip(rows, positions, strict=True):
            for block_R, places_R in zip(rows_R.split(LOGIT_ROWS), positions_R.split(LOGIT_ROWS), strict=True):
                if len(block_R):
                    ours, theirs = logits_of(self.heads, hidden, block_R)
                    found.append(score_tokens(ours, theirs, ids_T[places_R]))
                    self._note(kind, block_R, (ours, theirs))
        return TokenScores.cat(found)

    def _note(self, kind: str, rows_R: torch.Tensor, logits: Pair) -> None:
        empty = torch.full((self.plan.num_rows,), -1)
        pair = self.best.setdefault(kind, (empty, empty.clone()))
        for best_R, logits_RV in zip(pair, logits, strict=True):
            greedy_R = logits_RV.argmax(-1).masked_fill(~logits_RV.isfinite().all(-1), -1)
            best_R[rows_R] = greedy_R.cpu()

    def _complete(self, kind: str, hidden: Pair, rows_R: torch.Tensor) -> None:
        """Find the greedy tokens of those rows that were not scored."""
        empty = torch.full((self.plan.num_rows,), -1)
        known_R = self.best.get(kind, (empty, empty))[0][rows_R] >= 0
        for block_R in rows_R[~known_R].split(LOGIT_ROWS):
            if len(block_R):
                ours, theirs = logits_of(self.heads, hidden, block_R)
                self._note(kind, block_R, (ours, theirs))
