"""`glm4moe generate`: what goes to which stream, exact words of each refusal, one JSON document."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from builders import random_tensors, small_config, write_byte_tokenizer, write_checkpoint

from converters.config import Glm4MoeConfig
from converters.convert import ConvertOptions, plan_convert
from converters.job import run
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.quantize import QuantizeOptions, plan_quantize
from converters.schema import expand
from converters.source import open_source
from runtime.config import EngineConfig
from runtime.engine.completion import complete
from runtime.engine.engine import Engine
from runtime.engine.request import SamplingParams
from runtime.engine.tokenizer import Tokenizer as OurTokenizer
from runtime.engine.tokenizer import read_end_token_ids
from runtime.model.loader import load_model
from tests.cli.conftest import Ended

Program = Callable[..., Ended]
CONFIG = small_config(vocab_size=256, max_position_embeddings=64)
TEMPLATE = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{{ '' if enable_thinking else '/nothink' }}"


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine, threads that wait for each other make these tiny models a hundred times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A random model over bytes, with a chat template."""
    folder = tmp_path / "model"
    write_checkpoint(folder, random_tensors(expand(Glm4MoeConfig.from_hf(CONFIG))), CONFIG)
    write_byte_tokenizer(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def expected(folder: Path, prompt: str, **params: float) -> tuple[str, list[str]]:
    """Return the library's own output and its pieces."""
    how, pieces = EngineConfig(dtype="bfloat16"), list[str]()
    engine = Engine(load_model(folder, how).model, how, read_end_token_ids(folder))
    tokenizer = OurTokenizer.open(folder)
    options = SamplingParams(**params)  # type: ignore[arg-type]
    return complete(engine, tokenizer, tokenizer.encode(prompt), options, on_text=pieces.append).text, pieces


def test_generate_text_goes_to_stdout_and_statistics_to_stderr(program: Program, checkpoint: Path) -> None:
    text, pieces = expected(checkpoint, "def f(", max_tokens=20)
    ended = program("generate", str(checkpoint), "--prompt", "def f(", "--max-tokens", "20")
    assert ended.exit_code == 0
    assert ended.stdout == text.removesuffix("\n") + "\n"
    assert "".join(pieces) == text
    (line,) = [line for line in ended.stderr.splitlines() if "output tokens" in line]
    assert line.startswith("6 prompt tokens at ")
    assert " tokens/s, 20 output tokens at " in line
    assert line.endswith(", ended by length")


def test_generate_quiet_prints_the_text_alone(program: Program, checkpoint: Path) -> None:
    ended = program("generate", str(checkpoint), "--prompt", "x", "--max-tokens", "5", "--quiet")
    assert (ended.exit_code, ended.stderr) == (0, "")
    assert ended.stdout


def test_generate_json_is_one_document(program: Program, checkpoint: Path) -> None:
    text, _ = expected(checkpoint, "abc", max_tokens=9)
    ended = program("generate", str(checkpoint), "--prompt", "abc", "--max-tokens", "9", "--json", "--quiet")
    result = json.loads(ended.stdout)["result"]
    (completion,) = result.pop("completions")
    assert result == {"checkpoint": str(checkpoint), "dtype": "bfloat16", "device": "cpu"}
    assert len(completion.pop("token_ids")) == 9
    seconds = [completion.pop(name) for name in ("prefill_seconds", "decode_seconds", "decode_tokens_per_second")]
    assert min(seconds) > 0
    assert completion == {"prompt": "abc", "text": text, "finish_reason": "length", "num_prompt_tokens": 3}


@pytest.mark.parametrize("backend", ["vanilla", "batched", "cutlass"])
def test_generate_says_the_same_with_every_backend(program: Program, checkpoint: Path, backend: str) -> None:
    options = ("--prompt", "abc", "--max-tokens", "9", "--dtype", "float32", "--moe-backend", backend)
    ended = program("generate", str(checkpoint), *options)
    assert ended.exit_code == 0
    assert "backend" not in ended.stderr
    exact = program("generate", str(checkpoint), *options[:-1], "vanilla")
    assert ended.stdout == exact.stdout


def test_generate_says_which_backend_auto_takes_and_why(program: Program, checkpoint: Path) -> None:
    ended = program("generate", str(checkpoint), "--prompt", "abc", "--max-tokens", "2")
    (line,) = [line for line in ended.stderr.splitlines() if "backend" in line]
    assert line == (
        "Experts run in the backend vanilla: on the CPU it copies no weights (256 rows for "
        "each expert of a prefill chunk)."
    )


def test_generate_refuses_a_backend_without_its_device(program: Program, checkpoint: Path) -> None:
    ended = program("generate", str(checkpoint), "--prompt", "abc", "--moe-backend", "triton", "--device", "cpu")
    assert ended.exit_code == 2
    assert ended.stderr.startswith("Error: moe_backend 'triton': expected a GPU of compute capability 9.0 or later")


def test_generate_says_what_runs_besides_experts_and_why(program: Program, checkpoint: Path) -> None:
    ended = program("generate", str(checkpoint), "--prompt", "abc", "--max-tokens", "2", "--kv-cache-dtype", "fp8")
    notes = [line for line in ended.stderr.splitlines() if "sampling" in line or "cache" in line]
    assert notes == [
        "Norms, attention and sampling run in torch: on the CPU kernels are only interpreted.",
        "The checkpoint has no scale of an FP8 KV cache: keys and values are rounded by a scale of 1.",
    ]
    asked = program("generate", str(checkpoint), "--prompt", "abc", "--max-tokens", "2", "--kernels", "torch")
    assert (asked.exit_code, "sampling" in asked.stderr) == (0, False)


def test_generate_refuses_kernels_without_their_device(program: Program, checkpoint: Path) -> None:
    ended = program("generate", str(checkpoint), "--prompt", "abc", "--kernels", "triton", "--device", "cpu")
    assert ended.exit_code == 2
    assert ended.stderr.startswith("Error: kernels 'triton': expected a GPU of compute capability 9.0 or later")
    assert ended.stderr.rstrip().endswith("Use --kernels torch.")


def test_generate_same_seed_same_text(program: Program, checkpoint: Path) -> None:
    texts = [
        program(
            "generate", str(checkpoint), "--prompt", "x", "--temperature", "2", "--seed", seed, "--max-tokens", "30"
        )
        for seed in ("1", "1", "2")
    ]
    assert texts[0].stdout == texts[1].stdout != texts[2].stdout


def test_generate_runs_each_line_of_a_prompts_file(program: Program, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("first\n\nsecond one\n")
    ended = program("generate", str(checkpoint), "--prompts-file", str(file), "--max-tokens", "3", "--json", "--quiet")
    completions = json.loads(ended.stdout)["result"]["completions"]
    assert [(item["prompt"], item["num_prompt_tokens"]) for item in completions] == [("first", 5), ("second one", 10)]
    plain = program("generate", str(checkpoint), "--prompts-file", str(file), "--max-tokens", "3", "--quiet")
    assert plain.stdout.startswith("==> prompt 1 of 2 <==\n")
    assert "\n==> prompt 2 of 2 <==\n" in plain.stdout


@pytest.mark.parametrize(
    ("options", "prompt"),
    [
        (["--chat"], "[user]hi"),
        (["--chat", "--no-think"], "[user]hi/nothink"),
        (["--chat", "--system", "Brief."], "[system]Brief.[user]hi"),
    ],
)
def test_generate_chat_puts_the_prompt_into_the_template(
    program: Program, checkpoint: Path, options: list[str], prompt: str
) -> None:
    ended = program("generate", str(checkpoint), "--prompt", "hi", "--max-tokens", "4", "--json", "-q", *options)
    (completion,) = json.loads(ended.stdout)["result"]["completions"]
    assert completion["num_prompt_tokens"] == len(prompt)
    assert completion["text"] == expected(checkpoint, prompt, max_tokens=4)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "prompt: expected one of --prompt TEXT and --prompts-file FILE, found neither"),
        (["--prompt", "x", "--no-think"], "--no-think: expected --chat, found none"),
        (["--prompt", "x", "--system", "s"], "--system: expected --chat, found none"),
        (
            ["--prompt", "x", "--top-p", "0.9"],
            "--top-p: expected --temperature above 0, found 0. At 0 the most likely token is always taken.",
        ),
        (
            ["--prompt", "x", "--top-k", "4"],
            "--top-k: expected --temperature above 0, found 0. At 0 the most likely token is always taken.",
        ),
        (["--prompt", ""], "prompt: expected at least one token, found none"),
        (["--prompt", "x" * 64], "prompt: expected fewer than 64 tokens, found 64"),
    ],
)
def test_generate_request_without_sense_is_a_usage_error(
    program: Program, checkpoint: Path, options: list[str], message: str
) -> None:
    ended = program("generate", str(checkpoint), *options)
    assert ended == (2, "", f"Error: {message}\n")


