"""Which levels verify runs, which options belong to which, and the levels that need no model."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from converters.errors import UsageError
from converters.pipeline import DEFAULT_MAX_MEMORY
from glm4moe_cli._output import Output

if TYPE_CHECKING:
    from converters.contents import ContentsReport
    from converters.quant.certificate import Certificate

LEVELS = ("structure", "bytes", "weights", "layers", "logits", "text", "runtime")
STRUCTURE, BYTES, WEIGHTS, LAYERS, LOGITS, TEXT, RUNTIME = LEVELS
ALL, QUICK, STANDARD, FULL, RELEASE = "all", "quick", "standard", "full", "release"
_GROUPS = {
    QUICK: (STRUCTURE, BYTES),
    STANDARD: (STRUCTURE, BYTES, WEIGHTS),
    FULL: (STRUCTURE, BYTES, WEIGHTS, LAYERS, LOGITS),
    RELEASE: LEVELS,
}
CHOICES = (*LEVELS, ALL, *_GROUPS)
# levels that run the models over tokens of the user's choice
_OVER_TOKENS = (LAYERS, LOGITS, RUNTIME)
_MODELS = (LAYERS, LOGITS)
# options that only some levels heed, by parameter name
_HEEDED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("text", "tokens", "num_tokens", "context_length", "stride", "seed"), _OVER_TOKENS),
    **dict.fromkeys(("activations", "deterministic"), _OVER_TOKENS),
    **dict.fromkeys(("save_reference", "save_head", "save_inputs"), _OVER_TOKENS),
    **dict.fromkeys(("max_kl", "min_top1", "max_ppl_ratio"), (LOGITS,)),
    **dict.fromkeys(("floor", "reference"), _MODELS),
    "max_layer_error": (LAYERS,),
    "engine_logprobs": (RUNTIME,),
    "device": (*_OVER_TOKENS, TEXT),
    "workers": (BYTES, WEIGHTS, *_OVER_TOKENS),
    "max_memory": (WEIGHTS, *_OVER_TOKENS),
}
_WITHOUT_SOURCE = (BYTES, RUNTIME)
# beside a stored reference nothing of the source is there to run
_NOT_BESIDE_REFERENCE = ("text", "tokens", "num_tokens", "context_length", "stride")


def chosen_levels(options: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the levels to run: those asked for; else as many as the options name tokens, an engine or a source for.

    Raises:
        UsageError: a level needs what is not given.
    """
    level, has_source = options["level"], options["source"] is not None
    if level is None:
        chosen = _default_levels(options)
    elif level == ALL:
        chosen = tuple(name for name in LEVELS if name != RUNTIME or options["engine_logprobs"])
    else:
        chosen = _GROUPS.get(level, (level,))
    if RUNTIME in chosen and not options["engine_logprobs"]:
        raise UsageError(
            f"--level {level}", expected="--engine-logprobs FILE|URL beside it, of an engine serving CKPT", found="none"
        )
    if not chosen and options["save_reference"] is None:
        raise UsageError("--against", expected="SRC, which CKPT was made from, or --reference FILE", found="neither")
    enough = (*_WITHOUT_SOURCE, *(_MODELS if options["reference"] is not None else ()))
    lacking = None if has_source else next((name for name in chosen if name not in enough), None)
    if lacking is not None:
        raise UsageError("--against", expected=f"SRC, which the level {lacking} compares with", found="none")
    return chosen


def _default_levels(options: Mapping[str, Any]) -> tuple[str, ...]:
    chosen: tuple[str, ...] = _GROUPS[STANDARD] if options["source"] is not None else ()
    if options["reference"] is not None:
        chosen += (LOGITS,)
    elif options["text"] is not None or options["tokens"] is not None:
        chosen += _MODELS if options["source"] is not None else ()
    if options["engine_logprobs"]:
        chosen += (RUNTIME,)
    return chosen


def check_options(ctx: click.Context, levels: tuple[str, ...]) -> None:
    """Refuse options that the levels would silently ignore, and pairs that contradict each other.

    Raises:
        UsageError: with the option's name.
    """
    options = ctx.params
    if options["text"] is not None and options["tokens"] is not None:
        raise UsageError("--tokens", expected="no --text beside it", found="both")
    for name in ("save_head", "save_inputs"):
        if options[name] and options["save_reference"] is None:
            raise UsageError(spelled(ctx, name), expected="--save-reference FILE beside it", found="none")
    for name in _given(ctx):
        if options["reference"] is not None and name in _NOT_BESIDE_REFERENCE:
            raise UsageError(spelled(ctx, name), expected="no --reference beside it, which has its own", found="both")
        if options["reference"] is not None and name == "floor":
            raise UsageError(spelled(ctx, name), expected="no --reference beside it, which has no floor", found="both")
        heeded = _HEEDED.get(name, levels)
        if levels and not set(heeded) & set(levels):
            alone = "no --text, and so no logits" if options["reference"] is None else "--reference alone: logits"
            where = f"--level {options['level']}" if options["level"] else alone
            raise UsageError(
                spelled(ctx, name),
                expected=f"--level {' or '.join((*heeded, ALL))}",
                found=where,
                next_step="It would be ignored.",
            )


# what saving a reference heeds, where nothing is compared
_SAVING = frozenset(
    "text tokens num_tokens context_length stride seed activations deterministic save_reference save_head save_inputs "
    "device workers max_memory checkpoint source json quiet".split()
)


def check_saving_options(ctx: click.Context) -> None:
    """Refuse options that saving a reference alone would ignore.

    Raises:
        UsageError: with the option's name.
    """
    for name in _given(ctx):
        if name not in _SAVING:
            raise UsageError(
                spelled(ctx, name), expected="--against SRC, to compare with", found="none", next_step="It is ignored."
            )
    if ctx.params["text"] is not None and ctx.params["tokens"] is not None:
        raise UsageError("--tokens", expected="no --text beside it", found="both")


def _given(ctx: click.Context) -> list[str]:
    """Return the names of the parameters that stand on the command line."""
    names = (str(parameter.name) for parameter in ctx.command.params)
    return [name for name in names if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT]


def spelled(ctx: click.Context, name: str) -> str:
    """Return a parameter as users type it; of a pair such as --floor and --no-floor the one that was chosen."""
    parameter = next(parameter for parameter in ctx.command.params if parameter.name == name)
    names = parameter.secondary_opts if ctx.params[name] is False else parameter.opts
    return (names or parameter.opts)[0]


@dataclass(frozen=True, slots=True)
class Resources:
    """Threads, and the bytes that blocks in flight may take; None for the default of the level."""

    workers: int
    max_memory: int | None


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

    options = CertifyOptions(resources.workers, resources.max_memory or DEFAULT_MAX_MEMORY)
    return _with_progress(output, "weights", lambda on_start: certify_folders(*folders, options, on_start))


def _with_progress(output: Output, step: str, act: Callable[[Callable[[int], Callable[[int], None]]], Any]) -> Any:
    """Run something that says in the middle how many bytes it will read."""
    with ExitStack() as stack:
        return act(lambda total: stack.enter_context(output.progress(step, total)).advance)
