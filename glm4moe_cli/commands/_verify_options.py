"""The options of `glm4moe verify`, group by group."""

import functools
from collections.abc import Callable
from typing import Any

import click

from converters.formats.inputs import ACTIVATIONS, FULL
from converters.pipeline import DEFAULT_MAX_MEMORY as DEFAULT_BLOCK_MEMORY
from glm4moe_cli._options import ByteSize, PathName, device_option, spell_size, workers_option
from runtime.streaming.options import DEFAULT_MAX_MEMORY

_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]
_BY_KIND = "by kind of conversion"
_readable = PathName(exists=True, dir_okay=False)


def _all(*decorators: _Decorator) -> _Decorator:
    """Return one decorator that adds options in the order given."""

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        return functools.reduce(lambda made, decorate: decorate(made), reversed(decorators), function)

    return add


token_options = _all(
    click.option("--text", type=_readable, metavar="FILE", help="UTF-8 text to run both models on."),
    click.option(
        "--tokens",
        type=_readable,
        metavar="FILE",
        help="Token ids instead of a text: a list, or a list of lists with windows of their own, as .json or .npy; or "
        ".safetensors with token_ids.",
    ),
    click.option(
        "--num-tokens",
        type=click.IntRange(min=2),
        metavar="N",
        show_default="all; where layers are compared 512 on a CPU, 32768 on a GPU",
        help="Use this many tokens.",
    ),
    click.option(
        "--context-length",
        type=click.IntRange(min=2),
        metavar="N",
        show_default="512; where layers are compared 64 on a CPU, 1024 on a GPU",
        help="Tokens of one window.",
    ),
    click.option(
        "--stride",
        type=click.IntRange(min=1),
        metavar="N",
        show_default="context length",
        help="Tokens from one window to the next.",
    ),
    click.option(
        "--seed",
        type=click.IntRange(0, (1 << 32) - 1),
        metavar="N",
        default=0,
        show_default=True,
        help="Of the noise, of the bootstrap's draws, and of windows drawn from several texts.",
    ),
)
run_options = _all(
    click.option(
        "--activations",
        type=click.Choice(ACTIVATIONS),
        default=FULL,
        show_default=True,
        help="full: as they are, so that weights alone are compared. as-served: rounded before each quantized layer, "
        "as its config has engines do it.",
    ),
    click.option(
        "--floor/--no-floor",
        default=True,
        show_default=True,
        help="Measure what rounding alone would do, by noise of 2^-9 on the source, and hold the limits against it.",
    ),
    click.option(
        "--deterministic",
        is_flag=True,
        help="Compute window by window, as the model in memory does it bit for bit; slower.",
    ),
    device_option,
    workers_option,
    click.option(
        "--max-memory",
        type=ByteSize(),
        metavar="SIZE",
        show_default=f"{spell_size(DEFAULT_MAX_MEMORY)} to run models, {spell_size(DEFAULT_BLOCK_MEMORY)} for weights",
        help="Most memory for weights, hidden states and blocks in flight; hidden states beyond it go to a scratch "
        "file.",
    ),
)
limit_options = _all(
    click.option(
        "--max-kl",
        type=click.FloatRange(0.0),
        metavar="NATS",
        show_default=_BY_KIND,
        help="Fail above this mean KL per token, of the MTP layer's predictions too.",
    ),
    click.option(
        "--min-top1",
        type=click.FloatRange(0.0, 1.0),
        metavar="SHARE",
        show_default=_BY_KIND,
        help="Fail below this share of tokens with the same most likely next token.",
    ),
    click.option(
        "--max-ppl-ratio",
        type=click.FloatRange(0.0, min_open=True),
        metavar="RATIO",
        show_default=_BY_KIND,
        help="Fail above this perplexity, relative to the source's.",
    ),
    click.option(
        "--max-layer-error",
        type=click.FloatRange(0.0),
        metavar="SHARE",
        show_default=_BY_KIND,
        help="Fail above this relative error of any layer's attention, MLP or MoE output.",
    ),
    click.option("--strict", is_flag=True, help="Let warnings fail too."),
)
reference_options = _all(
    click.option(
        "--reference",
        type=_readable,
        metavar="FILE",
        help="Compare with what --save-reference kept: logits, or with --level layers the layers, if it kept them; SRC "
        "may be missing then.",
    ),
    click.option(
        "--save-reference",
        type=PathName(dir_okay=False),
        metavar="FILE",
        help="Keep what SRC makes of the tokens, 20 KiB a token at full size. Without SRC: what CKPT makes of them.",
    ),
    click.option(
        "--save-head",
        is_flag=True,
        help="Keep the head in that file too, for candidates whose own head is quantized.",
    ),
    click.option(
        "--save-inputs",
        is_flag=True,
        help="Keep what every layer is given and makes of it in that file too, 40 KiB a token and layer at full size, "
        "so that layers can be compared without SRC.",
    ),
    click.option(
        "--engine-logprobs",
        metavar="FILE|URL",
        help="Compare with what an engine that serves CKPT says: an OpenAI-compatible server, or its answers as lines "
        "of JSON.",
    ),
)
report_option = click.option(
    "--report",
    type=PathName(),
    metavar="FILE|DIR",
    help="Write a report: FILE.html, FILE.md or FILE.json; a folder gets all of them and tables of layers, experts, "
    "tensors and tokens.",
)
