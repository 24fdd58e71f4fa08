"""Choose the next token from logits.

Shapes: V vocab, 1 row.
"""

import torch

from converters.errors import InputError
from runtime.engine.request import SamplingParams
from runtime.model.ops import LayerOps

_MAX_TOP_K = (1 << 31) - 1


class Sampler:
    """The choices of one request. Random numbers are Philox's, so that a seed means the same on every device.

    Args:
        params: how to choose.
        ops: kernels or their twins.
        device: where the logits are.
    """

    def __init__(self, params: SamplingParams, ops: LayerOps, device: torch.device | str = "cpu") -> None:
        self._ops = ops
        # fp32 divides by nothing smaller
        self._is_greedy = params.temperature < torch.finfo(torch.float32).tiny
        temperature = 0.0 if self._is_greedy else params.temperature
        self._temperature_1 = torch.tensor([temperature], dtype=torch.float32, device=device)
        self._top_k_1 = torch.tensor([min(params.top_k, _MAX_TOP_K)], dtype=torch.int32, device=device)
        self._top_p_1 = torch.tensor([params.top_p], dtype=torch.float32, device=device)
        self._seed_1 = torch.tensor([params.seed], device=device)
        self._offset_1 = torch.zeros_like(self._seed_1)
        self._uniform_1 = torch.zeros(1, dtype=torch.float64, device=device)

    def draw(self, logits_1V: torch.Tensor) -> torch.Tensor:
        """Return the next token's id (1,) int64 from logits (1, V) fp32; the host does not wait for it.

        Of equal logits the lower id counts as more likely. -1: a logit is NaN or infinite.
        """
        if not self._is_greedy:
            self._ops.philox_uniforms(self._seed_1, self._offset_1, out=self._uniform_1)
            self._offset_1.add_(1)
        return self._ops.sample(logits_1V, self._temperature_1, self._top_k_1, self._top_p_1, self._uniform_1)


def token_of(ids_1: torch.Tensor) -> int:
    """Return an id that a sampler drew, once it is there.

    Raises:
        InputError: a logit was NaN or infinite; such a model would otherwise answer with a run of token 0.
    """
    token_id = int(ids_1)
    if token_id < 0:
        raise InputError(
            "logits",
            expected="finite numbers",
            found="NaN or Inf",
            next_step="A weight is damaged or overflows in this dtype.",
        )
    return token_id
