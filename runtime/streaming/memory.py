"""Memory that a block of rows takes on its way through a layer, from sizes alone; what does not fit goes to disk.

Shapes: R rows of a chunk, T tokens of a window.
"""

from dataclasses import Field, replace
from typing import Any, ClassVar, Protocol, TypeVar

from converters.config import Glm4MoeConfig
from converters.errors import ResourceError
from runtime.streaming.attention import CHUNK_TOKENS
from runtime.streaming.experts import EXPERT_ROWS

FP32 = 4
# scores, their masked copy, and their softmax
_SCORE_COPIES = 3


class HiddenMemory(Protocol):
    """A dataclass of bytes at the peak, hidden states among them, which may lie in a scratch file."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def hidden_on_disk(self) -> bool:
        """Whether they do."""

    @property
    def peak_bytes(self) -> int:
        """Memory, a mapped scratch file not counted."""


M = TypeVar("M", bound=HiddenMemory)


def fitted(memory: M, max_memory: int, *, least: str, remedy: str) -> M:
    """Return the memory of a run, with the hidden states on disk where they do not fit otherwise.

    Args:
        memory: with the hidden states in memory.
        max_memory: bytes.
        least: what has to be there in any case, in words.
        remedy: what the user can do.
    Raises:
        ResourceError: it would not fit even with the hidden states on disk.
    """
    if memory.peak_bytes <= max_memory:
        return memory
    memory = replace(memory, hidden_on_disk=True)
    if memory.peak_bytes > max_memory:
        raise ResourceError(
            "--max-memory",
            expected=f"at least {memory.peak_bytes} bytes: {least}",
            found=str(max_memory),
            next_step=remedy,
        )
    return memory


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
