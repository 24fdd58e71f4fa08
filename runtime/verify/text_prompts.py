"""The chat prompts that both models answer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.engine.tokenizer import Tokenizer

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


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt in the checkpoint's chat template."""
    messages = [{"role": "user", "content": prompt.request}]
    return tokenizer.encode_chat(messages, enable_thinking=prompt.enable_thinking, tools=prompt.tools)
