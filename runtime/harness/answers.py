"""What an evaluation harness asks of a model: how likely texts are, and what it would say.

No harness is imported here. Shape suffixes: T tokens fed, C tokens of a continuation, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from runtime.config import EngineConfig, resolve_device, resolve_dtype
from runtime.engine.engine import Engine, context_limit
from runtime.engine.request import FinishReason, SamplingParams
from runtime.engine.tokenizer import TextStream, Tokenizer, read_end_token_ids
from runtime.model.decoder import new_cache
from runtime.model.loader import load_model

# positions whose logits are held at once: 128 x 151552 fp32 = 74 MiB
_LOGIT_ROWS = 128
# windows longer than this make a perplexity that hardly differs, and cost memory
DEFAULT_MAX_LENGTH = 4096


@dataclass(frozen=True, slots=True)
class Likelihood:
    """How likely a continuation is: the sum of its tokens' log-probabilities in nats, and whether each is the first."""

    logprob: float
    is_greedy: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateOptions:
    """How to answer: until one of the stop texts, which is left out, an end token, or the most tokens."""

    until: tuple[str, ...] = ()
    params: SamplingParams


class Answerer:
    """A loaded checkpoint that answers one request at a time.

    Args:
        engine: the model.
        tokenizer: of its folder.
        max_length: most tokens that are fed for one prediction.
    """

    def __init__(self, engine: Engine, tokenizer: Tokenizer, max_length: int) -> None:
        self.engine, self.tokenizer, self.max_length = engine, tokenizer, max_length
        self._fed: tuple[int, ...] = ()
        self._hidden_TD = torch.empty(0)

    @classmethod
    def open(
        cls, folder: Path, *, dtype: str = "auto", device: str = "auto", max_length: int | None = None
    ) -> "Answerer":
        """Load a checkpoint folder.

        Raises:
            InputError: it cannot be loaded. UsageError: max_length is beyond the model's context.
        """
        config = Glm4MoeConfig.from_folder(folder)
        how = EngineConfig(dtype=resolve_dtype(dtype, config.dtype), device=resolve_device(device))
        limit = context_limit(config, how)
        if max_length is not None and not 2 <= max_length <= limit:
            raise UsageError("max_length", expected=f"2 to {limit}", found=str(max_length))
        engine = Engine(load_model(folder, how, with_mtp=False).model, how, read_end_token_ids(folder))
        return cls(engine, Tokenizer.open(folder), max_length or min(limit, DEFAULT_MAX_LENGTH))

    @property
    def end_token_id(self) -> int:
        """What stands for nothing before a text: the first end token of config.json, as transformers' tokenizer has."""
        return self.engine.model.config.eos_token_id[0]

    @torch.inference_mode()
    def likelihood(self, context: Sequence[int], continuation: Sequence[int]) -> Likelihood:
        """Return how likely a continuation is after a context; the context's begin is cut where it is too long.

        Raises:
            UsageError: there is no context, or the continuation alone is longer than max_length.
        """
        if not context or not continuation or len(continuation) > self.max_length:
            raise UsageError(
                "loglikelihood",
                expected=f"a context, and a continuation of 1 to {self.max_length} tokens",
                found=f"{len(context)} and {len(continuation)} tokens",
            )
        fed = (*context, *continuation)[-self.max_length - 1 : -1]
        hidden_CD = self._hidden(fed)[len(fed) - len(continuation) :]
        expected_C = torch.tensor(continuation, device=hidden_CD.device)
        total, is_greedy = 0.0, True
        for rows, ids in zip(hidden_CD.split(_LOGIT_ROWS), expected_C.split(_LOGIT_ROWS), strict=True):
            logits_CV = self.engine.model.logits(rows)
            total += logits_CV.log_softmax(-1).gather(1, ids[:, None]).double().sum().item()
            is_greedy = is_greedy and bool((logits_CV.argmax(-1) == ids).all())
        return Likelihood(total, is_greedy)

    def generate(self, prompt: Sequence[int], options: GenerateOptions) -> str:
        """Return what the model says; the prompt's begin is cut where prompt and answer would be too long together."""
        room = self.max_length - options.params.max_tokens
        if room < 1:
            raise UsageError(
                "generate_until",
                expected=f"fewer than {self.max_length} tokens of output",
                found=str(options.params.max_tokens),
                next_step="Raise max_length or lower max_gen_toks.",
            )
        stream, text = TextStream(self.tokenizer), ""
        for token in self.engine.generate(list(prompt)[-room:], options.params):
            if token.finish_reason is FinishReason.STOP:
                break
            text += stream.push(token.token_id)
            cut = [text.find(stop) for stop in options.until if stop and stop in text]
            if cut:
                return text[: min(cut)]
        return text

    def _hidden(self, fed: tuple[int, ...]) -> torch.Tensor:
        """Return the hidden states (T, D) of a prompt; those of the last one are kept, as choices often share it."""
        if fed != self._fed:
            model, config = self.engine.model, self.engine.config
            cache = new_cache(model, len(fed))
            ids_1T = torch.tensor([fed], device=model.model.embed_tokens.weight.device)
            chunks = [model(chunk, cache=cache)[0] for chunk in ids_1T.split(config.prefill_chunk_tokens, dim=1)]
            self._fed, self._hidden_TD = fed, torch.cat(chunks)
        return self._hidden_TD


def rolling_pairs(token_ids: Sequence[int], prefix: int, length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Yield (context, continuation) such that every token is predicted once, as lm-evaluation-harness cuts a text.

    Continuations have `length` tokens, and the token before them as context, `prefix` before the first. The last one
    is shorter and has as much more context.
    """
    ids = [prefix, *token_ids]
    for begin in range(0, len(token_ids), length):
        end = min(begin + length, len(token_ids))
        start = begin if end - begin == length or begin == 0 else end - length
        yield ids[start : begin + 1], ids[begin + 1 : end + 1]
