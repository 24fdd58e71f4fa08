"""Which levels verify runs, which options belong to which, and the levels that need no model."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from converters.errors import UsageError
from glm4moe_cli._output import Output

if TYPE_CHECKING:
    from converters.contents import ContentsReport
    from converters.quant.certificate import Certificate

STRUCTURE, BYTES, WEIGHTS, LOGITS, ALL = LEVELS = ("structure", "bytes", "weights", "logits", "all")
_WITHOUT_TEXT = (STRUCTURE, BYTES, WEIGHTS)
_LOGITS_ONLY = (
    "text",
    "num_tokens",
    "context_length",
    "stride",
    "seed",
    "activations",
    "max_kl",
    "min_top1",
    "max_ppl_ratio",
    "device",
)
# options that only some levels heed, by parameter name
_HEEDED = {
    **dict.fromkeys(_LOGITS_ONLY, (LOGITS,)),
    "report": (WEIGHTS,),
    "max_memory": (WEIGHTS,),
    "workers": (BYTES, WEIGHTS),
}


def chosen_levels(level: str | None, *, has_text: bool) -> tuple[str, ...]:
    """Return the levels to run: those asked for; else all, as far as there is a text to run models on."""
    if level is None:
        return (*_WITHOUT_TEXT, LOGITS) if has_text else _WITHOUT_TEXT
    return (*_WITHOUT_TEXT, LOGITS) if level == ALL else (level,)


def check_options(ctx: click.Context, levels: tuple[str, ...]) -> None:
    """Refuse options that the levels would silently ignore, and logits without a text.

    Raises:
        UsageError: with the option's name.
    """
    if LOGITS in levels and ctx.params["text"] is None:
        raise UsageError(
            f"--level {ctx.params['level']}",
            expected="--text FILE to run both models on",
            found="none",
            next_step="A UTF-8 text of a few thousand words of the kind the model will see is best.",
        )
    for parameter in ctx.command.params:
        heeded = _HEEDED.get(str(parameter.name), levels)
        given = ctx.get_parameter_source(str(parameter.name)) is not ParameterSource.DEFAULT
        if given and not set(heeded) & set(levels):
            found = f"--level {ctx.params['level']}" if ctx.params["level"] else "no --text, and so no logits"
            raise UsageError(
                parameter.opts[0],
                expected=f"--level {' or '.join((*heeded, ALL))}",
                found=found,
                next_step="It would be ignored.",
            )


@dataclass(frozen=True, slots=True)
class Resources:
    """Threads, and the bytes that blocks in flight may take."""

    workers: int
    max_memory: int


def check_bytes(output: Output, candidate: Path, resources: Resources, *, is_asked_for: bool) -> "ContentsReport":
    """Hash the candidate's files.

    Raises:
        UsageError: there is nothing to hold them against, though that was asked for by name.
    """
    from converters.contents import check_contents, find_record

    if is_asked_for and not find_record(candidate):
        raise UsageError(
            "--level bytes",
            expected="a manifest or the listing of a download in CKPT, with digests",
            found="none",
            next_step="Compare the weights with those of the source: --level weights.",
        )
    return _with_progress(output, "bytes", lambda on_start: check_contents(candidate, resources.workers, on_start))


def check_weights(output: Output, folders: tuple[Path, Path], resources: Resources) -> "Certificate":
    """Compare all weights with those of the source."""
    from converters.quant.certify import CertifyOptions, certify_folders

    options = CertifyOptions(resources.workers, resources.max_memory)
    return _with_progress(output, "weights", lambda on_start: certify_folders(*folders, options, on_start))


def _with_progress(output: Output, step: str, act: Callable[[Callable[[int], Callable[[int], None]]], Any]) -> Any:
    """Run something that says in the middle how many bytes it will read."""
    with ExitStack() as stack:
        return act(lambda total: stack.enter_context(output.progress(step, total)).advance)
