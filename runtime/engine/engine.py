"""Run requests: prefill in chunks, then one token at a time."""

from collections.abc import Iterator, Sequence

import torch

from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from runtime.config import EngineConfig
from runtime.engine.request import FinishReason, GeneratedToken, SamplingParams
from runtime.engine.sampler import Sampler, token_of
from runtime.model.decoder import CausalLM, new_cache
from runtime.model.ops import LayerOps


class Engine:
    """A model with the rules that end a generation.

    Args:
        model: loaded.
        config: how it was loaded, and the limits of a run.
        end_token_ids: each of them ends the output; see `read_end_token_ids`.
    """

    def __init__(self, model: CausalLM, config: EngineConfig, end_token_ids: frozenset[int]) -> None:
        self.model = model
        self.config = config
        self.end_token_ids = end_token_ids
        self.max_context_tokens = context_limit(model.config, config)

    def generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[GeneratedToken]:
        """Yield the output token by token; the last one has a finish reason and, for STOP, is the end token itself.

        Args:
            prompt_ids: at least one id below vocab_size, fewer than the context holds.
            params: how to choose tokens, and how many.
        Raises:
            UsageError: the prompt is empty, too long, or has an id outside the vocabulary.
            InputError: the model's logits are not finite.
        Memory: a KV cache for the prompt and max_tokens, as far as the context allows.
        """
        check_prompt(prompt_ids, self.model.config, self.config)
        return self._generate(prompt_ids, params)

    def _generate(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[GeneratedToken]:
        capacity = min(len(prompt_ids) + params.max_tokens, self.max_context_tokens)
        device = self.model.model.embed_tokens.weight.device
        cache = new_cache(self.model, capacity)
        sampler = Sampler(params, self.model.ops or LayerOps.of_twins(), device)
        pending_1T = torch.tensor([list(prompt_ids)], device=device)
        for num_generated in range(1, params.max_tokens + 1):
            for chunk_1T in pending_1T.split(self.config.prefill_chunk_tokens, dim=1):
                hidden_1TD = self.model(chunk_1T, cache=cache)
            ids_1 = sampler.draw(self.model.logits(hidden_1TD[:, -1]))
            token_id = token_of(ids_1)
            reason = self._finish_reason(token_id, len(prompt_ids) + num_generated, params.max_tokens - num_generated)
            yield GeneratedToken(token_id, reason)
            if reason is not None:
                return
            pending_1T = ids_1[:, None]

    def _finish_reason(self, token_id: int, num_context_tokens: int, num_tokens_left: int) -> FinishReason | None:
        if token_id in self.end_token_ids:
            return FinishReason.STOP
        if num_tokens_left == 0:
            return FinishReason.LENGTH
        if num_context_tokens >= self.max_context_tokens:
            return FinishReason.CONTEXT
        return None


def context_limit(model: Glm4MoeConfig, engine: EngineConfig) -> int:
    """Return how many tokens prompt and output may have together.

    Raises:
        UsageError: the engine is to run past the positions that the model was trained for.
    """
    limit = model.max_position_embeddings
    if engine.max_context_tokens is None:
        return limit
    if engine.max_context_tokens > limit:
        raise UsageError("max_context_tokens", expected=f"at most {limit}", found=str(engine.max_context_tokens))
    return engine.max_context_tokens


def check_prompt(prompt_ids: Sequence[int], model: Glm4MoeConfig, engine: EngineConfig) -> None:
    """Refuse what `Engine.generate` cannot run; needs no weights.

    Raises:
        UsageError: the prompt is empty, too long, or has an id outside the vocabulary.
    """
    limit = context_limit(model, engine)
    if not prompt_ids:
        raise UsageError("prompt", expected="at least one token", found="none")
    if len(prompt_ids) >= limit:
        raise UsageError("prompt", expected=f"fewer than {limit} tokens", found=f"{len(prompt_ids)}")
    outside = next((token for token in prompt_ids if not 0 <= token < model.vocab_size), None)
    if outside is not None:
        raise UsageError(
            "prompt",
            expected=f"token ids from 0 to {model.vocab_size - 1}",
            found=str(outside),
            next_step="The tokenizer does not belong to this model.",
        )
