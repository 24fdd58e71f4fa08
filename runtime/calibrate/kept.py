"""A calibration that is gone on with where it was cut off, into a file of statistics."""

from collections.abc import Callable
from pathlib import Path

from converters.checkpoint.writer import check_space, disk_errors, remove_partials
from converters.quant.stats import CalibrationStats
from runtime.calibrate.run import CalibrationJob, LayerDone, Progress
from runtime.calibrate.state import kept_state
from runtime.calibrate.state import remove_leftover as remove_leftover


def calibrate_into(
    job: CalibrationJob,
    stats: Path,
    tell: Callable[[str], None],
    *,
    restart: bool = False,
    progress: Progress | None = None,
    on_layer: Callable[[LayerDone], None] | None = None,
) -> CalibrationStats:
    """Run a job, save its statistics and return them; what is unfinished stays beside them until then.

    The same job again, after whatever ended it, goes on behind the last layer that it finished and gives the same
    bytes.

    Args:
        job: open.
        stats: the file, in a folder that exists; not there yet, or with the same statistics.
        tell: is told, in words, what becomes of what an earlier run left.
        restart: forget what that was.
        progress: told of bytes and layers.
        on_layer: told of each layer that has passed in this run.
    Raises:
        UsageError: an unfinished run of another job stands there. LockedError: another process is at it.
        ResourceError: the disk has no room. InputError: see `CalibrationJob.run`.
    """
    with kept_state(stats, job.identity, tell, restart=restart) as state:
        folder = stats.absolute().parent
        with disk_errors(stats):
            remove_partials(folder, {stats.name})
        if not state.is_begun:
            check_space(folder, job.state_bytes + job.memory.scratch_bytes)
        found = job.run(progress, on_layer, state)
        found.save(stats)
    return found
