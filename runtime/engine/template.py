"""Chat templates, rendered in a child process: a checkpoint's template is code that is not ours."""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from converters.config import read_json
from converters.errors import InputError, SecurityError
from runtime.engine import template_child

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"
_MAX_TEMPLATE_BYTES = 1 << 20

Message = Mapping[str, Any]


def read_template(folder: Path) -> str:
    """Return the chat template of a checkpoint folder: its own file, or else the field of tokenizer_config.json.

    Raises:
        InputError: there is none, or it is larger than 1 MiB or not UTF-8.
    """
    path = folder / TEMPLATE_FILE
    if path.is_file():
        if path.stat().st_size > _MAX_TEMPLATE_BYTES:
            raise InputError(str(path), expected="at most 1 MiB", found=f"{path.stat().st_size} bytes")
        try:
            return path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InputError(str(path), expected="UTF-8 text", found=str(error)) from error
    config = folder / TOKENIZER_CONFIG_FILE
    template = read_json(config).get("chat_template") if config.is_file() else None
    if not isinstance(template, str):
        raise InputError(str(path), expected="a chat template", found="none", next_step="Run without --chat.")
    return template


def render_chat(
    template: str, messages: Sequence[Message], *, enable_thinking: bool, tools: Sequence[Message] | None = None
) -> str:
    """Return the prompt that asks for the assistant's next turn.

    Args:
        template: Jinja source.
        messages: {"role", "content"} each, in order.
        enable_thinking: let the model think before it answers.
        tools: descriptions of functions that the model may call.
    Raises:
        SecurityError: the template failed, or went over 5 s, 512 MiB of address space or 1 MB of text.
    """
    variables: dict[str, Any] = {
        "messages": list(messages),
        "add_generation_prompt": True,
        "enable_thinking": enable_thinking,
    }
    if tools is not None:
        variables["tools"] = list(tools)
    request = json.dumps({"template": template, "variables": variables}).encode()
    # files rather than pipes: nothing can block, and the child's file size limit bounds its output
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
        stdin.write(request)
        stdin.seek(0)
        status = _run_child(stdin.fileno(), stdout.fileno())
        stdout.seek(0)
        output = stdout.read(template_child.MAX_OUTPUT_BYTES).decode("utf-8", "replace")
    if status == 0:
        return output
    raise _refusal(output if status == template_child.FAILED and output else f"it ended with {_status_name(status)}")


def _run_child(stdin: int, stdout: int) -> int:
    # -I: neither the environment nor the current folder decides what the child imports
    command = [sys.executable, "-I", str(Path(template_child.__file__).resolve())]
    try:
        done = subprocess.run(
            command,
            stdin=stdin,
            stdout=stdout,
            stderr=subprocess.DEVNULL,
            env={},
            cwd="/",
            check=False,
            timeout=template_child.MAX_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise _refusal(f"no end after {template_child.MAX_SECONDS} s") from error
    return done.returncode


def _status_name(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"status {status}"


def _refusal(found: str) -> SecurityError:
    shown = "".join(character if character.isprintable() else " " for character in found[:500])
    return SecurityError(
        "chat template",
        expected="text within 5 s, 512 MiB and 1 MB of output",
        found=shown,
        next_step="Templates run in a sandbox; check the checkpoint's chat_template.jinja.",
    )
