"""What OpenAI-compatible servers say about a prompt's tokens, from their answers as JSON.

Two forms are read. `prompt_logprobs` (vLLM): for each token of the prompt a mapping from token ids to log-probability
and rank. `logprobs` of `echo` (OpenAI's completions): lists of tokens, their log-probabilities and the most likely
ones, where tokens are named `token_id:N` (vLLM's `return_tokens_as_token_ids`) or by their text. Texts are ambiguous,
so of an answer that names tokens by text only the log-probabilities of the prompt's own tokens are used.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.errors import InputError

ENGINE_OPTION = "--engine-logprobs"
_ID_PREFIX = "token_id:"
_MAX_LINE_BYTES = 256 << 20
_MAX_LOGPROB = 0.01


@dataclass(frozen=True, slots=True)
class PromptScores:
    """What a server says of one prompt of T tokens.

    Attributes:
        logprobs: of each token after the ones before it, nats; the first is None.
        top: the most likely tokens at each place, id to log-probability, the token itself included; None where the
            answer does not say.
    """

    logprobs: tuple[float | None, ...]
    top: tuple[Mapping[int, float] | None, ...]


def read_answers(path: Path) -> Iterator[dict[str, Any]]:
    """Yield saved answers, one a line.

    Raises:
        InputError: a line is no JSON object.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            subject = f"{ENGINE_OPTION} {path}, line {number}"
            try:
                value = json.loads(line[:_MAX_LINE_BYTES])
            except (ValueError, RecursionError) as error:
                raise InputError(subject, expected="a server's answer as one line of JSON", found=str(error)) from error
            if not isinstance(value, dict):
                raise InputError(subject, expected="a server's answer as a JSON object", found=type(value).__name__)
            yield value


def choices(answer: Mapping[str, Any], subject: str) -> list[Mapping[str, Any]]:
    """Return the choices of an answer, in the order of the prompts.

    Raises:
        InputError: it is an error, or none at all.
    """
    if "error" in answer:
        error = answer["error"]
        raise InputError(
            subject, expected="an answer", found=str(error.get("message", error) if error else error)[:300]
        )
    found = answer.get("choices")
    if not isinstance(found, list) or not found or not all(isinstance(choice, dict) for choice in found):
        raise InputError(subject, expected="choices, as OpenAI's completions API returns them", found=str(found)[:80])
    return sorted(found, key=lambda choice: choice.get("index", 0))


def prompt_scores(choice: Mapping[str, Any], token_ids: Sequence[int], vocab_size: int, subject: str) -> PromptScores:
    """Return what a choice says of the prompt that was asked about.

    Args:
        choice: of an answer; tokens that were generated after the prompt are left out.
        token_ids: the prompt.
        vocab_size: of the model that the answer is compared with.
        subject: names the answer in errors.
    Raises:
        InputError: it says nothing of the prompt, or speaks of other tokens.
    """
    told = choice.get("prompt_token_ids")
    if told is not None and list(told) != list(token_ids):
        raise InputError(
            subject,
            expected=f"the {len(token_ids)} tokens of this window",
            found=f"{len(told)} others",
            next_step="It answers another prompt; answers stand in the order of the windows.",
        )
    # of a completion both forms have several choices' prompts or one; older servers put the list beside the choices
    if choice.get("prompt_logprobs"):
        scores = _of_prompt_logprobs(choice["prompt_logprobs"], token_ids, subject)
    elif isinstance(choice.get("logprobs"), dict):
        scores = _of_echo(choice["logprobs"], token_ids, subject)
    else:
        raise InputError(
            subject,
            expected="log-probabilities of the prompt: prompt_logprobs, or logprobs with echo",
            found="none",
            next_step="Ask a server that returns them, such as vLLM.",
        )
    outside = next((token for found in scores.top for token in found or () if not 0 <= token < vocab_size), None)
    if outside is not None:
        raise InputError(
            subject,
            expected=f"token ids below vocab_size {vocab_size}",
            found=str(outside),
            next_step="The server runs a model with another vocabulary.",
        )
    return scores


def _of_prompt_logprobs(value: Any, token_ids: Sequence[int], subject: str) -> PromptScores:
    _check_length(value, token_ids, subject)
    logprobs: list[float | None] = [None]
    top: list[Mapping[int, float] | None] = [None]
    for place, (entry, token) in enumerate(zip(value[1:], token_ids[1:], strict=True), 1):
        try:
            found = {int(name): _number(facts["logprob"]) for name, facts in entry.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise _malformed(subject, f"prompt_logprobs[{place}]", entry) from error
        if token not in found:
            raise InputError(
                subject,
                expected=f"the log-probability of token {token} at place {place}",
                found=f"those of {', '.join(map(str, list(found)[:5]))}",
                next_step="It answers another prompt; answers stand in the order of the windows.",
            )
        logprobs.append(found[token])
        top.append(found)
    return PromptScores(tuple(logprobs), tuple(top))


def _of_echo(value: Mapping[str, Any], token_ids: Sequence[int], subject: str) -> PromptScores:
    tokens, numbers, tops = value.get("tokens"), value.get("token_logprobs"), value.get("top_logprobs")
    if not isinstance(tokens, list) or not isinstance(numbers, list) or len(tokens) != len(numbers):
        raise _malformed(subject, "logprobs", value)
    if len(tokens) < len(token_ids):
        raise InputError(
            subject,
            expected=f"at least the {len(token_ids)} tokens of the prompt",
            found=str(len(tokens)),
            next_step="The prompt is only told with echo.",
        )
    if all(str(token).startswith(_ID_PREFIX) for token in tokens):
        told = [_token_id(token, subject) for token in tokens[: len(token_ids)]]
        if told != list(token_ids):
            place = next(index for index, token in enumerate(told) if token != token_ids[index])
            raise InputError(subject, expected=f"token {token_ids[place]} at place {place}", found=str(told[place]))
    else:
        tops = None
    logprobs: list[float | None] = [None]
    top: list[Mapping[int, float] | None] = [None]
    for place in range(1, len(token_ids)):
        try:
            number = _number(numbers[place])
            found = tops[place] if isinstance(tops, list) else None
            known = found and {_token_id(name, subject): _number(value) for name, value in found.items()}
        except (AttributeError, IndexError, TypeError, ValueError) as error:
            raise _malformed(subject, f"logprobs at place {place}", numbers[place]) from error
        logprobs.append(number)
        top.append({**known, token_ids[place]: number} if known else None)
    return PromptScores(tuple(logprobs), tuple(top))


def _check_length(value: Any, token_ids: Sequence[int], subject: str) -> None:
    if not isinstance(value, list) or len(value) != len(token_ids):
        raise InputError(
            subject,
            expected=f"log-probabilities of {len(token_ids)} tokens",
            found=str(len(value)) if isinstance(value, list) else type(value).__name__,
            next_step="It answers another prompt, or the server cut it.",
        )


def _token_id(name: str, subject: str) -> int:
    digits = name.removeprefix(_ID_PREFIX)
    if not digits.isascii() or not digits.isdigit():
        raise _malformed(subject, "a token", name)
    return int(digits)


def _number(value: Any) -> float:
    """Return a log-probability; a server that computes in bf16 may exceed 0 by a little."""
    number = float(value)
    if math.isnan(number) or number > _MAX_LOGPROB:
        raise ValueError(f"no log-probability: {value!r}")
    return number


def _malformed(subject: str, part: str, found: Any) -> InputError:
    return InputError(f"{subject}: {part}", expected="as OpenAI-compatible servers write it", found=repr(found)[:80])
