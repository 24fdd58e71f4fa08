"""`glm4moe quantize`: weights to a low-precision format that serving engines load as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from converters.errors import UsageError
from converters.job import JobOptions
from converters.pipeline import RunOptions
from converters.quant.choice import QuantizeOptions, choose
from converters.quantize import check_quantize, plan_quantize
from converters.remote import HubId
from converters.source import Source
from glm4moe_cli._options import (
    device_option,
    disk_budget_option,
    dry_run_option,
    dst_argument,
    job_options,
    max_memory_option,
    max_shard_size_option,
    output_options,
    src_argument,
    workers_option,
)
from glm4moe_cli._output import Output
from glm4moe_cli.commands._conversion import plan_and_run
from glm4moe_cli.commands._schemes import GPTQ, RTN, quantize_options, scheme_options
from glm4moe_cli.commands._source import Request, opened
from glm4moe_cli.commands._statistics import Wanted, rounded_weights, statistics, statistics_options

EXAMPLE = """\b
Example:
  glm4moe quantize GLM-4.6 GLM-4.6-FP8 --scheme fp8
  glm4moe quantize GLM-4.6 GLM-4.6-NVFP4 --scheme nvfp4 --preset experts-only --stats GLM-4.6.stats.json
"""


@click.command(epilog=EXAMPLE)
@src_argument
@dst_argument
@scheme_options(kv_cache=True)
@click.option(
    "--method",
    type=click.Choice([RTN, GPTQ]),
    default=RTN,
    show_default=True,
    help="rtn: each weight to its nearest code. gptq: so that the output on a text changes least; takes --calibrate, "
    "or --stats of 'glm4moe calibrate --method gptq'.",
)
@statistics_options
@max_shard_size_option
@disk_budget_option
@dry_run_option
@job_options
@workers_option
@max_memory_option
@device_option
@output_options
def command(
    output: Output,
    src: Path | HubId,
    dst: Path,
    how: JobOptions,
    wanted: Wanted,
    method: str,
    disk_budget: int | None,
    dry_run: bool,
    workers: int,
    max_memory: int,
    device: str,
    **given: Any,
) -> None:
    """Quantize the weights of SRC into the new folder DST.

    Attention, dense MLP, shared and routed experts are quantized. Router, norms, biases, embeddings, heads and eh_proj
    stay as they are. What is not quantized is named in the config, in the words of each engine.
    """
    from runtime.kernels.accelerator import open_accelerator

    with opened(output, Request(src, dst, disk_budget, dry_run), how) as (source, how):
        accelerator = open_accelerator(device)
        options = quantize_options(given)
        choice = choose(source.schema, options)
        is_gptq = method == GPTQ
        if (is_gptq or wanted.texts) and not isinstance(src, Path):
            name = "--method gptq" if is_gptq else "--calibrate"
            raise UsageError(name, expected="a folder as SRC", found=f"{src.repo} on the hub")
        wanted.check_used(choice.needs_stats or is_gptq)
        if wanted.texts:
            _check_calibration(source, options, dst, how)
        stats = None
        if choice.needs_stats or is_gptq:
            stats = statistics(
                output, wanted, source.folder, dst, dry_run=dry_run, rounding=options if is_gptq else None
            )
        if is_gptq:
            options = replace(options, rounded=rounded_weights(wanted, stats, dst))
        conversion = plan_quantize(source, options.with_stats(stats if choice.needs_stats else None))
        if accelerator is not None:
            output.note(f"quantizing on {accelerator.name}")
        plan_and_run(output, conversion, dst, (RunOptions(workers, max_memory, accelerator), how), dry_run=dry_run)
        if not dry_run and isinstance(src, Path):
            output.hint(f"glm4moe verify {dst} --against {src} --text FILE")


def _check_calibration(source: Source, options: QuantizeOptions, dst: Path, how: JobOptions) -> None:
    """Refuse a calibration that several processes would do at once, or whose result nothing would come of."""
    if how.part or how.finalize:
        raise UsageError(
            "--calibrate",
            expected="--stats FILE beside --part and --finalize",
            found="a text, which every part would run on its own",
            next_step=f"Run 'glm4moe calibrate {source.folder} STATS --text FILE' once first.",
        )
    check_quantize(source, options, dst, is_redone=how.update or how.restart)
