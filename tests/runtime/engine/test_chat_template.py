"""Templates are rendered as transformers renders them, and cannot hurt."""

import json
from pathlib import Path

import pytest

from converters.errors import InputError, SecurityError
from runtime.engine import template_child
from runtime.engine.template import read_template, render_chat
from runtime.engine.tokenizer import Tokenizer

GLM = (Path(__file__).parents[3] / "fixtures" / "recipe" / "chat_template.jinja").read_text()
CHATS = {
    "one turn": [{"role": "user", "content": "Hi <b> & \u4f60\u597d"}],
    "system": [{"role": "system", "content": "Be brief.\n"}, {"role": "user", "content": "Hi"}],
    "history": [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "<think>easy</think>\n2"},
        {"role": "user", "content": "And 2+2?"},
    ],
    "tool result": [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "K\u00f6ln", "days": 2}}}],
        },
        {"role": "tool", "content": "rain"},
    ],
}


@pytest.mark.parametrize("enable_thinking", [True, False])
@pytest.mark.parametrize("chat", CHATS)
def test_render_chat_equals_transformers(byte_tokenizer_folder, chat, enable_thinking):
    from transformers import PreTrainedTokenizerFast

    hf = PreTrainedTokenizerFast(tokenizer_file=str(byte_tokenizer_folder / "tokenizer.json"))
    expected = hf.apply_chat_template(
        CHATS[chat], chat_template=GLM, tokenize=False, add_generation_prompt=True, enable_thinking=enable_thinking
    )
    assert render_chat(GLM, CHATS[chat], enable_thinking=enable_thinking) == expected


def test_render_chat_without_thinking_ends_with_an_empty_thought():
    ends = [render_chat(GLM, CHATS["one turn"], enable_thinking=on) for on in (True, False)]
    assert ends[0].endswith("<|assistant|>")
    assert ends[1].endswith("/nothink<|assistant|>\n<think></think>")


def test_encode_chat_gives_the_ids_of_the_rendered_text(byte_tokenizer_folder, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes((byte_tokenizer_folder / "tokenizer.json").read_bytes())
    (tmp_path / "chat_template.jinja").write_text(GLM)
    tokenizer = Tokenizer.open(tmp_path)
    rendered = render_chat(GLM, CHATS["system"], enable_thinking=False)
    assert tokenizer.encode_chat(CHATS["system"], enable_thinking=False) == tokenizer.encode(rendered)


HOSTILE = {
    "memory": ("{{ 'a' * 4000000000 }}", "MemoryError"),
    "output": ("{% for _ in range(99999) %}{{ 'abcdefghijk' }}{% endfor %}", "OverflowError: 1099989 bytes of text"),
    "range": ("{{ range(10**9) | list }}", "OverflowError: Range too big"),
    "attributes": ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__' of 'str' object"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('id') }}", "SecurityError: access to attribute '__init__'"),
    "mutation": ("{{ messages.append(1) }}", "SecurityError: access to attribute 'append'"),
    "import": ("{% include '/etc/passwd' %}", "TypeError: no loader for this environment specified"),
    "syntax": ("{% if %}", "TemplateSyntaxError: Expected an expression"),
    "raised": ("{{ raise_exception('roles must alternate') }}", "TemplateError: roles must alternate"),
    "undefined": ("{{ messages[0].tools.items() }}", "UndefinedError: "),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError: "),
    "terminal": ("{{ raise_exception('\x1b[2J') }}", "TemplateError:  [2J"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_render_chat_hostile_or_failing_template_is_a_security_error(name):
    template, found = HOSTILE[name]
    with pytest.raises(SecurityError) as error:
        render_chat(template, CHATS["one turn"], enable_thinking=True)
    message = str(error.value)
    assert message.startswith(f"chat template: expected text within 5 s, 512 MiB and 1 MB of output, found {found}")
    assert message.isprintable()


def test_render_chat_template_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(template_child, "MAX_SECONDS", 0.5)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(SecurityError, match=r"found no end after 0\.5 s"):
        render_chat(loop, CHATS["one turn"], enable_thinking=True)


def test_render_chat_child_sees_no_environment_and_no_project(monkeypatch, tmp_path):
    """A jinja2 planted in the current folder or on PYTHONPATH is not what renders."""
    (tmp_path / "jinja2.py").write_text("raise SystemExit(9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert render_chat("{{ messages[0].content }}", [{"content": "x"}], enable_thinking=True) == "x"


def test_render_chat_child_killed_by_its_limits_is_reported(monkeypatch, tmp_path):
    child = tmp_path / "child.py"
    child.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    monkeypatch.setattr(template_child, "__file__", str(child))
    with pytest.raises(SecurityError, match="found it ended with SIGKILL"):
        render_chat("", [], enable_thinking=True)


def test_read_template_prefers_the_file_and_falls_back_to_the_config(tmp_path):
    with pytest.raises(InputError) as error:
        read_template(tmp_path)
    assert str(error.value) == (
        f"{tmp_path / 'chat_template.jinja'}: expected a chat template, found none. Run without --chat."
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "from config"}))
    assert read_template(tmp_path) == "from config"
    (tmp_path / "chat_template.jinja").write_text("from file")
    assert read_template(tmp_path) == "from file"


def test_read_template_oversized_or_binary_file_is_refused(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"a" * ((1 << 20) + 1))
    with pytest.raises(InputError, match="expected at most 1 MiB, found 1048577 bytes"):
        read_template(tmp_path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="expected UTF-8 text"):
        read_template(tmp_path)
