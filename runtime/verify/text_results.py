"""Two answers side by side: where they part, and whether that is a near tie."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from converters.findings import Severity
from runtime.engine.request import FinishReason
from runtime.verify.text_answers import Answer


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
