"""The options of convert and quantize that say how a job is run, not what it is."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from converters.job import JobOptions
from converters.pipeline import RunOptions
from glm4moe_cli._options import (
    disk_budget_option,
    dry_run_option,
    job_options,
    max_memory_option,
    max_shard_size_option,
    workers_option,
)


@dataclass(frozen=True, slots=True)
class Running:
    """How a job is run: what it may take, which part of it, and whether at all."""

    options: RunOptions
    how: JobOptions
    disk_budget: int | None
    dry_run: bool


def running_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add them to a command, --max-shard-size first, which stays as it is; pass the others as `running: Running`."""

    @functools.wraps(function)
    def command(
        *args: Any,
        disk_budget: int | None,
        dry_run: bool,
        how: JobOptions,
        workers: int,
        max_memory: int,
        **options: Any,
    ) -> Any:
        running = Running(RunOptions(workers, max_memory), how, disk_budget, dry_run)
        return function(*args, running=running, **options)

    own = job_options(workers_option(max_memory_option(command)))
    return max_shard_size_option(disk_budget_option(dry_run_option(own)))
