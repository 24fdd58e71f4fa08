"""`glm4moe quantize`: weights to a low-precision format that serving engines load as it is."""

from pathlib import Path

import click

from converters.job import JobOptions
from converters.pipeline import RunOptions
from converters.quant.scheme import SCHEMES, Arithmetic
from converters.quantize import QuantizeOptions, plan_quantize
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
  glm4moe quantize GLM-4.6 GLM-4.6-FP8 --scheme fp8
"""


@click.command(epilog=EXAMPLE)
@src_argument
@dst_argument
@click.option(
    "--scheme",
    type=click.Choice(SCHEMES),
    required=True,
    help="fp8: E4M3 with one scale per output channel, activations per token at run time.",
)
@click.option(
    "--arithmetic",
    type=click.Choice([arithmetic.value for arithmetic in Arithmetic]),
    default=Arithmetic.FLOAT32.value,
    show_default=True,
    help="float32 has the lower error; compressed-tensors gives that library's bytes.",
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
    scheme: str,
    arithmetic: str,
    max_shard_size: int,
    disk_budget: int | None,
    dry_run: bool,
    how: JobOptions,
    workers: int,
    max_memory: int,
) -> None:
    """Quantize the weights of SRC into the new folder DST.

    Attention, dense MLP, shared and routed experts are quantized, in the MTP layer too. Router, norms, biases,
    embeddings, heads and eh_proj stay as they are and are named in config.json for the engines.
    """
    options = QuantizeOptions(scheme=scheme, arithmetic=Arithmetic(arithmetic), max_shard_bytes=max_shard_size)
    with opened(output, Request(src, dst, disk_budget, dry_run), how) as (source, how):
        conversion = plan_quantize(source, options)
        plan_and_run(output, conversion, dst, (RunOptions(workers, max_memory), how), dry_run=dry_run)
        if not dry_run and isinstance(src, Path):
            output.hint(f"glm4moe verify {dst} --against {src} --text FILE")
