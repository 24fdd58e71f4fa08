"""Which stretches of a text are fed, and which of their positions are scored.

A window [begin, end) of token ids is one forward pass from an empty cache. Logits at position i of the text predict
token i + 1, so the first token of a window has no prediction there. With stride = context_length windows are disjoint
and that first token is never scored; with a smaller stride it was scored by the window before, and every token of the
text but its very first is scored exactly once. No window spans two texts.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from converters.errors import UsageError

# what llama.cpp measures with; longer windows flatter both models alike
DEFAULT_CONTEXT_LENGTH = 512
TEXT_OPTION = "--text"


@dataclass(frozen=True, slots=True)
class Window:
    """Token ids [begin, end) of the text; the tokens [first_scored, end) are scored."""

    index: int
    begin: int
    first_scored: int
    end: int

    @property
    def num_scored(self) -> int:
        """Number of tokens scored."""
        return self.end - self.first_scored

    @property
    def logit_rows(self) -> slice:
        """Rows of the window's logits that predict the scored tokens."""
        return slice(self.first_scored - self.begin - 1, self.end - self.begin - 1)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """The windows of one text, or of several one after the other, and the protocol they follow.

    Attributes:
        num_text_tokens: tokens that the texts have.
        num_tokens: those that are run.
        context_length: most tokens of a window.
        stride: tokens from one window's begin to the next.
        windows: in order.
        num_texts: how many texts there are.
        seed: by which windows were drawn from several texts; None where they were not drawn.
        origin: what the texts are, where that is not the user's own text.
    """

    num_text_tokens: int
    num_tokens: int
    context_length: int
    stride: int
    windows: tuple[Window, ...]
    num_texts: int = 1
    seed: int | None = None
    origin: str = ""

    @property
    def num_scored(self) -> int:
        """Number of tokens scored, over all windows."""
        return sum(window.num_scored for window in self.windows)

    @property
    def protocol(self) -> str:
        """Return one sentence that lets another tool repeat the measurement."""
        text = "the text" if self.num_texts == 1 else "each text"
        scored = "every token but the first of each window"
        if self.stride < self.context_length:
            scored = f"every token but the first of {text}, once, with the longest context that the stride gives"
        return (
            f"{self._tokens_taken}, no prefix tokens, {len(self.windows)} windows "
            f"of at most {self.context_length}, stride {self.stride}; {self.num_scored} tokens scored: {scored}"
        )

    @property
    def _tokens_taken(self) -> str:
        taken = f"{self.num_tokens} of {self.num_text_tokens} tokens"
        origin = f" ({self.origin})" if self.origin else ""
        if self.num_texts == 1:
            return f"first {taken}{origin}"
        drawn = "" if self.seed is None else f", windows drawn from each text in turn with seed {self.seed}"
        return f"{taken} of {self.num_texts} texts{origin}{drawn}"


def plan_windows(
    num_text_tokens: int, *, context_length: int, stride: int | None = None, num_tokens: int | None = None
) -> WindowPlan:
    """Cut the first num_tokens tokens of a text (all of them by default) into windows.

    Args:
        num_text_tokens: tokens the text has.
        context_length: most tokens of a window, at least 2.
        stride: tokens from one window's begin to the next; context_length by default, so that windows are disjoint.
        num_tokens: use at most this many tokens of the text.

    Raises:
        UsageError: a size that leaves nothing to score, or a stride that would skip tokens.
    """
    stride = _checked_stride(context_length, stride, num_tokens)
    _check_text(num_text_tokens, TEXT_OPTION)
    used = num_text_tokens if num_tokens is None else min(num_tokens, num_text_tokens)
    return WindowPlan(num_text_tokens, used, context_length, stride, _cut(used, context_length, stride))


