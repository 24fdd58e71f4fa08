"""One prompt to one text, with the times it took."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from runtime.engine.engine import Engine
from runtime.engine.request import FinishReason, SamplingParams
from runtime.engine.tokenizer import TextStream, Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished output.

    Args:
        text: without special tokens; a character cut off at the end is left out.
        token_ids: the end token included, where there was one.
        finish_reason: why it ended.
        num_prompt_tokens: how many tokens it answers to.
        prefill_seconds: until the first token.
        decode_seconds: from the first token to the last.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    num_prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens processed a second."""
        return self.num_prompt_tokens / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float | None:
        """Tokens after the first, a second; None where there is only one."""
        steps = len(self.token_ids) - 1
        return steps / self.decode_seconds if steps else None


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    on_text: Callable[[str], None],
) -> Completion:
    """Generate to the end; on_text gets each piece of text as soon as it is complete.

    Raises:
        UsageError: a prompt that cannot be run; see `Engine.generate`.
        InputError: the model's logits are not finite.
    """
    stream, pieces, token_ids = TextStream(tokenizer), list[str](), list[int]()
    start = first = time.perf_counter()
    reason: FinishReason | None = None
    for token in engine.generate(prompt_ids, params):
        if not token_ids:
            first = time.perf_counter()
        token_ids.append(token.token_id)
        reason = token.finish_reason
        # an end token is not part of the text, special or not
        if reason is not FinishReason.STOP and (piece := stream.push(token.token_id)):
            pieces.append(piece)
            on_text(piece)
    assert reason is not None, token_ids
    return Completion(
        text="".join(pieces),
        token_ids=tuple(token_ids),
        finish_reason=reason,
        num_prompt_tokens=len(prompt_ids),
        prefill_seconds=first - start,
        decode_seconds=time.perf_counter() - first,
    )
