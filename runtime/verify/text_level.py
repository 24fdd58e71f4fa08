"""Do both models answer alike? A few chat prompts, answered greedily by each; the first difference must be a near tie.

Two correct computations of one model part ways wherever two tokens are about equally likely, and what follows are
different texts. So only the first token that differs is judged: it must be among the reference's most likely ones, and
close behind the first.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from converters.config import Glm4MoeConfig
from converters.doctor.hardware import memory
from converters.errors import ResourceError, UsageError
from converters.findings import Severity
from converters.shard.whole import open_whole
from runtime.config import EngineConfig
from runtime.engine.completion import complete
from runtime.engine.engine import Engine, check_prompt, context_limit
from runtime.engine.request import FinishReason, SamplingParams
from runtime.engine.tokenizer import Tokenizer, read_end_token_ids
from runtime.model.loader import ModelLoader

TEXT_LEVEL = "--level text"
# a text that ends with this many copies of one stretch, the last one maybe cut short, is a loop
_LOOP_COPIES = 4
_LOOP_TOKENS = 24
_TOOL_CALL = re.compile(
    r"<tool_call>\s*([\w.-]+)\s*((?:<arg_key>[^<]*</arg_key>\s*<arg_value>.*?</arg_value>\s*)*)</tool_call>", re.DOTALL
)
_TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Return the weather of a city at this moment.",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "kelvin"]}},
                "required": ["city"],
            },
        },
    },
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A chat prompt: its name in reports, what the user says, and how the template is filled."""

    name: str
    request: str
    enable_thinking: bool = True
    tools: tuple[Mapping[str, Any], ...] | None = None