def plan_texts(
    lengths: Sequence[int],
    *,
    context_length: int,
    stride: int | None = None,
    num_tokens: int | None = None,
    seed: int = 0,
    subject: str = TEXT_OPTION,
) -> tuple[WindowPlan, tuple[range, ...]]:
    """Cut several texts into windows, none of which spans two of them; see `plan_windows` for one text.

    Where fewer tokens are asked for than there are, windows are drawn: the texts take turns, each gives one of its
    windows at random, and the last one drawn is cut short. They keep the order of the texts.

    Args:
        lengths: tokens of each text.
        context_length, stride, num_tokens: as in `plan_windows`.
        seed: of the draws.
        subject: the option that names the texts, for errors.
    Returns:
        The plan, whose windows count in the tokens that are run, and where these stand among all tokens: ranges one
        after the other.
    Raises:
        UsageError: as in `plan_windows`; or windows that overlap are to be drawn.
    """
    stride = _checked_stride(context_length, stride, num_tokens)
    available = sum(lengths)
    _check_text(max(lengths, default=0), subject)
    if len(lengths) == 1:
        plan = plan_windows(available, context_length=context_length, stride=stride, num_tokens=num_tokens)
        return plan, (range(plan.num_tokens),)
    starts = list(accumulate(lengths, initial=0))
    if num_tokens is None or num_tokens >= available:
        cuts = [
            _moved(_cut(length, context_length, stride), start)
            for length, start in zip(lengths, starts[:-1], strict=True)
        ]
        windows = _numbered(window for cut in cuts for window in cut)
        plan = WindowPlan(available, available, context_length, stride, windows, len(lengths))
        return plan, (range(available),)
    if stride < context_length:
        raise UsageError(
            "--stride",
            expected=f"the context length, {context_length}, where --num-tokens draws windows from several texts",
            found=str(stride),
            next_step="Windows that overlap are taken whole; leave out --num-tokens.",
        )
    taken = _draw(lengths, context_length, num_tokens, seed)
    spans = tuple(range(starts[text] + begin, starts[text] + end) for text, begin, end in taken)
    begins = list(accumulate(map(len, spans), initial=0))
    windows = tuple(Window(index, begins[index], begins[index] + 1, begins[index + 1]) for index in range(len(spans)))
    return WindowPlan(available, begins[-1], context_length, stride, windows, len(lengths), seed), spans


def _draw(lengths: Sequence[int], size: int, num_tokens: int, seed: int) -> list[tuple[int, int, int]]:
    """Return (text, begin, end) of disjoint windows that have num_tokens tokens together, or one fewer."""
    generator = random.Random(seed)
    piles = [
        [(text, window.begin, window.end) for window in _cut(length, size, size)] for text, length in enumerate(lengths)
    ]
    for pile in piles:
        generator.shuffle(pile)
    taken: list[tuple[int, int, int]] = []
    while num_tokens >= 2 and any(piles):
        for pile in piles:
            if pile and num_tokens >= 2:
                text, begin, end = pile.pop()
                taken.append((text, begin, min(end, begin + num_tokens)))
                num_tokens -= taken[-1][2] - begin
    return sorted(taken)


def _moved(windows: Sequence[Window], start: int) -> list[Window]:
    return [Window(w.index, w.begin + start, w.first_scored + start, w.end + start) for w in windows]


def _numbered(windows: Iterator[Window]) -> tuple[Window, ...]:
    return tuple(Window(index, w.begin, w.first_scored, w.end) for index, w in enumerate(windows))


def _checked_stride(context_length: int, stride: int | None, num_tokens: int | None) -> int:
    stride = context_length if stride is None else stride
    if context_length < 2:
        raise UsageError(
            "--context-length",
            expected="at least 2 tokens",
            found=str(context_length),
            next_step="A token is scored by the logits of the token before it.",
        )
    if not 1 <= stride <= context_length:
        raise UsageError(
            "--stride",
            expected=f"1 to the context length, {context_length}",
            found=str(stride),
            next_step="A larger stride would leave tokens out.",
        )
    if num_tokens is not None and num_tokens < 2:
        raise UsageError("--num-tokens", expected="at least 2 tokens", found=str(num_tokens))
    return stride


def _check_text(num_text_tokens: int, subject: str) -> None:
    if num_text_tokens < 2:
        raise UsageError(
            subject,
            expected="at least 2 tokens",
            found=str(num_text_tokens),
            next_step="Give a longer text; a few thousand tokens make a useful measurement.",
        )


def _cut(num_tokens: int, context_length: int, stride: int) -> tuple[Window, ...]:
    windows: list[Window] = []
    scored_to = 0
    for begin in range(0, num_tokens, stride):
        end = min(begin + context_length, num_tokens)
        first_scored = max(begin + 1, scored_to)
        if first_scored < end:
            windows.append(Window(len(windows), begin, first_scored, end))
            scored_to = end
        if end == num_tokens:
            break
    return tuple(windows)
