"""Asks an OpenAI-compatible server for the log-probabilities of prompts, given as token ids."""

import http.client
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from converters.errors import InputError, NetworkError, UsageError
from runtime.verify.engine_answers import ENGINE_OPTION

# vLLM's default of --max-logprobs
DEFAULT_TOP = 20
DEFAULT_TIMEOUT_S = 300.0
_MAX_ANSWER_BYTES = 256 << 20
_MODELS, _COMPLETIONS = "/models", "/completions"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """How to ask.

    Args:
        model: its name at the server; None: the only one that it serves.
        top: most likely tokens to ask for at each place; servers refuse more than they allow.
        timeout_s: seconds without an answer.
        api_key: sent as a bearer token, where the server wants one.
    """

    model: str | None = None
    top: int = DEFAULT_TOP
    timeout_s: float = DEFAULT_TIMEOUT_S
    api_key: str | None = None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Another host must not get the tokens, let alone the key."""

    def redirect_request(self, *_: Any) -> None:
        """Refuse; the caller sees the status."""


_OPENER = urllib.request.build_opener(_NoRedirects)


def is_url(value: str) -> bool:
    """Return whether this is meant as the address of a server."""
    return "://" in value


class EngineServer:
    """A server at a URL: `http://host:port`, or that with the path its API has, such as `/v1`.

    Raises:
        UsageError: another kind of URL.
    """

    def __init__(self, url: str, options: ServerOptions) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"{ENGINE_OPTION} {url}", expected="http://HOST:PORT/v1 or https://HOST/v1", found=url)
        path = parts.path.rstrip("/").removesuffix(_COMPLETIONS) or "/v1"
        self.base = urllib.parse.urlunsplit((parts.scheme, parts.netloc, path, "", ""))
        self.options = options

    def model(self) -> str:
        """Return the name of the model to ask.

        Raises:
            NetworkError: the server cannot be reached. UsageError: it serves several.
        """
        if self.options.model is not None:
            return self.options.model
        listed = self._ask(_MODELS).get("data")
        names = [str(entry.get("id")) for entry in listed or [] if isinstance(entry, dict)]
        if len(names) != 1:
            raise UsageError(
                f"{ENGINE_OPTION} {self.base}",
                expected="a server with one model",
                found=", ".join(names[:5]) or "none",
                next_step="Save its answers to a file, and give that.",
            )
        return names[0]

    def answers(self, prompts: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
        """Yield the answer to each prompt, one request at a time.

        A server that leaves out `prompt_logprobs` is asked the other way, with `echo`, from then on.

        Raises:
            NetworkError: no answer. InputError: an answer without the prompt's log-probabilities.
        """
        model, ways = self.model(), [self._with_prompt_logprobs, self._with_echo]
        for prompt in prompts:
            answer = self._ask(_COMPLETIONS, ways[0](model, prompt))
            if len(ways) > 1 and not _tells_prompt(answer):
                ways.pop(0)
                answer = self._ask(_COMPLETIONS, ways[0](model, prompt))
            yield answer

    def _with_prompt_logprobs(self, model: str, prompt: Sequence[int]) -> dict[str, Any]:
        asked = {"prompt_logprobs": self.options.top, "return_token_ids": True}
        return {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, **asked}

    def _with_echo(self, model: str, prompt: Sequence[int]) -> dict[str, Any]:
        asked = {"echo": True, "logprobs": self.options.top, "return_tokens_as_token_ids": True}
        return {"model": model, "prompt": list(prompt), "max_tokens": 1, "temperature": 0.0, **asked}

    def _ask(self, path: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
        headers = {"Accept": "application/json", "Content-Type": "application/json"}
        if self.options.api_key is not None:
            headers["Authorization"] = f"Bearer {self.options.api_key}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data=data, headers=headers)
        try:
            with _OPENER.open(request, timeout=self.options.timeout_s) as response:
                raw = response.read(_MAX_ANSWER_BYTES + 1)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(path, error.code, error.read(2000)) from error
        except TimeoutError as error:
            raise self._unreachable(f"no answer within {self.options.timeout_s:g} s") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error
            raise self._unreachable(str(reason) or type(error).__name__) from error
        return self._parsed(path, raw)

    def _parsed(self, path: str, raw: bytes) -> dict[str, Any]:
        try:
            value = json.loads(raw) if len(raw) <= _MAX_ANSWER_BYTES else None
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise InputError(
                f"{ENGINE_OPTION} {self.base}{path}",
                expected=f"a JSON object of at most {_MAX_ANSWER_BYTES >> 20} MiB",
                found=repr(raw[:60]),
                next_step="This is not the API of an OpenAI-compatible server.",
            )
        return value

    def _unreachable(self, found: str) -> NetworkError:
        return NetworkError(
            f"{ENGINE_OPTION} {self.base}",
            expected="a server that answers",
            found=found,
            next_step="Check the address, and that the server has finished loading.",
        )

    def _refused(self, path: str, status: int, raw: bytes) -> InputError | NetworkError:
        shown = "".join(char if char.isprintable() else " " for char in raw.decode("utf-8", "replace"))[:300]
        subject, found = f"{ENGINE_OPTION} {self.base}{path}", f"HTTP status {status}: {shown}"
        if status in (401, 403):
            return NetworkError(subject, expected="access", found=found, next_step="The server wants a key.")
        if status >= 500:
            return NetworkError(subject, expected="an answer", found=found, next_step="See the server's own log.")
        return InputError(
            subject,
            expected="an answer",
            found=found,
            next_step="The server may serve another model, a shorter context or fewer log-probabilities.",
        )


def _tells_prompt(answer: Mapping[str, Any]) -> bool:
    found = answer.get("choices")
    return isinstance(found, list) and any(isinstance(item, dict) and item.get("prompt_logprobs") for item in found)
