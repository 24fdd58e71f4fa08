"""What is asked of the engine, and what it gives back."""

import math
from dataclasses import dataclass
from enum import StrEnum

from converters.errors import UsageError

_MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the next token.

    Args:
        max_tokens: output tokens at most, the end token included.
        temperature: divides the logits; 0 = always the most likely token, the other options then do nothing.
        top_k: keep the k most likely tokens; 0 = all.
        top_p: of those, keep the most likely ones that together reach this probability, from (0, 1].
        seed: of the random numbers; the same seed gives the same tokens.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse values without meaning, by name."""
        _require(self.max_tokens >= 1, "max_tokens", "at least 1", self.max_tokens)
        in_range = math.isfinite(self.temperature) and self.temperature >= 0
        _require(in_range, "temperature", "a finite number from 0", self.temperature)
        _require(self.top_k >= 0, "top_k", "at least 0 (0 = all tokens)", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0 and at most 1", self.top_p)
        _require(0 <= self.seed <= _MAX_SEED, "seed", "from 0 to 2^63 - 1", self.seed)


def _require(holds: bool, field: str, expected: str, value: float) -> None:
    if not holds:
        raise UsageError(field, expected=expected, found=str(value))


class FinishReason(StrEnum):
    """Why a generation ended."""

    STOP = "stop"  # an end token
    LENGTH = "length"  # max_tokens
    CONTEXT = "context"  # the context is full


@dataclass(frozen=True, slots=True)
class GeneratedToken:
    """One token of the output; only the last one has a finish reason."""

    token_id: int
    finish_reason: FinishReason | None = None
