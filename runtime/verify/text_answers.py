"""What a model says to a prompt, and what can be seen of an answer by itself."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from runtime.engine.completion import complete
from runtime.engine.engine import Engine
from runtime.engine.request import SamplingParams
from runtime.engine.tokenizer import Tokenizer

# a text that ends with this many copies of one stretch, the last one maybe cut short, is a loop
_LOOP_COPIES = 4
_LOOP_TOKENS = 24
_TOOL_CALL = re.compile(
    r"<tool_call>\s*([\w.-]+)\s*((?:<arg_key>[^<]*</arg_key>\s*<arg_value>.*?</arg_value>\s*)*)</tool_call>", re.DOTALL
)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says: its tokens with the end token, the text, why it ended, and whether it runs in circles."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    is_loop: bool
    tool_calls: tuple[str, ...]


def is_loop(token_ids: Sequence[int]) -> bool:
    """Return whether a text ends with one stretch again and again: at least 4 times, over at least 24 tokens."""
    ids = list(token_ids)
    for period in range(1, len(ids) // _LOOP_COPIES + 1):
        span = max(_LOOP_COPIES * period, _LOOP_TOKENS)
        tail = ids[-span:]
        if len(tail) == span and tail[period:] == tail[:-period]:
            return True
    return False


def tool_calls(text: str) -> tuple[str, ...]:
    """Return the names of the functions that an answer calls, as far as the calls are well-formed."""
    return tuple(match[1] for match in _TOOL_CALL.finditer(text))


def answer_prompt(engine: Engine, tokenizer: Tokenizer, prompt_ids: Sequence[int], max_tokens: int) -> Answer:
    """Answer greedily, with at most so many tokens."""
    done = complete(engine, tokenizer, prompt_ids, SamplingParams(max_tokens=max_tokens), on_text=lambda _: None)
    return Answer(done.token_ids, done.text, done.finish_reason, is_loop(done.token_ids), tool_calls(done.text))


@torch.inference_mode()
def top_tokens(
    engine: Engine, prompt_ids: Sequence[int], answer: Answer, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (T, N) and log-probabilities (T, N) at each place of an answer, most likely first."""
    model = engine.model
    device = model.model.embed_tokens.weight.device
    ids_1T = torch.tensor([[*prompt_ids, *answer.token_ids[:-1]]], device=device)
    logits_TV = model.logits(model(ids_1T)[0, len(prompt_ids) - 1 :])
    top = logits_TV.log_softmax(-1).topk(min(count, logits_TV.shape[1]))
    return top.indices.cpu(), top.values.cpu()
