"""`glm4moe shard`: files for each rank of tensor, expert and pipeline parallelism, and the checkpoint out of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from converters.checkpoint.content_digest import Algorithm
from converters.conversion import Conversion
from converters.convert import ConvertOptions
from converters.errors import UsageError
from converters.job import JobOptions
from converters.pipeline import RunOptions
from converters.remote import HubId
from converters.shard.mapping import ParallelMapping
from converters.shard.naming import VLLM_VERSION, ShardLayout
from converters.shard.plan import DIGEST, ShardOptions, plan_merge
from converters.shard.source import ShardedSource, is_sharded, open_sharded
from converters.source import Source
from glm4moe_cli._mapping import mapping_options
from glm4moe_cli._options import (
    digest_option,
    dry_run_option,
    dst_argument,
    max_memory_option,
    max_shard_size_option,
    output_options,
    part_options,
    src_argument,
    workers_option,
)
from glm4moe_cli._output import Output
from glm4moe_cli.commands._conversion import plan_and_run
from glm4moe_cli.commands._sharding import planned
from glm4moe_cli.commands._source import Request, opened

EXAMPLE = """\b
Example:
  glm4moe shard GLM-4.6 GLM-4.6-tp8-ep8 --tp 8 --ep 8
  glm4moe shard GLM-4.6-tp8-ep8 GLM-4.6 --merge
"""
_RESHARD = "Use --reshard to cut shards anew."


@click.command(epilog=EXAMPLE)
@src_argument
@dst_argument
@mapping_options
@click.option(
    "--layout",
    type=click.Choice([layout.value for layout in ShardLayout]),
    default=ShardLayout.RANK.value,
    show_default=True,
    help="What the files are like: our own, TensorRT-LLM's rank files, or vLLM's sharded_state.",
)
@click.option("--merge", is_flag=True, help="SRC is sharded: restore the checkpoint that it was cut from.")
@click.option("--reshard", is_flag=True, help="SRC is sharded: cut it anew, without the checkpoint in between.")
@click.option(
    "--vllm-version",
    show_default=VLLM_VERSION,
    metavar="VERSION",
    help="With --layout vllm: the version that is to load the files; only the one that was checked is taken.",
)
@digest_option(show_default=DIGEST)
@max_shard_size_option
@dry_run_option
@part_options
@workers_option
@max_memory_option
@output_options
def command(
    output: Output,
    src: Path | HubId,
    dst: Path,
    mapping: ParallelMapping | None,
    layout: str,
    merge: bool,
    reshard: bool,
    vllm_version: str | None,
    digest: Algorithm | None,
    max_shard_size: int,
    dry_run: bool,
    how: JobOptions,
    workers: int,
    max_memory: int,
) -> None:
    """Cut the checkpoint SRC into files for each rank, in the new folder DST; or put it together again.

    No bit changes: scales and packed words are cut with their weights, and --merge gives the original back. The mapping
    stands in DST's manifest.
    """
    convert = ConvertOptions(max_shard_bytes=max_shard_size, digest=digest)
    if merge and layout != ShardLayout.RANK:
        raise UsageError(f"--layout {layout}", expected="no --merge beside it", found="both", next_step=_RESHARD)
    if vllm_version is not None and layout != ShardLayout.VLLM:
        raise UsageError(
            f"--vllm-version {vllm_version}", expected=f"--layout {ShardLayout.VLLM} beside it", found=layout
        )
    with _opened(output, Request(src, dst, None, dry_run, can_stream=False), merge=merge, reshard=reshard) as source:
        if merge:
            conversion = _merged(source, mapping, convert)
        elif mapping is None:
            raise UsageError("--tp, --ep, --pp", expected="one of them, or --merge", found="none")
        else:
            options = ShardOptions(
                mapping=mapping,
                files=ShardLayout(layout),
                convert=convert,
                vllm_version=VLLM_VERSION if vllm_version is None else vllm_version,
            )
            conversion = planned(output, source, options, "shard")
        plan_and_run(output, conversion, dst, (RunOptions(workers, max_memory), how), dry_run=dry_run)


def _merged(source: Source, mapping: ParallelMapping | None, convert: ConvertOptions) -> Conversion:
    if mapping is not None:
        raise UsageError("--merge", expected="no --tp, --ep or --pp beside it", found="one", next_step=_RESHARD)
    assert isinstance(source, ShardedSource), source
    return plan_merge(source, convert.max_shard_bytes, convert.digest or DIGEST)


@contextmanager
def _opened(output: Output, request: Request, *, merge: bool, reshard: bool) -> Iterator[Source]:
    """Yield the source: whole, or sharded if it is to be merged or cut anew.

    Raises:
        UsageError: it is the other.
    """
    if merge and reshard:
        raise UsageError("--merge", expected="no --reshard beside it", found="both")
    src = request.src
    if not merge and not reshard:
        if isinstance(src, Path) and is_sharded(src):
            raise UsageError(
                f"SRC {src}", expected="a whole checkpoint, or --merge or --reshard", found="shards", next_step=_RESHARD
            )
        with opened(output, request, JobOptions()) as (source, _):
            yield source
        return
    option = "--merge" if merge else "--reshard"
    if not isinstance(src, Path):
        next_step = f"Run 'glm4moe download {src.repo} FOLDER{src.revision_option}' first."
        raise UsageError(option, expected="a folder as SRC", found=f"the hub id {src.repo}", next_step=next_step)
    with open_sharded(src) as sharded:
        yield sharded
