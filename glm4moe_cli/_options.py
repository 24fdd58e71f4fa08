"""Options and parameter types that commands share, so that one thing has one name everywhere."""

import functools
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from converters.checkpoint.content_digest import Algorithm
from converters.checkpoint.packing import DEFAULT_MAX_SHARD_BYTES
from converters.errors import UsageError
from converters.job import JobOptions
from converters.parts import Part
from converters.pipeline import DEFAULT_MAX_MEMORY
from converters.remote import HubId
from glm4moe_cli._output import Output

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,12})?) ?([kmgt]i?b|b)?", re.IGNORECASE | re.ASCII)
_POWERS = {"b": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_MAX_BYTES = 1 << 63


class ByteSize(click.ParamType[int]):
    """A number of bytes: 5GB and 20MB are decimal, 512MiB is binary, 1000000 is bytes.

    5G is refused: half of the tools that take it mean 5GB, the others 5GiB.
    """

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Return the bytes; a value that is a number already stays as it is, as click asks of every type."""
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        num_bytes = Fraction(match[1]) * _unit(match[2] or "b") if match else Fraction(0)
        if not 0 < num_bytes < _MAX_BYTES or num_bytes.denominator != 1:
            self.fail(f"{value!r} is not a size such as 5GB, 512MiB or 1000000 (bytes)", param, ctx)
        return int(num_bytes)


def _unit(spelling: str) -> int:
    return int((1024 if "i" in spelling.lower() else 1000) ** _POWERS[spelling[0].lower()])


def spell_size(num_bytes: int) -> str:
    """Return a spelling in the largest whole unit, which ByteSize reads back to the same number."""
    for unit in ("TB", "TiB", "GB", "GiB", "MB", "MiB", "kB", "KiB"):
        if num_bytes % _unit(unit) == 0:
            return f"{num_bytes // _unit(unit)}{unit}"
    return str(num_bytes)


def _size_option(name: str, default: int, help_text: str) -> _Decorator:
    shown = spell_size(default)
    return click.option(name, type=ByteSize(), metavar="SIZE", default=shown, show_default=True, help=help_text)


def _set_output(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    """Tell the Output, as soon as it is known, how to speak."""
    setattr(ctx.ensure_object(Output), "as_json" if param.name == "json" else "quiet", value)


class PathName(click.Path):
    """A path; an empty one, which a variable that is not set leaves behind, is not taken for the current folder."""

    def __init__(self, *, exists: bool = False, file_okay: bool = True, dir_okay: bool = True) -> None:
        super().__init__(exists=exists, file_okay=file_okay, dir_okay=dir_okay, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; see `click.Path` for what else is refused."""
        refuse_empty(value, param, ctx)
        return super().convert(value, param, ctx)


class NewFolder(PathName):
    """A folder to be written, which may not exist yet; not one of what the kernel shows as files: none can be made."""

    # what is mounted for the kernel's own objects, /proc and /sys first of all
    _NO_FOLDERS = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "devpts", "securityfs", "debugfs", "tracefs", "bpf"})

    def __init__(self) -> None:
        super().__init__(file_okay=False)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path."""
        from converters.doctor.storage import file_system

        path = super().convert(value, param, ctx)
        above = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
        kind = file_system(above)
        if kind in self._NO_FOLDERS:
            raise UsageError(
                f"DST {path}",
                expected="a folder on a disk",
                found=f"a file system of type {kind}, in which none can be made",
                next_step="Choose another folder.",
            )
        return path


class TextName(click.ParamType[str]):
    """A name that is not empty: of a repository, or of what may be a folder or one."""

    name = "name"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Return it as it is."""
        refuse_empty(value, param, ctx)
        return str(value)


def refuse_empty(value: Any, param: click.Parameter | None, ctx: click.Context | None) -> None:
    """Refuse an empty word where a name is expected."""
    if isinstance(value, str) and not value:
        raise click.BadParameter("expected a name, found an empty word. Is a variable not set?", ctx, param)


_folder = PathName(exists=True, file_okay=False)


