"""`glm4moe verify`: compare a checkpoint with the one it was made from."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from converters.compare import compare_structure
from converters.formats.inputs import ACTIVATIONS, FULL
from glm4moe_cli._options import (
    PathName,
    checkpoint_argument,
    device_option,
    max_memory_option,
    output_options,
    workers_option,
)
from glm4moe_cli._output import Output
from glm4moe_cli.commands._levels import (
    BYTES,
    LEVELS,
    LOGITS,
    STRUCTURE,
    WEIGHTS,
    Resources,
    check_bytes,
    check_options,
    check_weights,
    chosen_levels,
)
from glm4moe_cli.commands._verification import compare_on_text, is_sound, plan_text_run, raise_failure, show
from runtime.verify.report import Levels, build_report
from runtime.verify.windows import DEFAULT_CONTEXT_LENGTH

EXAMPLE = """\b
Example:
  glm4moe verify GLM-4.5-Air-NVFP4 --against GLM-4.5-Air --report GLM-4.5-Air-NVFP4.json
  glm4moe verify GLM-4.5-Air-FP8 --against GLM-4.5-Air --text sample.txt
"""
_share = click.FloatRange(0.0, 1.0)
_positive = click.FloatRange(0.0, min_open=True)


@click.command(epilog=EXAMPLE)
@checkpoint_argument
@click.option(
    "--against",
    "source",
    type=PathName(exists=True, file_okay=False),
    required=True,
    metavar="SRC",
    help="The checkpoint that CKPT was made from.",
)
@click.option(
    "--level",
    type=click.Choice(LEVELS),
    show_default="all with --text, else up to weights",
    help="structure: names, shapes, dtypes, config and files, from headers alone. bytes: digests of CKPT's files. "
    "weights: every element within half a step of its source, or equal. logits: both models run.",
)
@click.option(
    "--text",
    type=PathName(exists=True, dir_okay=False),
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
    "--activations",
    type=click.Choice(ACTIVATIONS),
    default=FULL,
    show_default=True,
    help="full: as they are, so that weights alone are compared. as-served: rounded before each quantized layer, as "
    "its config has engines do it.",
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
@click.option(
    "--report",
    type=PathName(),
    metavar="FILE|DIR",
    help="Write what the weights level found of every tensor, as JSON; a folder gets weights.json.",
)
@click.option("--strict", is_flag=True, help="Let warnings fail too.")
@device_option
@workers_option
@max_memory_option
@output_options
def command(output: Output, checkpoint: Path, source: Path, level: str | None, strict: bool, **options: Any) -> None:
    """Prove that CKPT is as good as SRC, the checkpoint it was made from.

    Exit code 0: it passed, maybe with warnings; 3: it did not.
    """
    chosen = chosen_levels(level, has_text=options["text"] is not None)
    check_options(click.get_current_context(), chosen)
    folders = source, checkpoint
    structure = compare_structure(source, checkpoint)
    levels = Levels(structure=structure if STRUCTURE in chosen else None)
    further = tuple(name for name in chosen if name != STRUCTURE)
    needs_structure = STRUCTURE in chosen or WEIGHTS in chosen
    if further and needs_structure and not is_sound(folders, structure):
        levels = Levels(structure=structure)
        output.warning(f"The structure is wrong; {', '.join(further)} were not compared.")
        further = ()
    planned = plan_text_run(folders, structure.scheme, options) if LOGITS in further else None
    resources = Resources(options["workers"], options["max_memory"])
    if BYTES in further:
        levels = replace(levels, contents=check_bytes(output, checkpoint, resources, is_asked_for=level == BYTES))
    if WEIGHTS in further:
        levels = replace(levels, weights=check_weights(output, folders, resources))
    if planned is not None:
        levels = replace(levels, logits=compare_on_text(output, folders, planned))
    report = build_report(folders, structure.scheme, levels, planned.limits if planned else None)
    show(output, report)
    if options["report"] is not None and levels.weights is not None:
        output.hint(f"Report: {_write(options['report'], levels, folders)}")
    raise_failure(report, strict=strict)


def _write(path: Path, levels: Levels, folders: tuple[Path, Path]) -> Path:
    from converters.quant.report import write_report

    assert levels.weights is not None
    return write_report(path, levels.weights, {"source": str(folders[0]), "candidate": str(folders[1])})
