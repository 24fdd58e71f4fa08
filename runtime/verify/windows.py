"""Which stretches of a text are fed, and which of their positions are scored.

A window [begin, end) of token ids is one forward pass from an empty cache. Logits at position i of the text predict
token i + 1, so the first token of a window has no prediction there. With stride = context_length windows are disjoint
and that first token is never scored; with a smaller stride it was scored by the window before, and every token of the
text but its very first is scored exactly once.
"""

from dataclasses import dataclass

from converters.errors import UsageError

# what llama.cpp measures with; longer windows flatter both models alike
DEFAULT_CONTEXT_LENGTH = 512


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
    """The windows of one text and the protocol they follow."""

    num_text_tokens: int
    num_tokens: int
    context_length: int
    stride: int
    windows: tuple[Window, ...]

    @property
    def num_scored(self) -> int:
        """Number of tokens scored, over all windows."""
        return sum(window.num_scored for window in self.windows)

    @property
    def protocol(self) -> str:
        """Return one sentence that lets another tool repeat the measurement."""
        scored = "every token but the first of each window"
        if self.stride < self.context_length:
            scored = "every token but the first of the text, once, with the longest context that the stride gives"
        return (
            f"first {self.num_tokens} of {self.num_text_tokens} tokens, no prefix tokens, {len(self.windows)} windows "
            f"of at most {self.context_length}, stride {self.stride}; {self.num_scored} tokens scored: {scored}"
        )


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
    if num_text_tokens < 2:
        raise UsageError(
            "--text",
            expected="at least 2 tokens",
            found=str(num_text_tokens),
            next_step="Give a longer text; a few thousand tokens make a useful measurement.",
        )
    used = num_text_tokens if num_tokens is None else min(num_tokens, num_text_tokens)
    return WindowPlan(num_text_tokens, used, context_length, stride, _cut(used, context_length, stride))


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