class SourceName(click.ParamType[Path | HubId]):
    """A folder, or a hub id where no folder or file has that name."""

    name = "source"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path | HubId:
        """Return the folder or the hub id; a value that is one already stays as it is, as click asks of every type."""
        if isinstance(value, Path | HubId):
            return value
        refuse_empty(value, param, ctx)
        hub_id = None if os.path.lexists(value) else HubId.parse(value)
        return hub_id or Path(_folder.convert(value, param, ctx))


src_argument = click.argument("src", metavar="SRC", type=SourceName())
dst_argument = click.argument("dst", metavar="DST", type=NewFolder())
checkpoint_argument = click.argument("checkpoint", metavar="CKPT", type=_folder)


def count_option(
    name: str, help_text: str, *, low: int, default: int | None = None, shown: int | None = None
) -> _Decorator:
    """Return an option that takes a number from `low` on; `shown` is what holds where it has no default."""
    return click.option(
        name,
        type=click.IntRange(min=low),
        metavar="N",
        default=default,
        show_default=True if shown is None else str(shown),
        help=help_text,
    )


dry_run_option = click.option("--dry-run", is_flag=True, help="Show the plan and write nothing.")
workers_option = click.option(
    "--workers",
    type=click.IntRange(min=1),
    metavar="N",
    default=lambda: len(os.sched_getaffinity(0)),
    show_default="one per core",
    help="Threads that work at once.",
)
max_memory_option = _size_option(
    "--max-memory", DEFAULT_MAX_MEMORY, "Most memory that tensors in flight may take together."
)
disk_budget_option = click.option(
    "--disk-budget",
    type=ByteSize(),
    metavar="SIZE",
    help="SRC is a hub id: fetch its files as they are needed, remove them as they are done, hold at most so much.",
)
max_shard_size_option = _size_option("--max-shard-size", DEFAULT_MAX_SHARD_BYTES, "Largest file to write.")
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute; auto takes a GPU if there is one.",
)


def digest_option(show_default: str) -> _Decorator:
    """Return the option for what the manifest knows tensors by; None, as described, unless it is given."""
    return click.option(
        "--digest",
        type=click.Choice([algorithm.value for algorithm in Algorithm]),
        callback=lambda _context, _option, value: Algorithm(value) if value else None,
        show_default=show_default,
        help="What the manifest knows each tensor by: 128 bits of XXH3, thirty times as fast as SHA-256.",
    )


_restart_option = click.option(
    "--restart", is_flag=True, help="Begin anew where an unfinished run of another or the same job stands in DST."
)
_update_option = click.option(
    "--update", is_flag=True, help="Redo a finished DST under these options; only what they change is made anew."
)
_part_option = click.option(
    "--part",
    metavar="i/n",
    show_default="as torchrun says, else all",
    help="Do every n-th shard, from the i-th; processes with the other parts write into the same DST.",
)
_finalize_option = click.option(
    "--finalize",
    is_flag=True,
    help="Write nothing but what comes last, after all parts; the last part does it itself.",
)


def job_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --restart, --update, --part and --finalize to a command and pass them as `how: JobOptions`."""

    @functools.wraps(function)
    def command(*args: Any, restart: bool, part: str | None, finalize: bool, update: bool, **options: Any) -> Any:
        own = _own_part(part, finalize=finalize)
        return function(*args, how=JobOptions(restart=restart, part=own, finalize=finalize, update=update), **options)

    return _restart_option(_update_option(_part_option(_finalize_option(command))))


def part_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --restart, --part and --finalize to a command whose result is not updated; pass them as `how: JobOptions`."""

    @functools.wraps(function)
    def command(*args: Any, restart: bool, part: str | None, finalize: bool, **options: Any) -> Any:
        own = _own_part(part, finalize=finalize)
        return function(*args, how=JobOptions(restart=restart, part=own, finalize=finalize), **options)

    return _restart_option(_part_option(_finalize_option(command)))


def _own_part(part: str | None, *, finalize: bool) -> Part | None:
    return Part.parse(part) if part else None if finalize else Part.from_environment(os.environ)


def output_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json and --quiet to a command and pass its Output as first argument; `main.run` finishes it."""
    quiet = click.option(
        "-q",
        "--quiet",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_output,
        help="Show data, warnings and errors only.",
    )
    as_json = click.option(
        "--json",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_set_output,
        help="Print one JSON document on stdout and nothing else there.",
    )
    return as_json(quiet(click.pass_obj(function)))
