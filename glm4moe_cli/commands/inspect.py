"""`glm4moe inspect`: what a checkpoint is, and what is wrong with it."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click

from converters.errors import NetworkError, UsageError
from converters.inspect.report import InspectReport, inspect_folder, scan_content
from converters.remote import HubId, fetch_headers
from converters.shard.limits import MappingRefused
from converters.shard.mapping import ParallelMapping
from converters.shard.planner import plan_ranks
from converters.shard.source import is_sharded, open_sharded
from converters.source import open_source
from glm4moe_cli._mapping import mapping_options
from glm4moe_cli._options import ByteSize, TextName, output_options
from glm4moe_cli._output import Output
from glm4moe_cli._text import format_bytes
from glm4moe_cli.commands._inspection import raise_fatal, show
from glm4moe_cli.commands._planning import plan_json, show_plan
from glm4moe_cli.commands._sharding import show_limits, show_ranks

EXAMPLE = """\b
Example:
  glm4moe inspect zai-org/GLM-4.5-Air
  glm4moe inspect GLM-4.5-Air-FP8 --check
  glm4moe inspect zai-org/GLM-4.6 --tp 8 --ep 8 --gpu-memory 141GB
"""


@click.command(epilog=EXAMPLE)
@click.argument("checkpoint", metavar="CKPT", type=TextName())
@click.option("--tensors", is_flag=True, help="List every tensor: dtype, shape, bytes, file.")
@click.option("--missing", is_flag=True, help="List every tensor that is missing or unexpected.")
@click.option("--hash", "want_hash", is_flag=True, help="Digest of the content: equal for equal weights in any files.")
@click.option("--check", is_flag=True, help="Read all weights and look for NaN, Inf, constant tensors and bad scales.")
@mapping_options
@click.option("--gpu-memory", type=ByteSize(), metavar="SIZE", help="With --tp, --ep, --pp: what a rank has in all.")
@output_options
def command(
    output: Output,
    checkpoint: str,
    tensors: bool,
    missing: bool,
    want_hash: bool,
    check: bool,
    mapping: ParallelMapping | None,
    gpu_memory: int | None,
) -> None:
    """Describe CKPT: a folder, or a hub id such as org/name or org/name@revision.

    With --tp, --ep or --pp it tells instead what each rank would hold, and the options of engines that say the same.

    Reads headers and config alone, of a hub id too, unless --hash or --check ask for the weights. Exit code 4: it is
    corrupt or incomplete.
    """
    reads_weights = "--check" if check else "--hash" if want_hash else None
    folder = _local_folder(output, checkpoint, reads_weights if mapping is None else None)
    beside = {"--tensors": tensors, "--missing": missing, "--hash": want_hash, "--check": check}
    if mapping is not None:
        _show_plan(output, folder, checkpoint, Wanted(mapping, gpu_memory, tuple(n for n, on in beside.items() if on)))
        return
    if folder is not None and is_sharded(folder):
        others = {**beside, "--gpu-memory": gpu_memory is not None}
        _show_sharded(output, folder, checkpoint, tuple(name for name, on in others.items() if on))
        return
    if gpu_memory is not None:
        raise UsageError("--gpu-memory", expected="--tp, --ep or --pp beside it", found="none of them")
    if folder is not None:
        report = inspect_folder(folder, checkpoint)
        if want_hash or check:
            report = _scan(output, report, want_hash=want_hash, check=check)
    else:
        with _remote_headers(output, checkpoint) as headers:
            report = inspect_folder(headers, checkpoint)
    show(output, report, tensors=tensors, missing=missing)
    output.result(report.to_json(tensors=tensors))
    raise_fatal(report)


@dataclass(frozen=True, slots=True)
class Wanted:
    """The ranks to plan for: their mapping and memory, and options that say nothing about them."""

    mapping: ParallelMapping
    gpu_memory: int | None
    others: tuple[str, ...]


def _show_plan(output: Output, folder: Path | None, checkpoint: str, wanted: Wanted) -> None:
    """Tell what each rank of a mapping would hold."""
    if wanted.others:
        raise UsageError(wanted.others[0], expected="no --tp, --ep or --pp beside it", found="one")
    with nullcontext(folder) if folder else _remote_headers(output, checkpoint) as headers, open_source(headers) as src:
        try:
            plan = plan_ranks(src, wanted.mapping, wanted.gpu_memory)
        except MappingRefused as refusal:
            show_limits(output, refusal.limits)
            raise
    show_plan(output, plan)
    output.result({"checkpoint": checkpoint, "parallel_plan": plan_json(plan)})


def _show_sharded(output: Output, folder: Path, checkpoint: str, others: tuple[str, ...]) -> None:
    """Tell how a sharded checkpoint is cut; its headers are held against its manifest.

    Args:
        output: where to tell.
        folder: the shards.
        checkpoint: what the user calls them.
        others: options that say nothing of shards.
    Raises:
        UsageError: there are such options. InputError: files and manifest do not go together.
    """
    if others:
        next_step = "'glm4moe shard --merge' restores it; 'glm4moe verify' compares shards as they are."
        raise UsageError(others[0], expected="a whole checkpoint", found="shards", next_step=next_step)
    with open_sharded(folder) as source:
        sizes: Counter[int] = Counter()
        for name in source.reader.names:
            sizes[int(name.partition("/")[0])] += source.reader.entry(name).nbytes
        held = f"{format_bytes(sizes.total())} in {len(source.reader.names):,} tensors"
        output.line(f"{checkpoint}: {source.files} shards of a {source.tensor_layout} layout, {held}")
        show_ranks(output, source.mapping, sizes)
        for note in source.notes:
            output.warning(note)
        mapping = source.mapping.as_json()
    output.hint("'glm4moe shard --merge' restores the checkpoint that it was cut from.")
    output.result({"checkpoint": checkpoint, "sharded": {"mapping": mapping, "bytes_of_ranks": dict(sizes)}})


def _scan(output: Output, report: InspectReport, *, want_hash: bool, check: bool) -> InspectReport:
    total_bytes = sum(tensor.nbytes for tensor in report.view.tensors.values())
    with output.progress("read", total_bytes) as progress:
        return scan_content(report, want_hash=want_hash, want_values=check, on_bytes=progress.advance)


def _local_folder(output: Output, checkpoint: str, reads_weights: str | None) -> Path | None:
    """Return the folder of a checkpoint; of a hub id None, unless it has to be in the hub's cache.

    Args:
        reads_weights: the option that asks for all weights, if one does.
    Raises:
        UsageError, NetworkError: it has to be, and is not.
    """
    hub_id = None if Path(checkpoint).is_dir() else HubId.parse(checkpoint)
    if hub_id is None:
        return Path(checkpoint) if Path(checkpoint).is_dir() else None
    from converters.download import Hub, cached_folder

    is_offline = Hub().is_offline
    if not is_offline and not reads_weights:
        return None
    folder = cached_folder(hub_id)
    if folder is not None:
        output.note(f"{hub_id.repo} is in the hub's cache: {folder}")
        return folder
    if reads_weights:
        raise UsageError(
            f"{reads_weights} {checkpoint}",
            expected="a folder, or a hub id that is whole in the hub's cache: it reads all weights",
            found="neither",
            next_step=f"Run 'glm4moe download {hub_id.repo} FOLDER{hub_id.revision_option}' first, then "
            f"'glm4moe inspect FOLDER {reads_weights}'.",
        )
    raise NetworkError(
        f"CKPT {checkpoint}",
        expected="a folder, or a hub id that is whole in the hub's cache, as HF_HUB_OFFLINE is set",
        found="neither",
        next_step="Unset HF_HUB_OFFLINE to look at it on the hub.",
    )


@contextmanager
def _remote_headers(output: Output, checkpoint: str) -> Iterator[Path]:
    """Yield a folder of holes with the headers of a hub id."""
    hub_id = HubId.parse(checkpoint)
    if hub_id is None:
        raise UsageError(f"CKPT {checkpoint}", expected="a folder, org/name or org/name@revision", found="none of them")
    from converters.download import Hub

    with TemporaryDirectory(prefix="glm4moe-headers-") as folder:
        listing = fetch_headers(Hub(), hub_id, Path(folder))
        output.note(f"{listing.repo} at commit {listing.commit}")
        yield Path(folder)