PROMPTS = (
    Prompt("thinking", "How many minutes are there in a day?"),
    Prompt("no thinking", "Write one sentence about the sea.", enable_thinking=False),
    Prompt("code", "Write the body of this function.\ndef is_empty(self):", enable_thinking=False),
    Prompt("tool call", "What is the weather in Lisbon?", enable_thinking=False, tools=_TOOLS),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """How to answer and how to judge.

    Args:
        max_tokens: of an answer.
        dtype: of compute.
        device: where.
        top: the first token that differs must be among the reference's so many most likely ones.
        max_gap: and at most so many nats less likely than the first of them.
    """

    max_tokens: int = 64
    dtype: str = "float32"
    device: str = "cpu"
    top: int = 20
    max_gap: float = 0.5


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model says: its tokens with the end token, the text, why it ended, and whether it runs in circles."""

    token_ids: tuple[int, ...]
    text: str
    finish_reason: str
    is_loop: bool
    tool_calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TextProblem:
    """What is wrong with an answer, in words; `severity` as of other findings."""

    severity: Severity
    prompt: str
    statement: str


@dataclass(frozen=True, slots=True)
class TextResult:
    """One prompt on both sides.

    Attributes:
        prompt: its name.
        num_prompt_tokens: of the reference.
        reference, candidate: the answers.
        first_difference: index of the first token that differs, None where none does.
        gap: how much less likely than its own choice the reference finds the candidate's token there, nats; None where
            nothing differs or the token is not among its most likely ones.
    """

    prompt: str
    num_prompt_tokens: int
    reference: Answer
    candidate: Answer
    first_difference: int | None
    gap: float | None


@dataclass(frozen=True, slots=True)
class TextReport:
    """All prompts on both sides, how they were run, and what is wrong with the candidate's answers."""

    protocol: str
    results: tuple[TextResult, ...]
    problems: tuple[TextProblem, ...]


def check_text(
    source: Path, candidate: Path, options: TextOptions | None = None, prompts: Sequence[Prompt] = PROMPTS
) -> TextReport:
    """Let both models answer, one model after the other, so that only one is in memory.

    Raises:
        ResourceError: a model does not fit; found before anything is loaded.
        InputError: a checkpoint without tokenizer or chat template, or logits that are not finite.
        UsageError: a prompt longer than the model's context.
    """
    options = options or TextOptions()
    folders = source, candidate
    for folder in folders:
        check_memory(folder, options)
    ids = [_encoded(folder, prompts, options) for folder in folders]
    answers: list[list[Answer]] = []
    top: list[tuple[torch.Tensor, torch.Tensor]] = []
    for folder, prompt_ids in zip(folders, ids, strict=True):
        engine, tokenizer = _engine(folder, options), Tokenizer.open(folder)
        answers.append([_answer(engine, tokenizer, one, options.max_tokens) for one in prompt_ids])
        if not top:
            pairs = zip(prompt_ids, answers[0], strict=True)
            top = [_top_tokens(engine, one, answer, options.top) for one, answer in pairs]
        del engine
    ends = [read_end_token_ids(folder) for folder in folders]
    results, problems = list[TextResult](), list[TextProblem]()
    if ends[0] != ends[1]:
        statement = f"end tokens {sorted(ends[1])} where the source has {sorted(ends[0])}"
        problems.append(TextProblem(Severity.FAIL, "all", statement))
    for index, prompt in enumerate(prompts):
        reference, other = answers[0][index], answers[1][index]
        if ids[0][index] != ids[1][index]:
            statement = "the candidate's tokenizer or chat template makes other tokens of it"
            problems.append(TextProblem(Severity.FAIL, prompt.name, statement))
        place, gap = find_difference(reference.token_ids, other.token_ids, top[index])
        result = TextResult(prompt.name, len(ids[0][index]), reference, other, place, gap)
        results.append(result)
        problems += judge_answers(result, options)
    protocol = (
        f"{len(prompts)} chat prompts, greedy, at most {options.max_tokens} tokens each, {options.dtype}; the first "
        f"token that differs must be among the reference's top {options.top}, at most {options.max_gap:g} nats behind"
    )
    return TextReport(protocol, tuple(results), tuple(problems))


def check_memory(folder: Path, options: TextOptions) -> int:
    """Return the bytes that a model takes in memory, at most; only headers are read.

    Raises:
        ResourceError: more than are free.
    """
    engine = EngineConfig(dtype=options.dtype, device=options.device)
    with open_whole(folder) as source:
        loader = ModelLoader(source, engine, with_mtp=False)
        needed = sum(part.numel() for part in loader.model.parameters()) * engine.torch_dtype.itemsize
    free = torch.cuda.mem_get_info()[0] if options.device == "cuda" else memory().available_bytes
    if needed > free:
        raise ResourceError(
            f"{TEXT_LEVEL}: {folder}",
            expected=f"{needed / 2**30:.1f} GiB of free memory for the whole model in {options.dtype}",
            found=f"{free / 2**30:.1f} GiB",
            next_step="Generating text reads every layer for every token; leave this level to a machine that holds the "
            "model, or compare with a server's answers by --engine-logprobs.",
        )
    return needed


def find_difference(
    reference: Sequence[int], candidate: Sequence[int], top: tuple[torch.Tensor, torch.Tensor]
) -> tuple[int | None, float | None]:
    """Return where two answers part, and by how much the reference prefers its own token there.

    Args:
        reference, candidate: token ids.
        top: the reference's most likely tokens at each place of its answer: ids (T, N) and log-probabilities (T, N).
    """
    if tuple(reference) == tuple(candidate):
        return None, None
    pairs = zip(reference, candidate, strict=False)
    place = next((index for index, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if place is None:
        # one answer is the beginning of the other: both chose alike until the shorter one's limit
        return min(len(reference), len(candidate)), None
    ids_N, logprobs_N = top[0][place], top[1][place]
    found = (ids_N == candidate[place]).nonzero()
    return place, (logprobs_N[0] - logprobs_N[int(found[0])]).item() if len(found) else None


def judge_answers(result: TextResult, options: TextOptions) -> Iterator[TextProblem]:
    """Yield what is wrong with the candidate's answer.

    Only a first difference that is no near tie fails: behind one, both texts may be right. What damaged models tend to
    do there is a warning.
    """
    reference, candidate = result.reference, result.candidate
    place = result.first_difference
    if place is None:
        return
    if place < min(len(reference.token_ids), len(candidate.token_ids)):
        near = f"a near tie is at most {options.max_gap:g}"
        if result.gap is None:
            statement = f"token {place} of the answer is not among the source's top {options.top}"
            yield TextProblem(Severity.FAIL, result.prompt, statement)
        elif not result.gap <= options.max_gap:
            statement = f"token {place} of the answer is {result.gap:.3g} nats behind the source's own; {near}"
            yield TextProblem(Severity.FAIL, result.prompt, statement)
    stopped = reference.finish_reason == FinishReason.STOP
    if candidate.is_loop and not reference.is_loop:
        yield TextProblem(Severity.WARN, result.prompt, "the answer repeats itself, the source's does not")
    elif stopped and candidate.finish_reason != FinishReason.STOP:
        yield TextProblem(Severity.WARN, result.prompt, "the answer has no end token, the source's has one")
    if reference.tool_calls and not candidate.tool_calls:
        yield TextProblem(Severity.WARN, result.prompt, f"no well-formed call of {reference.tool_calls[0]}")


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


def _encoded(folder: Path, prompts: Sequence[Prompt], options: TextOptions) -> list[list[int]]:
    """Return the ids of the prompts; those that leave no room for an answer are refused."""
    tokenizer, config = Tokenizer.open(folder), Glm4MoeConfig.from_folder(folder)
    how = EngineConfig(dtype=options.dtype, device=options.device)
    found = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    for ids in found:
        check_prompt(ids, config, how)
    longest, limit = max(map(len, found)) + options.max_tokens, context_limit(config, how)
    if longest > limit:
        raise UsageError(TEXT_LEVEL, expected=f"a context of {longest} tokens", found=f"{limit}")
    return found


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt in the checkpoint's chat template."""
    messages = [{"role": "user", "content": prompt.request}]
    return tokenizer.encode_chat(messages, enable_thinking=prompt.enable_thinking, tools=prompt.tools)


def _engine(folder: Path, options: TextOptions) -> Engine:
    how = EngineConfig(dtype=options.dtype, device=options.device)
    with open_whole(folder) as source:
        loader = ModelLoader(source, how, with_mtp=False)
        loader.fill(loader.parameter_names)
    return Engine(loader.model, how, read_end_token_ids(folder))


def _answer(engine: Engine, tokenizer: Tokenizer, prompt_ids: Sequence[int], max_tokens: int) -> Answer:
    done = complete(engine, tokenizer, prompt_ids, SamplingParams(max_tokens=max_tokens), on_text=lambda _: None)
    return Answer(done.token_ids, done.text, done.finish_reason, is_loop(done.token_ids), tool_calls(done.text))


@torch.inference_mode()
def _top_tokens(
    engine: Engine, prompt_ids: Sequence[int], answer: Answer, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (T, N) and log-probabilities (T, N) at each place of an answer, most likely first."""
    model = engine.model
    device = model.model.embed_tokens.weight.device
    ids_1T = torch.tensor([[*prompt_ids, *answer.token_ids[:-1]]], device=device)
    logits_TV = model.logits(model(ids_1T)[0, len(prompt_ids) - 1 :])
    top = logits_TV.log_softmax(-1).topk(min(count, logits_TV.shape[1]))
    return top.indices.cpu(), top.values.cpu()
