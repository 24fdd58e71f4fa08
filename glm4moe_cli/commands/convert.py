"""`glm4moe convert`: a checkpoint in, the same weights out in another layout, dtype or shards, with or without MTP."""

from pathlib import Path

import click

from converters.convert import ConvertOptions, MtpChoice, plan_convert
from converters.job import JobOptions
from converters.layout import Layout
from converters.pipeline import RunOptions
from converters.remote import HubId
from glm4moe_cli._options import (
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
from glm4moe_cli.commands._source import Request, opened

EXAMPLE = """\b
Example:
  glm4moe convert GLM-4.6-FP8 GLM-4.6-packed --layout packed --dequantize
"""


@click.command(epilog=EXAMPLE)
@src_argument
@dst_argument
@click.option(
    "--layout",
    type=click.Choice([layout.value for layout in Layout]),
    show_default="as in SRC",
    help="How experts, q/k/v and gate/up are stored; each layout leads back to every other.",
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    show_default="as in SRC",
    help="Round all weights to this dtype; the router's fp32 correction bias stays.",
)
@click.option(
    "--dequantize", is_flag=True, help="Write weights instead of codes and scales: FP8, INT8, INT4 or NVFP4 to bf16."
)
@click.option(
    "--mtp",
    type=click.Choice([choice.value for choice in MtpChoice]),
    default=MtpChoice.KEEP.value,
    show_default=True,
    help="The MTP layer: in its place, left out, or in a file of its own.",
)
@max_shard_size_option
@disk_budget_option
@dry_run_option
@job_options
@workers_option
@max_memory_option
@output_options
def command(
    output: Output,
    src: Path | HubId,
    dst: Path,
    layout: str | None,
    dtype: str | None,
    dequantize: bool,
    mtp: str,
    max_shard_size: int,
    disk_budget: int | None,
    dry_run: bool,
    how: JobOptions,
    workers: int,
    max_memory: int,
) -> None:
    """Repack the checkpoint SRC into the new folder DST.

    Bits change only where --dtype or --dequantize asks for it. DST has no index and no config.json until all else is
    written.
    """
    options = ConvertOptions(
        layout=Layout(layout) if layout else None,
        dtype=dtype,
        dequantize=dequantize,
        mtp=MtpChoice(mtp),
        max_shard_bytes=max_shard_size,
    )
    with opened(output, Request(src, dst, disk_budget, dry_run), how) as (source, how):
        conversion = plan_convert(source, options)
        plan_and_run(output, conversion, dst, (RunOptions(workers, max_memory), how), dry_run=dry_run)
