"""Which stretches of which texts are run: windows of equal length, drawn from all texts by a seed."""

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from converters.config import Glm4MoeConfig
from converters.errors import InputError, UsageError
from runtime.calibrate.options import CalibrateOptions
from runtime.engine.tokenizer import TOKENIZER_FILE, Tokenizer

# a prediction needs a token before it, and the MTP layer one after it
_MIN_WINDOW_TOKENS = 2


@dataclass(frozen=True)
class CalibrationText:
    """Token ids, window by window; `texts` says by digest where they come from, `available` is what the texts have."""

    windows: tuple[tuple[int, ...], ...]
    texts: tuple[dict[str, Any], ...]
    available: int

    @cached_property
    def num_tokens(self) -> int:
        """Tokens of all windows."""
        return sum(map(len, self.windows))

    @property
    def bounds(self) -> list[tuple[int, int]]:
        """Begin and end of each window among all tokens."""
        ends = [0]
        for window in self.windows:
            ends.append(ends[-1] + len(window))
        return list(pairwise(ends))


def read_texts(folder: Path, paths: Sequence[Path], options: CalibrateOptions) -> CalibrationText:
    """Encode texts with a checkpoint's tokenizer, cut each into windows, and draw windows until the tokens suffice.

    Windows keep the order of the texts. The last one drawn is cut short where num_tokens asks for it.

    Raises:
        UsageError: no text, not UTF-8, too short, or windows beyond the model's context.
        InputError: no usable tokenizer, or one of another model.
    """
    config = Glm4MoeConfig.from_folder(folder)
    if options.context_length > config.max_position_embeddings:
        raise UsageError(
            "--context-length",
            expected=f"at most {config.max_position_embeddings}, the model's own",
            found=str(options.context_length),
        )
    if not paths:
        raise UsageError("--text", expected="at least one file", found="none")
    tokenizer = Tokenizer.open(folder)
    texts: list[dict[str, Any]] = []
    windows: list[tuple[int, ...]] = []
    available = 0
    for path in paths:
        data = path.read_bytes()
        ids = tokenizer.encode(_decode(path, data))
        texts.append({"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "tokens": len(ids)})
        windows += _cut(ids, options.context_length)
        available += len(ids)
    if not windows:
        raise UsageError(
            "--text",
            expected="at least 2 tokens",
            found=str(available),
            next_step="Give a text of the kind the model will see; 32768 tokens make a good calibration.",
        )
    drawn = _draw(windows, options)
    _check_ids(folder, config, drawn)
    return CalibrationText(drawn, tuple(texts), available)


def _decode(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise UsageError(f"--text {path}", expected="valid UTF-8", found=found) from error


def _cut(ids: Sequence[int], length: int) -> list[tuple[int, ...]]:
    windows = [tuple(ids[begin : begin + length]) for begin in range(0, len(ids), length)]
    return [window for window in windows if len(window) >= _MIN_WINDOW_TOKENS]


def _draw(windows: Sequence[tuple[int, ...]], options: CalibrateOptions) -> tuple[tuple[int, ...], ...]:
    order = list(range(len(windows)))
    random.Random(options.seed).shuffle(order)
    left, taken = options.num_tokens, dict[int, tuple[int, ...]]()
    for index in order:
        if left < _MIN_WINDOW_TOKENS:
            break
        taken[index] = windows[index][:left]
        left -= len(taken[index])
    return tuple(window for _, window in sorted(taken.items()))


def _check_ids(folder: Path, config: Glm4MoeConfig, windows: Sequence[tuple[int, ...]]) -> None:
    largest = max(map(max, windows))
    if largest >= config.vocab_size:
        raise InputError(
            str(folder / TOKENIZER_FILE),
            expected=f"token ids below vocab_size {config.vocab_size}",
            found=str(largest),
            next_step="This is another model's tokenizer.",
        )
