"""How much memory a block of rows takes on its way through a layer, from sizes alone.

Shapes: R rows of a chunk, T tokens of a window.
"""

from converters.config import Glm4MoeConfig
from runtime.streaming.attention import CHUNK_TOKENS
from runtime.streaming.experts import EXPERT_ROWS

FP32 = 4
# scores, their masked copy, and their softmax
_SCORE_COPIES = 3


def activation_bytes(
    config: Glm4MoeConfig, window: int, *, element_bytes: int = FP32, chunk: int = CHUNK_TOKENS
) -> int:
    """Return what attention, a dense MLP or an expert need for one block of rows, whichever is most.

    Args:
        config: of the model.
        window: tokens of the longest window.
        element_bytes: what each activation takes with what is kept of it.
        chunk: tokens of a window that attention takes at a time.
    """
    rows = min(chunk, window)
    scores = _SCORE_COPIES * config.num_attention_heads * rows * window * FP32
    cache = 2 * window * config.kv_size * FP32
    widths = 6 * (config.q_size + config.hidden_size) + 2 * config.kv_size
    attention = scores + cache + rows * widths * element_bytes
    dense = rows * (3 * config.hidden_size + 4 * max(config.intermediate_size, config.shared_intermediate_size))
    return max(attention, dense * element_bytes, expert_bytes(config, element_bytes=element_bytes))


def expert_bytes(config: Glm4MoeConfig, *, element_bytes: int = FP32) -> int:
    """Return what an expert needs for the rows that it takes at a time."""
    return EXPERT_ROWS * (3 * config.hidden_size + 4 * config.moe_intermediate_size) * element_bytes
