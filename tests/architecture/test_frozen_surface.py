"""Arguments and options of every command as a literal: changing what users type is a decision, not an accident."""

import pprint

import click

from tests.architecture.commands import live_commands

# command -> its parameters as users spell them: `SRC`, `-q/--quiet`, `--device auto|cpu|cuda`
SURFACE: dict[str, list[str]] = {
    "download": [
        "REPO",
        "DST",
        "--revision",
        "--include ...",
        "--exclude ...",
        "--verify-only",
        "--dry-run",
        "--workers",
        "--json",
        "-q/--quiet",
    ],
    "inspect": ["CKPT", "--tensors", "--missing", "--hash", "--check", "--json", "-q/--quiet"],
    "convert": [
        "SRC",
        "DST",
        "--layout split|packed|fused-shared|fused",
        "--dtype bfloat16|float16|float32",
        "--dequantize",
        "--mtp keep|drop|separate",
        "--max-shard-size",
        "--disk-budget",
        "--dry-run",
        "--restart",
        "--update",
        "--part",
        "--finalize",
        "--workers",
        "--max-memory",
        "--json",
        "-q/--quiet",
    ],
    "quantize": [
        "SRC",
        "DST",
        "--scheme fp8",
        "--arithmetic float32|compressed-tensors",
        "--max-shard-size",
        "--disk-budget",
        "--dry-run",
        "--restart",
        "--update",
        "--part",
        "--finalize",
        "--workers",
        "--max-memory",
        "--json",
        "-q/--quiet",
    ],
    "verify": [
        "CKPT",
        "--against",
        "--level structure|logits|all",
        "--text",
        "--num-tokens",
        "--context-length",
        "--stride",
        "--seed",
        "--max-kl",
        "--min-top1",
        "--max-ppl-ratio",
        "--strict",
        "--device auto|cpu|cuda",
        "--json",
        "-q/--quiet",
    ],
    "generate": [
        "CKPT",
        "--prompt",
        "--prompts-file",
        "--chat",
        "--no-think",
        "--system",
        "--max-tokens",
        "--temperature",
        "--top-p",
        "--top-k",
        "--seed",
        "--dtype auto|float32|bfloat16",
        "--device auto|cpu|cuda",
        "--json",
        "-q/--quiet",
    ],
    "doctor": ["--json", "-q/--quiet"],
}


def spelling(param: click.Parameter) -> str:
    if isinstance(param, click.Argument):
        return str(param.metavar or param.name)
    names = "/".join([*param.opts, *param.secondary_opts])
    choices = f" {'|'.join(map(str, param.type.choices))}" if isinstance(param.type, click.Choice) else ""
    return names + choices + (" ..." if param.multiple else "")


def test_surface_is_the_frozen_one() -> None:
    live = {name: [spelling(param) for param in command.params] for name, command in live_commands().items()}
    assert live == SURFACE, f"if the change is meant, freeze it:\n{pprint.pformat(live, width=118, sort_dicts=False)}"


def test_spelling_shows_what_a_user_types() -> None:
    params = [
        click.Argument(["src"], metavar="SRC"),
        click.Option(["-q", "--quiet"], is_flag=True),
        click.Option(["--device"], type=click.Choice(["auto", "cpu"])),
        click.Option(["--ignore"], multiple=True),
    ]
    assert [spelling(param) for param in params] == ["SRC", "-q/--quiet", "--device auto|cpu", "--ignore ..."]
