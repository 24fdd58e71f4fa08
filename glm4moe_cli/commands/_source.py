"""SRC of a conversion: a folder, or a hub id in the hub's cache or whose weights are fetched and removed as it goes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from converters.errors import UsageError
from converters.job import JobOptions
from converters.remote import HubId
from converters.source import Source, open_source
from glm4moe_cli._output import Output


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line says about source and destination; `can_stream`: the command has --disk-budget."""

    src: Path | HubId
    dst: Path
    disk_budget: int | None
    dry_run: bool
    can_stream: bool = True


@contextmanager
def opened(output: Output, request: Request, how: JobOptions) -> Iterator[tuple[Source, JobOptions]]:
    """Yield the source, and the job's options with what brings its weights in, if they are on the hub.

    Raises:
        UsageError: a hub id that is not in the cache, without a budget; a budget without a hub id, or beside what needs
        all weights at once.
    """
    src, budget = request.src, request.disk_budget
    if isinstance(src, Path) or budget is None:
        if budget is not None:
            raise UsageError("--disk-budget", expected="a hub id such as org/name as SRC", found=f"the folder {src}")
        with open_source(local_folder(output, src, "SRC", can_stream=request.can_stream)) as source:
            yield source, how
        return
    for name, is_given in (("--part", how.part), ("--finalize", how.finalize), ("--update", how.update)):
        if is_given:
            next_step = f"Fetch it with 'glm4moe download {src.repo} FOLDER', then use {name} on the folder."
            raise UsageError("--disk-budget", expected=f"no {name} beside it", found="both", next_step=next_step)
    from converters.download import Hub
    from converters.streamed import Stream, open_stream

    stream = Stream(src, request.dst, budget, restart=how.restart, dry_run=request.dry_run)
    with open_stream(Hub(), stream) as (source, feed):
        output.note(f"{src.repo} at commit {feed.staging.listing.commit}")
        yield source, replace(how, feed=feed)


def local_folder(output: Output, given: Path | HubId, argument: str, *, can_stream: bool = False) -> Path:
    """Return the folder that is given, or that of a hub id in the hub's cache; nobody is asked.

    Args:
        output: takes a note of where it is.
        given: the folder or the hub id.
        argument: which one of the command's it is.
        can_stream: the command could fetch it with --disk-budget.
    Raises:
        UsageError: the cache does not have all of it.
    """
    if isinstance(given, Path):
        return given
    from converters.download import cached_folder

    folder = cached_folder(given)
    if folder is None:
        download = f"Run 'glm4moe download {given.repo} FOLDER{given.revision_option}' first"
        raise UsageError(
            f"{argument} {given.repo}",
            expected="a folder, a checkpoint that is whole in the hub's cache, or --disk-budget beside a hub id"
            if can_stream
            else "a folder, or a checkpoint that is whole in the hub's cache",
            found="no such folder, nothing whole in the cache, and no --disk-budget"
            if can_stream
            else "no such folder, and nothing whole in the cache",
            next_step=f"{download}, or add --disk-budget SIZE." if can_stream else f"{download}.",
        )
    output.note(f"{given.repo} is in the hub's cache: {folder}")
    return folder
