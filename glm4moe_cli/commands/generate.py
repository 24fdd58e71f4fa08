"""`glm4moe generate`: run a checkpoint on a prompt and see whether it makes sense."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from converters.config import Glm4MoeConfig
from converters.errors import UsageError
from glm4moe_cli._options import PathName, checkpoint_argument, device_option, output_options
from glm4moe_cli._output import Output

if TYPE_CHECKING:
    from runtime.config import EngineConfig
    from runtime.engine.completion import Completion
    from runtime.engine.engine import Engine
    from runtime.engine.request import SamplingParams
    from runtime.engine.tokenizer import Tokenizer

EXAMPLE = """\b
Examples:
  glm4moe generate GLM-4.5-Air-FP8 --prompt "def quicksort(" --max-tokens 64
  glm4moe generate GLM-4.5-Air-FP8 --chat --no-think --prompt "Why is the sky blue?"
"""


@click.command(epilog=EXAMPLE)
@checkpoint_argument
@click.option("--prompt", metavar="TEXT", help="What to continue, or with --chat to answer.")
@click.option(
    "--prompts-file",
    type=PathName(exists=True, dir_okay=False),
    metavar="FILE",
    help="UTF-8 file with one prompt a line.",
)
@click.option("--chat", is_flag=True, help="Put the prompt into the checkpoint's chat template.")
@click.option("--no-think", is_flag=True, help="With --chat: answer without thinking first.")
@click.option("--system", metavar="TEXT", help="With --chat: a system message.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    metavar="N",
    default=256,
    show_default=True,
    help="Tokens of output at most.",
)
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    metavar="T",
    default=0.0,
    show_default=True,
    help="0 always takes the most likely token; 1 draws from the model's own distribution.",
)
@click.option(
    "--top-p",
    type=click.FloatRange(min=0, min_open=True, max=1),
    metavar="P",
    default=1.0,
    show_default=True,
    help="Draw from the most likely tokens that together reach this probability.",
)
@click.option(
    "--top-k",
    type=click.IntRange(min=0),
    metavar="K",
    default=0,
    show_default="all",
    help="Draw from the K most likely tokens.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", default=0, show_default=True, help="Of the draws.")
@click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    show_default=True,
    help="Of compute; auto takes the checkpoint's own, but float32 for float16, whose values end at 65,504: logits "
    "that are not finite are refused. Router, norms and softmax are float32 in any case.",
)
@device_option
@click.option(
    "--moe-backend",
    type=click.Choice(["auto", "vanilla", "batched", "cutlass", "triton"]),
    default="auto",
    show_default=True,
    help="What multiplies the experts; auto takes what suits device and weights, and says why.",
)
@click.option(
    "--kernels",
    type=click.Choice(["auto", "torch", "triton"]),
    default="auto",
    show_default=True,
    help="What norms, turns heads, attends and samples; auto takes what suits device and dtype, and says why.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["auto", "fp8"]),
    default="auto",
    show_default=True,
    help="Of keys and values; auto takes that of compute, fp8 the checkpoint's scales.",
)
@output_options
def command(output: Output, checkpoint: Path, dtype: str, device: str, **options: Any) -> None:
    """Smoke test: run CKPT on a prompt and print what it says, as it says it."""
    from runtime.config import EngineConfig, resolve_device, resolve_dtype
    from runtime.engine.request import SamplingParams
    from runtime.engine.tokenizer import Tokenizer

    _check_options(options)
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    params = SamplingParams(**{name: options[name] for name in names})
    config = Glm4MoeConfig.from_folder(checkpoint)
    choices = {name: options[name] for name in ("moe_backend", "kernels", "kv_cache_dtype")}
    how = EngineConfig(dtype=resolve_dtype(dtype, config.dtype), device=resolve_device(device), **choices)
    tokenizer = Tokenizer.open(checkpoint)
    prompts = _encoded_prompts(tokenizer, config, how, options)
    engine = _load(output, checkpoint, how)
    completions = list(_complete_all(output, prompts, engine=engine, tokenizer=tokenizer, params=params))
    output.result({"checkpoint": str(checkpoint), "dtype": how.dtype, "device": how.device, "completions": completions})


def _check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that contradict each other or would be silently ignored."""
    if (options["prompt"] is None) == (options["prompts_file"] is None):
        found = "neither" if options["prompt"] is None else "both"
        raise UsageError("prompt", expected="one of --prompt TEXT and --prompts-file FILE", found=found)
    for name, value in (("--no-think", options["no_think"]), ("--system", options["system"])):
        if value and not options["chat"]:
            raise UsageError(name, expected="--chat", found="none")
    for name, idle in (("top_p", 1.0), ("top_k", 0)):
        if options["temperature"] == 0 and options[name] != idle:
            raise UsageError(
                f"--{name.replace('_', '-')}",
                expected="--temperature above 0",
                found="0",
                next_step="At 0 the most likely token is always taken.",
            )


