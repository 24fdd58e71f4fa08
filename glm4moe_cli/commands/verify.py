"""`glm4moe verify`: compare a checkpoint with the one it was made from."""

from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from converters.compare import compare_structure
from converters.errors import UsageError
from glm4moe_cli._options import checkpoint_argument, device_option, output_options
from glm4moe_cli._output import Output
from glm4moe_cli.commands._verification import compare_on_text, raise_failure, show
from runtime.verify.report import Verdict, build_report
from runtime.verify.windows import DEFAULT_CONTEXT_LENGTH

EXAMPLE = """\b
Example:
  glm4moe verify GLM-4.5-Air-FP8 --against GLM-4.5-Air --text sample.txt
"""
LEVELS = ("structure", "logits", "all")
# options of the logits level, by parameter name
_LOGITS_ONLY = (
    "text",
    "num_tokens",
    "context_length",
    "stride",
    "seed",
    "max_kl",
    "min_top1",
    "max_ppl_ratio",
    "device",
)
_share = click.FloatRange(0.0, 1.0)
_positive = click.FloatRange(0.0, min_open=True)


@click.command(epilog=EXAMPLE)
@checkpoint_argument
@click.option(
    "--against",
    "source",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    required=True,
    metavar="SRC",
    help="The checkpoint that CKPT was made from.",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    show_default="all with --text, else structure",
    help="structure: names, shapes, dtypes, config and files, from headers alone. logits: both models run.",
)
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="UTF-8 text to run both models on.",
)
@click.option(
    "--num-tokens",
    type=click.IntRange(min=2),
    metavar="N",
    show_default="all",
    help="Use this many tokens of the text.",
)
@click.option(
    "--context-length",
    type=click.IntRange(min=2),
    metavar="N",
    default=DEFAULT_CONTEXT_LENGTH,
    show_default=True,
    help="Tokens of one window.",
)
@click.option(
    "--stride",
    type=click.IntRange(min=1),
    metavar="N",
    show_default="context length",
    help="Tokens from one window to the next.",
)
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 32) - 1),
    metavar="N",
    default=0,
    show_default=True,
    help="Of the bootstrap's draws.",
)
@click.option(
    "--max-kl",
    type=click.FloatRange(0.0),
    metavar="NATS",
    show_default="by kind of conversion",
    help="Fail above this mean KL per token.",
)
@click.option(
    "--min-top1",
    type=_share,
    metavar="SHARE",
    show_default="by kind of conversion",
    help="Fail below this share of tokens with the same most likely next token.",
)
@click.option(
    "--max-ppl-ratio",
    type=_positive,
    metavar="RATIO",
    show_default="by kind of conversion",
    help="Fail above this perplexity, relative to the source's.",
)
@click.option("--strict", is_flag=True, help="Let warnings fail too.")
@device_option
@output_options
def command(output: Output, checkpoint: Path, source: Path, level: str | None, strict: bool, **options: Any) -> None:
    """Prove that CKPT is as good as SRC, the checkpoint it was made from.

    Exit code 0: it passed, maybe with warnings; 3: it did not.
    """
    level = level or ("all" if options["text"] else "structure")
    _check_options(click.get_current_context(), level)
    structure = compare_structure(source, checkpoint)
    report = build_report((source, checkpoint), structure.scheme, structure=None if level == "logits" else structure)
    if level == "all" and report.verdict is Verdict.FAIL:
        output.warning("The structure is wrong; logits were not compared.")
    elif level != "structure":
        report = compare_on_text(output, report, structure.scheme, options)
    show(output, report)
    raise_failure(report, strict=strict)


def _check_options(ctx: click.Context, level: str) -> None:
    """Refuse options that the level would silently ignore, and a logits level without a text."""
    if level != "structure":
        if ctx.params["text"] is None:
            raise UsageError(
                f"--level {level}",
                expected="--text FILE to run both models on",
                found="none",
                next_step="A UTF-8 text of a few thousand words of the kind the model will see is best.",
            )
        return
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
        if parameter.name in _LOGITS_ONLY and given:
            raise UsageError(
                parameter.opts[0],
                expected="--level logits or all",
                found="--level structure",
                next_step="The structure level reads headers and config alone.",
            )
