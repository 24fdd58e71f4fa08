"""`glm4moe quantize`: weights to a low-precision format that serving engines load as it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from converters.errors import UsageError
from converters.job import JobOptions
from converters.quant.choice import QuantizeOptions, choose
from converters.quantize import check_quantize, plan_quantize
from converters.remote import HubId
from converters.source import Source
from glm4moe_cli._options import device_option, dst_argument, output_options, src_argument
from glm4moe_cli._output import Output
from glm4moe_cli._running import Running, running_options
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
@running_options
@device_option
@output_options
def command(
    output: Output,
    src: Path | HubId,
    dst: Path,
    wanted: Wanted,
    method: str,
    running: Running,
    device: str,
    **given: Any,
) -> None:
    """Quantize the weights of SRC into the new folder DST.

    Attention, dense MLP, shared and routed experts are quantized. Router, norms, biases, embeddings, heads and eh_proj
    stay as they are. What is not quantized is named in the config, in the words of each engine.
    """
    from runtime.kernels.accelerator import open_accelerator

    is_gptq = method == GPTQ
    if (is_gptq or wanted.texts) and isinstance(src, HubId) and running.disk_budget is not None:
        raise UsageError(
            "--method gptq" if is_gptq else "--calibrate",
            expected="a SRC that is there as a whole: the model is run",
            found=f"{src.repo} with --disk-budget",
            next_step=f"Run 'glm4moe download {src.repo} FOLDER{src.revision_option}' first and quantize FOLDER.",
        )
    request = Request(src, dst, running.disk_budget, running.dry_run)
    with opened(output, request, running.how) as (source, how):
        accelerator = open_accelerator(device)
        options = quantize_options(given)
        choice = choose(source.schema, options)
        wanted.check_used(choice.needs_stats or is_gptq)
        if wanted.texts:
            _check_calibration(source, options, dst, how)
        stats = None
        if choice.needs_stats or is_gptq:
            stats = statistics(
                output,
                wanted,
                source.folder,
                dst,
                dry_run=running.dry_run,
                restart=how.restart,
                rounding=options if is_gptq else None,
            )
        if is_gptq:
            options = replace(options, rounded=rounded_weights(wanted, stats, dst))
        conversion = plan_quantize(source, options.with_stats(stats if choice.needs_stats else None))
        if accelerator is not None:
            output.note(f"quantizing on {accelerator.name}")
        run_options = replace(running.options, accelerator=accelerator)
        plan_and_run(output, conversion, dst, (run_options, how), dry_run=running.dry_run)
        if not running.dry_run and how.feed is None:
            output.hint(f"glm4moe verify {dst} --against {source.folder} --text FILE")


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
