"""Where quantize takes statistics from: a file of `glm4moe calibrate`, or a calibration on the way."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from converters.errors import UsageError
from converters.quant.choice import QuantizeOptions
from converters.quant.rounded import Rounded, rounded_folder
from converters.quant.stats import CalibrationStats
from glm4moe_cli._options import count_option
from glm4moe_cli._output import Output
from runtime.calibrate.options import DEFAULT_CONTEXT_LENGTH, DEFAULT_NUM_TOKENS, CalibrateOptions


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line says about statistics: a file, or texts to calibrate on."""

    stats: Path | None
    texts: tuple[Path, ...]
    num_tokens: int | None
    context_length: int | None

    def __post_init__(self) -> None:
        """Refuse both at once, and options of a calibration that is not asked for."""
        if self.stats and self.texts:
            raise UsageError("--calibrate", expected="no --stats beside it", found="both")
        for name, value in (("--num-tokens", self.num_tokens), ("--context-length", self.context_length)):
            if value is not None and not self.texts:
                raise UsageError(name, expected="--calibrate TEXT beside it", found="none")

    def check_used(self, is_needed: bool) -> None:
        """Refuse statistics that nothing would be taken from."""
        if not is_needed and (self.stats or self.texts):
            raise UsageError(
                "--stats" if self.stats else "--calibrate",
                expected="a scheme with calibrated scales, --kv-cache, or --method gptq",
                found="none of them",
            )


def statistics_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --stats, --calibrate, --num-tokens and --context-length to a command and pass them as `wanted: Wanted`."""

    @functools.wraps(function)
    def command(
        *args: Any,
        stats: Path | None,
        calibrate: tuple[Path, ...],
        num_tokens: int | None,
        context_length: int | None,
        **options: Any,
    ) -> Any:
        return function(*args, wanted=Wanted(stats, calibrate, num_tokens, context_length), **options)

    file = click.Path(exists=True, dir_okay=False, path_type=Path)
    from_file = click.option("--stats", type=file, metavar="FILE", help="What 'glm4moe calibrate SRC FILE' wrote.")
    from_text = click.option(
        "--calibrate",
        type=file,
        multiple=True,
        metavar="TEXT",
        help="Calibrate on this text first and keep the statistics beside DST; may be given several times.",
    )
    number = count_option("--num-tokens", "Tokens to calibrate on.", low=2, shown=DEFAULT_NUM_TOKENS)
    length = count_option(
        "--context-length", "Tokens of one window of the calibration.", low=2, shown=DEFAULT_CONTEXT_LENGTH
    )
    return from_file(from_text(number(length(command))))


def statistics(
    output: Output,
    wanted: Wanted,
    src: Path,
    dst: Path,
    *,
    dry_run: bool,
    restart: bool = False,
    rounding: QuantizeOptions | None = None,
) -> CalibrationStats | None:
    """Return the statistics that are given, or made now and saved beside DST, or lie there from an earlier run.

    A calibration that was cut off is gone on with.

    Args:
        output: takes notes and progress.
        wanted: what the command line says.
        src: the checkpoint.
        dst: the result, whose name the file has.
        dry_run: measure nothing.
        restart: begin a calibration anew that was cut off.
        rounding: weights are rounded on the way, as these options store them.
    Raises:
        UsageError: a dry run that would have to calibrate.
    """
    if wanted.stats is not None:
        return CalibrationStats.load(wanted.stats)
    if not wanted.texts:
        return None
    from runtime.calibrate.kept import calibrate_into, remove_leftover
    from runtime.calibrate.run import Rounding, planned

    path = _place(wanted, dst)
    options = CalibrateOptions(
        num_tokens=wanted.num_tokens or DEFAULT_NUM_TOKENS,
        context_length=wanted.context_length or DEFAULT_CONTEXT_LENGTH,
        scratch=path.parent,
    )
    how = Rounding(rounding, rounded_folder(path)) if rounding else None
    with planned(src, wanted.texts, options, how) as job:
        found = CalibrationStats.load(path) if path.exists() else None
        if found is not None and found.provenance == job.provenance and not job.has_lost_rounded:
            if not dry_run:
                remove_leftover(path)
            return found
        if found is not None and found.provenance != job.provenance:
            raise UsageError(
                f"--calibrate: {path}",
                expected="no file, or the statistics of these texts and options",
                found="other statistics",
                next_step="Give it to --stats, or remove it.",
            )
        if dry_run:
            raise UsageError(
                "--calibrate",
                expected="--stats FILE for a dry run: the plan has the scales in it",
                found="texts that are not measured yet",
                next_step=f"Run 'glm4moe calibrate {src} {path} --text ...' first.",
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with output.progress("calibrate", job.read_bytes) as progress:
            stats = calibrate_into(job, path, output.note, restart=restart, progress=progress)
    output.note(f"statistics in {path}")
    return stats


def rounded_weights(wanted: Wanted, stats: CalibrationStats | None, dst: Path) -> Rounded:
    """Return the weights that GPTQ rounded when these statistics were made, every byte proved.

    Raises:
        UsageError: there are no statistics, none were rounded then, or the folder is another calibration's.
        InputError: a file is not what was written.
    """
    if stats is None:
        raise UsageError(
            "--method gptq",
            expected="--calibrate TEXT, or --stats FILE of 'glm4moe calibrate --method gptq'",
            found="neither",
            next_step="GPTQ chooses codes by what they do to a text.",
        )
    path = _place(wanted, dst)
    found = Rounded.load(rounded_folder(path))
    if found.provenance != stats.provenance:
        raise UsageError(
            f"rounded weights {found.folder}", expected=f"those of {path}", found="those of another calibration"
        )
    found.prove()
    return found


def _place(wanted: Wanted, dst: Path) -> Path:
    return wanted.stats or dst.absolute().parent / f"{dst.name}.stats.json"
