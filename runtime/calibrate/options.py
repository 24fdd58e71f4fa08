"""How to calibrate. No torch here: the command line reads this module for its defaults."""

from dataclasses import dataclass
from pathlib import Path

from converters.errors import UsageError

DEFAULT_NUM_TOKENS = 32768
DEFAULT_CONTEXT_LENGTH = 512
DEFAULT_MIN_EXPERT_TOKENS = 32
DEFAULT_MAX_MEMORY = 4 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateOptions:
    """What decides the statistics, and how the run may use the machine.

    Args:
        num_tokens: use so many tokens, in windows drawn from all texts; all of them where the texts have fewer.
        context_length: tokens of a window, each run from an empty cache.
        seed: of the draw of windows.
        min_expert_tokens: an expert that fewer tokens were routed to is measured on more of the layer's tokens.
        device: cpu or cuda.
        max_memory: bytes that weights, hidden states and activations may take together; hidden states that do not fit
            go to a scratch file.
        scratch: folder of that file, which has no name and is gone with the process; None = the system's own.
    """

    num_tokens: int = DEFAULT_NUM_TOKENS
    context_length: int = DEFAULT_CONTEXT_LENGTH
    seed: int = 0
    min_expert_tokens: int = DEFAULT_MIN_EXPERT_TOKENS
    device: str = "cpu"
    max_memory: int = DEFAULT_MAX_MEMORY
    scratch: Path | None = None

    def __post_init__(self) -> None:
        """Refuse sizes that leave nothing to measure."""
        for option, value, least in (
            ("--num-tokens", self.num_tokens, 2),
            ("--context-length", self.context_length, 2),
            ("--min-expert-tokens", self.min_expert_tokens, 0),
            ("--seed", self.seed, 0),
        ):
            if value < least:
                raise UsageError(option, expected=f"at least {least}", found=str(value))
