"""What temperature, top-k and top-p leave of a distribution, in fp64 and sorted: what sampling is held against.

Shapes: V vocab, N tokens left.
"""

import torch

from runtime.engine.request import SamplingParams


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
    probabilities = ((sorted_V[:kept] - sorted_V[0]) / params.temperature).softmax(0)
    # a token stays while those before it have not reached top_p; before the first there is 0, so it always stays
    inside = probabilities.cumsum(0) - probabilities < params.top_p
    return probabilities[inside], ids_V[:kept][inside]
