"""Do both models answer alike? A few chat prompts, answered greedily by each; the first difference must be a near tie.

Two correct computations of one model part ways wherever two tokens are about equally likely, and what follows are
different texts. So only the first token that differs is judged: it must be among the reference's most likely ones, and
close behind the first.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from converters.config import Glm4MoeConfig
from converters.doctor.hardware import memory
from converters.errors import ResourceError, UsageError
from converters.findings import Severity
from converters.shard.whole import open_whole
from runtime.config import EngineConfig
from runtime.engine.engine import Engine, check_prompt, context_limit
from runtime.engine.tokenizer import Tokenizer, read_end_token_ids
from runtime.model.loader import ModelLoader
from runtime.verify.text_answers import Answer, answer_prompt, top_tokens
from runtime.verify.text_prompts import PROMPTS, Prompt, encode_prompt
from runtime.verify.text_results import (
    TextOptions,
    TextProblem,
    TextReport,
    TextResult,
    find_difference,
    judge_answers,
)

TEXT_LEVEL = "--level text"


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
    for folder in (source, candidate):
        check_memory(folder, options)
    ids = _encoded(source, prompts, options), _encoded(candidate, prompts, options)
    ours, top = _reference_answers(source, ids[0], options)
    theirs = _answers(_engine(candidate, options), candidate, ids[1], options)
    results = tuple(
        TextResult(
            prompt.name,
            len(prompt_ids),
            reference,
            other,
            *find_difference(reference.token_ids, other.token_ids, likely),
        )
        for prompt, prompt_ids, reference, other, likely in zip(prompts, ids[0], ours, theirs, top, strict=True)
    )
    problems = [*_end_problems(source, candidate)]
    for result, one, another in zip(results, *ids, strict=True):
        if one != another:
            statement = "the candidate's tokenizer or chat template makes other tokens of it"
            problems.append(TextProblem(Severity.FAIL, result.prompt, statement))
        problems += judge_answers(result, options)
    return TextReport(_protocol(prompts, options), results, tuple(problems))


def _reference_answers(
    folder: Path, ids: Sequence[Sequence[int]], options: TextOptions
) -> tuple[list[Answer], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Return the answers, and the most likely tokens at each place of them."""
    engine = _engine(folder, options)
    answers = _answers(engine, folder, ids, options)
    return answers, [top_tokens(engine, one, answer, options.top) for one, answer in zip(ids, answers, strict=True)]


def _answers(engine: Engine, folder: Path, ids: Sequence[Sequence[int]], options: TextOptions) -> list[Answer]:
    tokenizer = Tokenizer.open(folder)
    return [answer_prompt(engine, tokenizer, one, options.max_tokens) for one in ids]


def _end_problems(source: Path, candidate: Path) -> Iterator[TextProblem]:
    ours, theirs = read_end_token_ids(source), read_end_token_ids(candidate)
    if ours != theirs:
        statement = f"end tokens {sorted(theirs)} where the source has {sorted(ours)}"
        yield TextProblem(Severity.FAIL, "all", statement)


def _protocol(prompts: Sequence[Prompt], options: TextOptions) -> str:
    return (
        f"{len(prompts)} chat prompts, greedy, at most {options.max_tokens} tokens each, {options.dtype}; the first "
        f"token that differs must be among the reference's top {options.top}, at most {options.max_gap:g} nats behind"
    )


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


def _engine(folder: Path, options: TextOptions) -> Engine:
    how = EngineConfig(dtype=options.dtype, device=options.device)
    with open_whole(folder) as source:
        loader = ModelLoader(source, how, with_mtp=False)
        loader.fill(loader.parameter_names)
    return Engine(loader.model, how, read_end_token_ids(folder))
