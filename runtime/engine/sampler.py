"""Choose the next token from logits.

Shapes: V vocab.
"""

import torch

from converters.errors import InputError
from runtime.engine.request import SamplingParams


class Sampler:
    """The choices of one request. Random numbers are drawn on the CPU, so a seed means the same on every device."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator().manual_seed(params.seed)

    def sample(self, logits_V: torch.Tensor) -> int:
        """Return the next token's id from logits (V,) fp32; of equal logits the lower id counts as more likely.

        Raises:
            InputError: a logit is NaN or infinite; such a model would otherwise answer with a run of token 0.
        """
        if not bool(torch.isfinite(logits_V).all()):
            raise InputError(
                "logits",
                expected="finite numbers",
                found="NaN or Inf",
                next_step="A weight is damaged or overflows in this dtype.",
            )
        if self.params.temperature == 0:
            # argmax leaves open which of several maxima it returns
            return int((logits_V == logits_V.max()).nonzero()[0])
        probabilities, ids = nucleus(logits_V.cpu(), self.params)
        cumulative = probabilities.cumsum(0)
        draw = torch.rand(1, generator=self._generator, dtype=torch.float64) * cumulative[-1]
        # the draw lies in [0, total), and an interval belongs to the token at its right end
        index = min(int(torch.searchsorted(cumulative, draw, right=True)), len(ids) - 1)
        return int(ids[index])


def nucleus(logits_V: torch.Tensor, params: SamplingParams) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens that temperature, top-k and top-p leave, most likely first.

    Args:
        logits_V: (V,) fp32, finite.
        params: temperature > 0; applied first, then top-k, then top-p to what top-k left.
    Returns:
        probabilities (N,) fp64, of the tokens left and not renormalized after top-p, and ids (N,) int64; N >= 1.
    """
    sorted_V, ids_V = logits_V.to(torch.float64).sort(descending=True, stable=True)
    kept = params.top_k or len(ids_V)
    # the largest is subtracted first, so that no temperature, however small, overflows
    probabilities = ((sorted_V[:kept] - sorted_V[0]) / params.temperature).softmax(0)
    # a token stays while those before it have not reached top_p; before the first there is 0, so it always stays
    inside = probabilities.cumsum(0) - probabilities < params.top_p
    return probabilities[inside], ids_V[:kept][inside]
