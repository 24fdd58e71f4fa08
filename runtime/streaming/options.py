"""How to stream. No torch here: the command line reads this module for its defaults."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from converters.errors import UsageError
from converters.formats.inputs import FULL

LAYERS, LOGITS = "layers", "logits"
DEFAULT_MAX_MEMORY = 8 << 30
DEFAULT_FLOOR_TOKENS = 256


class Progress(Protocol):
    """Who wants to know how far it is, in bytes of weights read."""

    def advance(self, num_bytes: int) -> None:
        """Count bytes as done; called by the threads that read."""

    def describe(self, text: str) -> None:
        """Take note of what is being worked on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamOptions:
    """What is computed, and how the run may use the machine.

    Args:
        levels: of LAYERS and LOGITS, what a comparison is to measure.
        dtype: of compute; fp32 keeps the runtime's own rounding out of the result.
        device: cpu or cuda.
        activations: full, or as-served; see `EngineConfig`.
        deterministic: compute as the model in memory does, window by window, bit for bit.
        floor: measure what noise of 2^-9 does to the reference.
        floor_tokens: on the leading whole windows that have so many tokens together, at least on one window.
        seed: of the noise and of the bootstrap.
        with_mtp: run the MTP layer where all sides have it.
        max_memory: bytes that weights, hidden states and activations may take together; hidden states that do not fit
            go to a scratch file.
        scratch: folder of that file, which has no name and is gone with the process; None = the system's own.
        workers: threads that read.
    """

    levels: frozenset[str] = frozenset({LAYERS, LOGITS})
    dtype: str = "float32"
    device: str = "cpu"
    activations: str = FULL
    deterministic: bool = False
    floor: bool = True
    floor_tokens: int = DEFAULT_FLOOR_TOKENS
    seed: int = 0
    with_mtp: bool = True
    max_memory: int = DEFAULT_MAX_MEMORY
    scratch: Path | None = None
    workers: int = 1

    def __post_init__(self) -> None:
        """Refuse what leaves nothing to do."""
        assert self.levels <= {LAYERS, LOGITS}, self.levels
        for option, value, least in (
            ("--floor-tokens", self.floor_tokens, 1),
            ("--seed", self.seed, 0),
            ("--workers", self.workers, 1),
        ):
            if value < least:
                raise UsageError(option, expected=f"at least {least}", found=str(value))