def _prompts(options: Mapping[str, Any]) -> Sequence[str]:
    if options["prompts_file"] is None:
        return [options["prompt"]]
    path = options["prompts_file"]
    try:
        lines = path.read_bytes().decode().splitlines()
    except UnicodeDecodeError as error:
        found = f"{error.reason} at byte {error.start}"
        raise UsageError(f"--prompts-file {path}", expected="valid UTF-8", found=found) from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"--prompts-file {path}", expected="one prompt a line", found="none")
    return prompts


def _encoded_prompts(
    tokenizer: "Tokenizer", config: Glm4MoeConfig, how: "EngineConfig", options: Mapping[str, Any]
) -> list[tuple[str, list[int]]]:
    """Return each prompt with its ids; what is wrong with one shows before the model is loaded."""
    from runtime.engine.engine import check_prompt

    encoded = [(prompt, _encode(tokenizer, prompt, options)) for prompt in _prompts(options)]
    for _, prompt_ids in encoded:
        check_prompt(prompt_ids, config, how)
    return encoded


def _encode(tokenizer: "Tokenizer", prompt: str, options: Mapping[str, Any]) -> list[int]:
    if not options["chat"]:
        return tokenizer.encode(prompt)
    system = [] if options["system"] is None else [{"role": "system", "content": options["system"]}]
    messages = [*system, {"role": "user", "content": prompt}]
    return tokenizer.encode_chat(messages, enable_thinking=not options["no_think"])


def _load(output: Output, checkpoint: Path, how: "EngineConfig") -> "Engine":
    from converters.source import open_source
    from runtime.engine.engine import Engine
    from runtime.engine.tokenizer import read_end_token_ids
    from runtime.model.loader import ModelLoader

    end_token_ids = read_end_token_ids(checkpoint)
    with open_source(checkpoint) as source:
        loader = ModelLoader(source, how, with_mtp=False)
        for note in loader.notes:
            output.warning(note)
        for choice in loader.choices:
            output.note(choice)
        with output.progress("load", loader.total_bytes) as progress:
            loader.fill(loader.parameter_names, progress.advance)
    return Engine(loader.model, how, end_token_ids)


def _complete_all(
    output: Output,
    prompts: Sequence[tuple[str, list[int]]],
    *,
    engine: "Engine",
    tokenizer: "Tokenizer",
    params: "SamplingParams",
) -> Iterator[dict[str, Any]]:
    """Run the prompts one after the other; stream each text, and yield it with its numbers."""
    from runtime.engine.completion import complete

    for index, (prompt, prompt_ids) in enumerate(prompts, 1):
        if len(prompts) > 1:
            output.line(f"==> prompt {index} of {len(prompts)} <==")
        completion = complete(engine, tokenizer, prompt_ids, params, on_text=output.stream)
        if not completion.text.endswith("\n"):
            output.stream("\n")
        output.note(_statistics(completion))
        yield _as_result(prompt, completion)


def _statistics(completion: "Completion") -> str:
    rate = completion.decode_tokens_per_second
    decode = "" if rate is None else f" at {rate:.1f} tokens/s"
    return (
        f"{completion.num_prompt_tokens} prompt tokens at {completion.prefill_tokens_per_second:.1f} tokens/s, "
        f"{len(completion.token_ids)} output tokens{decode}, ended by {completion.finish_reason}"
    )


def _as_result(prompt: str, completion: "Completion") -> dict[str, Any]:
    return {
        "prompt": prompt,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "num_prompt_tokens": completion.num_prompt_tokens,
        "token_ids": completion.token_ids,
        "prefill_seconds": completion.prefill_seconds,
        "decode_seconds": completion.decode_seconds,
        "decode_tokens_per_second": completion.decode_tokens_per_second,
    }
