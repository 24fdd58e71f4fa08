"""`glm4moe calibrate`: run a checkpoint over text, one layer at a time, and keep what quantization needs to know."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from converters.errors import InputError, UsageError
from converters.quant.rounded import rounded_folder
from converters.quant.stats import CalibrationStats, LayerCoverage, coverage, other_file
from converters.remote import HubId
from glm4moe_cli._options import (
    ByteSize,
    PathName,
    SourceName,
    count_option,
    device_option,
    dry_run_option,
    output_options,
    spell_size,
)
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes
from glm4moe_cli.commands._schemes import GPTQ, SCHEME_OPTIONS, quantize_options, scheme_options
from glm4moe_cli.commands._source import local_folder
from runtime.calibrate.options import (
    DEFAULT_CONTEXT_LENGTH,
    DEFAULT_MAX_MEMORY,
    DEFAULT_MIN_EXPERT_TOKENS,
    DEFAULT_NUM_TOKENS,
    CalibrateOptions,
)

if TYPE_CHECKING:
    from runtime.calibrate.run import CalibrationJob, LayerDone

EXAMPLE = """\b
Example:
  glm4moe calibrate GLM-4.6 GLM-4.6.stats.json --text chats.txt --text code.txt
"""
MINMAX = "minmax"
COVERAGE_COLUMNS = ("layer", "experts", "fewest tokens", "median tokens", "filled")


@click.command(epilog=EXAMPLE)
@click.argument("checkpoint", metavar="CKPT", type=SourceName())
@click.argument("stats", metavar="STATS", type=PathName(dir_okay=False))
@click.option(
    "--text",
    "texts",
    type=PathName(exists=True, dir_okay=False),
    multiple=True,
    required=True,
    metavar="FILE",
    help="UTF-8 text of the kind the model will see; may be given several times.",
)
@count_option(
    "--num-tokens",
    "Use this many tokens, in windows drawn from all texts.",
    low=2,
    default=DEFAULT_NUM_TOKENS,
)
@count_option("--context-length", "Tokens of one window.", low=2, default=DEFAULT_CONTEXT_LENGTH)
@click.option(
    "--seed",
    type=click.IntRange(0, (1 << 32) - 1),
    metavar="N",
    default=0,
    show_default=True,
    help="Of the draw of windows.",
)
@count_option(
    "--min-expert-tokens",
    "Measure an expert on at least this many tokens: more than the router sends, where those are fewer.",
    low=0,
    default=DEFAULT_MIN_EXPERT_TOKENS,
)
@click.option(
    "--method",
    type=click.Choice([MINMAX, GPTQ]),
    default=MINMAX,
    show_default=True,
    help="gptq: also round the weights, as quantize with the options below would store them, into STATS.gptq.",
)
@scheme_options(required=False)
@dry_run_option
@click.option(
    "--restart", is_flag=True, help="Begin anew where an unfinished run of another or the same job stands beside STATS."
)
@device_option
@click.option(
    "--max-memory",
    type=ByteSize(),
    metavar="SIZE",
    default=spell_size(DEFAULT_MAX_MEMORY),
    show_default=True,
    help="Most memory for weights, hidden states and activations; hidden states beyond it go to a scratch file.",
)
@output_options
def command(
    output: Output,
    checkpoint: Path | HubId,
    stats: Path,
    texts: tuple[Path, ...],
    num_tokens: int,
    context_length: int,
    seed: int,
    min_expert_tokens: int,
    method: str,
    dry_run: bool,
    restart: bool,
    device: str,
    max_memory: int,
    **given: Any,
) -> None:
    """Run CKPT over text and write what its linear layers saw to STATS, for quantize --stats.

    One part of a layer is in memory at a time, so any machine can do it. Written are the largest inputs of every
    linear module, those of the MTP layer included, and the largest keys and values of every layer. The same model,
    texts and options give the same bytes. The same command goes on behind the last layer of a run that was cut off.

    With --method gptq, weights are rounded on the way so that the output on the text changes least, for quantize
    --method gptq --stats STATS.
    """
    from runtime.calibrate.kept import remove_leftover
    from runtime.calibrate.run import Rounding, planned
    from runtime.config import resolve_device

    _check_place(stats)
    options = CalibrateOptions(
        num_tokens=num_tokens,
        context_length=context_length,
        seed=seed,
        min_expert_tokens=min_expert_tokens,
        device=resolve_device(device),
        max_memory=max_memory,
        scratch=stats.absolute().parent,
    )
    _check_scheme(method)
    rounding = Rounding(quantize_options(given), rounded_folder(stats)) if method == GPTQ else None
    folder = local_folder(output, checkpoint, "CKPT")
    with planned(folder, texts, options, rounding) as job:
        finished = _finished(stats, job)
        if job.text.num_tokens < num_tokens:
            output.warning(f"The texts have {job.text.available} tokens; {job.text.num_tokens} of them are used.")
        output.facts("Plan", _plan_facts(job))
        if dry_run:
            facts = {"memory": job.memory, "state_bytes": job.state_bytes, "provenance": job.provenance}
            output.result({"dry_run": True, **facts})
            return
        found = finished or _run(output, job, stats, restart=restart)
        if finished is not None:
            remove_leftover(stats)
    _show(output, stats, found, already_finished=finished is not None)


def _check_scheme(method: str) -> None:
    """Refuse options that say how weights are stored where none is rounded, and to round without them."""
    ctx = click.get_current_context()
    if method == GPTQ:
        if ctx.params["scheme"] is None:
            raise UsageError("--method gptq", expected="--scheme, as in quantize", found="none")
        return
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
        if given and parameter.opts[0] in SCHEME_OPTIONS:
            raise UsageError(parameter.opts[0], expected="--method gptq beside it", found=f"--method {MINMAX}")


def _check_place(stats: Path) -> None:
    if not stats.absolute().parent.is_dir():
        raise UsageError(f"STATS {stats}", expected="a file in an existing folder", found="no such folder")


def _finished(stats: Path, job: "CalibrationJob") -> CalibrationStats | None:
    """Return the statistics that this very job has written before; refuse a file that holds anything else."""
    if not stats.exists():
        return None
    try:
        found = CalibrationStats.load(stats)
    except InputError as error:
        raise other_file(stats) from error
    if found.provenance != job.provenance:
        raise other_file(stats)
    return None if job.has_lost_rounded else found


def _run(output: Output, job: "CalibrationJob", stats: Path, *, restart: bool) -> CalibrationStats:
    from runtime.calibrate.kept import calibrate_into

    def tell(done: "LayerDone") -> None:
        words = f"layer {done.layer + 1}/{done.num_layers}"
        if done.coverage is not None:
            words += (
                f": {done.coverage.min_tokens} tokens to the least used expert, "
                f"{done.coverage.median_tokens:g} in the median, {done.coverage.filled} filled"
            )
        output.note(words)

    with output.progress("calibrate", job.read_bytes) as progress:
        return calibrate_into(job, stats, output.note, restart=restart, progress=progress, on_layer=tell)


def _plan_facts(job: "CalibrationJob") -> dict[str, object]:
    memory = job.memory
    parts = f"{format_bytes(memory.weights)} weights, {format_bytes(memory.activations)} activations"
    parts += f", {format_bytes(memory.routing)} routing"
    parts += f", {format_bytes(memory.rounding)} rounding" if memory.rounding else ""
    hidden = format_bytes(memory.hidden)
    return {
        "text": f"{job.text.num_tokens} tokens in {len(job.text.windows)} windows",
        "reads": format_bytes(job.read_bytes),
        "memory": f"{format_bytes(memory.peak_bytes)}: {parts}"
        + ("" if memory.hidden_on_disk else f", {hidden} hidden states"),
        "scratch file": hidden if memory.hidden_on_disk else "none",
        "disk": f"at most {format_bytes(job.state_bytes)} beside STATS for an unfinished run",
        "compute": f"float32 on {job.options.device}",
    }


def _show(output: Output, path: Path, found: CalibrationStats, *, already_finished: bool) -> None:
    rows = coverage(found.tokens, found.filled)
    output.table("Coverage", COVERAGE_COLUMNS, list(map(_row, rows)))
    output.facts(
        "Statistics",
        {
            "file": path,
            "sha256": found.sha256,
            "modules": len(found.input_amax),
            "written": "nothing; this very job is finished" if already_finished else format_bytes(len(found.data)),
        },
    )
    result = {"stats": path, "sha256": found.sha256, "modules": len(found.input_amax), "filled": len(found.filled)}
    output.result({**result, "already_finished": already_finished, "coverage": rows, "provenance": found.provenance})


def _row(row: LayerCoverage) -> tuple[object, ...]:
    return (row.layer, row.experts, row.min_tokens, row.median_tokens, row.filled)
