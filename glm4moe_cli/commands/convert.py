"""`glm4moe convert`: a checkpoint in, the same weights out in another layout, dtype or shards, with or without MTP."""

from dataclasses import replace
from pathlib import Path

import click

from converters.checkpoint.content_digest import Algorithm
from converters.convert import ConvertOptions, MtpChoice, plan_convert
from converters.errors import UsageError
from converters.layout import Layout
from converters.quant.scheme import Format
from converters.reformat import FORMATS, ReformatOptions, plan_reformat
from converters.remote import HubId
from converters.shard.mapping import ParallelMapping
from converters.shard.plan import DIGEST, ShardOptions
from glm4moe_cli._mapping import mapping_options
from glm4moe_cli._options import digest_option, dst_argument, output_options, src_argument
from glm4moe_cli._output import Output
from glm4moe_cli._running import Running, running_options
from glm4moe_cli.commands._conversion import plan_and_run
from glm4moe_cli.commands._sharding import planned
from glm4moe_cli.commands._source import Request, opened

EXAMPLE = """\b
Example:
  glm4moe convert GLM-4.6-FP8 GLM-4.6-packed --layout packed --dequantize
  glm4moe convert GLM-4.6-FP8 GLM-4.6-ranks --layout packed --tp 8 --ep 8
  glm4moe convert GLM-4.6-NVFP4 GLM-4.6-ModelOpt --format modelopt
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
@click.option(
    "--format",
    "to_format",
    type=click.Choice([format_.value for format_ in FORMATS]),
    show_default="as in SRC",
    help="NVFP4 only: write the other dialect's names, scales and config, with the same codes.",
)
@digest_option(show_default=f"{Algorithm.SHA256}, for ranks {DIGEST}")
@mapping_options
@running_options
@output_options
def command(
    output: Output,
    src: Path | HubId,
    dst: Path,
    layout: str | None,
    dtype: str | None,
    dequantize: bool,
    mtp: str,
    to_format: str | None,
    digest: Algorithm | None,
    mapping: ParallelMapping | None,
    max_shard_size: int,
    running: Running,
) -> None:
    """Repack the checkpoint SRC into the new folder DST; with --tp, --ep or --pp, into files for each rank.

    Bits change only where --dtype or --dequantize asks for it. DST has no index and no config.json until all else is
    written.
    """
    options = ConvertOptions(
        layout=Layout(layout) if layout else None,
        dtype=dtype,
        dequantize=dequantize,
        mtp=MtpChoice(mtp),
        max_shard_bytes=max_shard_size,
        digest=digest,
    )
    _check_together(options, to_format, mapping)
    if mapping and (running.how.update or running.disk_budget is not None):
        raise UsageError(
            "--tp, --ep, --pp",
            expected="no --update or --disk-budget beside them: all ranks are written together, anew",
            found="one",
            next_step=f"'glm4moe download' the source first, or convert into a new folder instead of {dst}.",
        )
    request = Request(src, dst, running.disk_budget, running.dry_run)
    with opened(output, request, running.how) as (source, how):
        if to_format:
            reformat = ReformatOptions(format=Format(to_format), max_shard_bytes=max_shard_size)
            conversion = plan_reformat(source, reformat)
        elif mapping:
            conversion = planned(output, source, ShardOptions(mapping=mapping, convert=options), "convert")
        else:
            conversion = plan_convert(source, options)
        plan_and_run(output, conversion, dst, (running.options, how), dry_run=running.dry_run)


def _check_together(options: ConvertOptions, to_format: str | None, mapping: ParallelMapping | None) -> None:
    """Refuse options that need a pass of their own."""
    if to_format and (mapping or replace(options, max_shard_bytes=0) != ConvertOptions(max_shard_bytes=0)):
        raise UsageError(
            f"--format {to_format}",
            expected="no --layout, --dtype, --dequantize, --mtp, --digest, --tp, --ep or --pp beside it",
            found="one",
            next_step="Convert twice.",
        )
    if mapping and options.mtp is MtpChoice.SEPARATE:
        raise UsageError(
            f"--mtp {options.mtp}",
            expected="no --tp, --ep or --pp beside it",
            found="one",
            next_step="The MTP layer is on the ranks of the last stage; drop it or keep it there.",
        )
