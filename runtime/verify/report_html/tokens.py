"""The tokens that changed most, with the text around them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from runtime.verify.report_html.words import Decode, visible_token

if TYPE_CHECKING:
    from runtime.verify.results import TokenTable

MOST_TOKENS = 15
# tokens shown before and after
_BEFORE, _AFTER = 16, 6


@dataclass(frozen=True, slots=True)
class TokenInContext:
    """A predicted token and its neighbours.

    Attributes:
        index: of the token in the text.
        window: that it was scored in.
        token_id: of the token.
        kl_nats: KL of the two distributions that predict it.
        p_reference, p_candidate: probability that each gives it.
        same_top1: both have the same most likely token.
        before, token, after: text.
    """

    index: int
    window: int
    token_id: int
    kl_nats: float
    p_reference: float
    p_candidate: float
    same_top1: bool
    before: str
    token: str
    after: str


def worst_tokens(tokens: "TokenTable", decode: Decode | None, most: int = MOST_TOKENS) -> list[TokenInContext]:
    """Return the finite tokens with the largest positive KL, the worst first; ties in the order of the text.

    Args:
        tokens: scores and places.
        decode: token ids to text; without it ids are shown.
        most: how many.
    """
    scores = tokens.scores
    kl = scores.kl_nats.tolist()
    finite = scores.finite.tolist()
    order = sorted((row for row in range(len(kl)) if finite[row] and kl[row] > 0), key=lambda row: -kl[row])
    windows = {window.index: window for window in tokens.windows}
    found = []
    for row in order[:most]:
        index, number = int(tokens.positions_T[row]), int(tokens.windows_T[row])
        window = windows[number]
        first, last = max(window.begin, index - _BEFORE), min(window.end, index + 1 + _AFTER)
        ids = tokens.token_ids
        found.append(
            TokenInContext(
                index=index,
                window=number,
                token_id=ids[index],
                kl_nats=kl[row],
                p_reference=math.exp(-float(scores.nll_reference[row])),
                p_candidate=math.exp(-float(scores.nll_candidate[row])),
                same_top1=bool(scores.top1_same[row]),
                before=_text(ids[first:index], decode),
                token=_text(ids[index : index + 1], decode),
                after=_text(ids[index + 1 : last], decode),
            )
        )
    return found


def _text(ids: Sequence[int], decode: Decode | None) -> str:
    if decode is None or not ids:
        return " ".join(map(str, ids))
    return visible_token(decode(list(ids)))