def test_generate_prompts_file_that_is_empty_or_not_text_is_refused(
    program: Program, checkpoint: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(" \n")
    ended = program("generate", str(checkpoint), "--prompts-file", str(file))
    assert ended == (2, "", f"Error: --prompts-file {file}: expected one prompt a line, found none\n")
    file.write_bytes(b"a\xff")
    ended = program("generate", str(checkpoint), "--prompts-file", str(file))
    found = "expected valid UTF-8, found invalid start byte at byte 1"
    assert ended == (2, "", f"Error: --prompts-file {file}: {found}\n")


def test_generate_failing_template_is_refused_for_security(program: Program, checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    ended = program("generate", str(checkpoint), "--prompt", "x", "--chat")
    assert (ended.exit_code, ended.stdout) == (8, "")
    assert "found SecurityError: access to attribute '__class__' of 'str' object is unsafe." in ended.stderr


@pytest.mark.parametrize("layout", [Layout.PACKED, Layout.FUSED_SHARED, Layout.FUSED])
def test_generate_says_the_same_in_every_layout(program: Program, tiny: Path, tmp_path: Path, layout: Layout) -> None:
    split, other = tmp_path / "split", tmp_path / "other"
    with open_source(tiny) as source:
        run(plan_quantize(source, QuantizeOptions(scheme="fp8")), split, RunOptions(workers=1), lambda _: None)
    with open_source(split) as source:
        run(plan_convert(source, ConvertOptions(layout=layout)), other, RunOptions(workers=1), lambda _: None)
    request = ("--prompt", "def is_empty(self):", "--max-tokens", "24", "--quiet")
    expected = program("generate", str(split), *request)
    assert expected.exit_code == 0
    assert program("generate", str(other), *request) == expected


def test_generate_warns_of_a_model_without_correction_bias(program: Program, checkpoint: Path) -> None:
    tensors = random_tensors(expand(Glm4MoeConfig.from_hf(CONFIG)))
    write_checkpoint(checkpoint, {name: tensors[name] for name in tensors if "correction_bias" not in name}, CONFIG)
    ended = program("generate", str(checkpoint), "--prompt", "x", "--max-tokens", "3")
    assert ended.exit_code == 0
    assert "Warning: No router has a correction bias; engines that ask for one need zeros.\n" in ended.stderr
