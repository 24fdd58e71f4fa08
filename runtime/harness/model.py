"""The model that lm-evaluation-harness sees; importing this module needs lm_eval."""

from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from converters.errors import UsageError
from runtime.engine.request import SamplingParams
from runtime.engine.template import read_template, render_chat
from runtime.harness.answers import Answerer, GenerateOptions, rolling_pairs

# arguments of the harness that say nothing to a runtime which takes one request at a time
_BATCHES = ("batch_size", "max_batch_size")


class Glm4Moe(TemplateLM):
    """`--model glm4moe --model_args pretrained=DIR`, with dtype, device, max_length and enable_thinking as options."""

    def __init__(
        self,
        pretrained: str,
        dtype: str = "auto",
        device: str | None = None,
        max_length: int | None = None,
        enable_thinking: bool = True,
        **others: Any,
    ) -> None:
        super().__init__()
        unknown = sorted(name for name in others if name not in _BATCHES)
        if unknown:
            names = "pretrained, dtype, device, max_length, enable_thinking"
            raise UsageError(f"--model_args {unknown[0]}", expected=f"one of {names}", found=unknown[0])
        self.folder, self.enable_thinking = Path(pretrained), enable_thinking
        self.answerer = Answerer.open(self.folder, dtype=dtype, device=_device(device), max_length=max_length)

    @property
    def max_length(self) -> int:
        """Most tokens of one prediction."""
        return self.answerer.max_length

    @property
    def eot_token_id(self) -> int:
        """What stands before a text that has no context."""
        return self.answerer.end_token_id

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in caches of requests."""
        return str(self.folder.resolve()).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; this tokenizer puts nothing in front of it."""
        return self.answerer.tokenizer.encode(string)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the checkpoint's chat template.

        Raises:
            UsageError: one of several templates was asked for by name.
        """
        if isinstance(chat_template, str):
            raise UsageError("--apply_chat_template", expected="no name: there is one template", found=chat_template)
        return read_template(self.folder) if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the checkpoint's template writes it."""
        if not add_generation_prompt:
            raise UsageError("--apply_chat_template", expected="the model's own turn to begin", found="a begun one")
        return render_chat(read_template(self.folder), chat_history, enable_thinking=self.enable_thinking)

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        **_: Any,
    ) -> list[tuple[float, bool]]:
        # requests with one prompt stand together, so that it is fed once
        order = sorted(range(len(requests)), key=lambda index: (*requests[index][1], *requests[index][2]))
        found: dict[int, tuple[float, bool]] = {}
        for index in order:
            key, context, continuation = requests[index]
            likely = self.answerer.likelihood(context, continuation)
            found[index] = likely.logprob, likely.is_greedy
            self.cache_hook.add_partial("loglikelihood", key, found[index])
        return [found[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text in nats, in windows of max_length tokens."""
        found: list[float] = []
        for request in requests:
            (string,) = request.args
            pairs = rolling_pairs(self.tok_encode(string), self.prefix_token_id, self.max_length)
            total = sum((self.answerer.likelihood(*pair).logprob for pair in pairs), 0.0)
            found.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", (string,), total)
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return an answer to each prompt."""
        found: list[str] = []
        for request in requests:
            context, asked = request.args
            prompt = self.tok_encode(context) or [self.eot_token_id]
            found.append(self.answerer.generate(prompt, _generate_options(asked)))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found


def _device(name: str | None) -> str:
    """Return this runtime's name of a device; the harness says cuda:0 where nobody asked, with or without a GPU."""
    return "auto" if name in (None, "cuda", "cuda:0") else str(name)


def _generate_options(asked: dict[str, Any]) -> GenerateOptions:
    """Turn the harness's arguments into ours.

    Raises:
        UsageError: one that this runtime would ignore.
    """
    given = dict(normalize_gen_kwargs(asked))
    given.pop("do_sample", None)
    until = given.pop("until", [])
    known = {"max_tokens": given.pop("max_gen_toks"), "temperature": given.pop("temperature", 0.0)}
    known |= {name: given.pop(name) for name in ("top_p", "top_k", "seed") if name in given}
    if given:
        raise UsageError(f"generation_kwargs {sorted(given)[0]}", expected="an option of this runtime", found="another")
    return GenerateOptions(until=tuple(until), params=SamplingParams(**known))
