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
    """What the command line says about source and destination."""

    src: Path | HubId
    dst: Path
    disk_budget: int | None
    dry_run: bool


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
        with open_source(src if isinstance(src, Path) else _cached(output, src)) as source:
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


def _cached(output: Output, src: HubId) -> Path:
    """Return the folder of a hub id in the hub's cache."""
    from converters.download import cached_folder

    folder = cached_folder(src)
    if folder is None:
        raise UsageError(
            f"SRC {src.repo}",
            expected="a folder, a checkpoint that is whole in the hub's cache, or --disk-budget beside a hub id",
            found="no such folder, nothing whole in the cache, and no --disk-budget",
            next_step=f"Run 'glm4moe download {src.repo} FOLDER' first, or add --disk-budget SIZE.",
        )
    output.note(f"{src.repo} is in the hub's cache: {folder}")
    return folder
