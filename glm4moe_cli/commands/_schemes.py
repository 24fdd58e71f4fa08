"""Options that say which weights are quantized, and to what: what quantize does, and what calibrate prepares."""

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import click

from converters.quant.choice import QuantizeOptions
from converters.quant.scheme import (
    DEFAULT_SEARCH,
    GROUP_SIZES,
    KV_CACHE_DTYPES,
    ROLES,
    SCHEMES,
    Arithmetic,
    Format,
    MtpPolicy,
    Preset,
    ScaleSearch,
)

RTN, GPTQ = "rtn", "gptq"
_Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def _enum_option(name: str, kind: type[StrEnum], parameter: str, **more: Any) -> _Decorator:
    return click.option(name, parameter, type=click.Choice([value.value for value in kind]), **more)


def _scheme_option(required: bool) -> _Decorator:
    return click.option(
        "--scheme",
        metavar="SCHEME|ROLE=SCHEME,...",
        required=required,
        help=f"One of {', '.join(SCHEMES)}; or several by role, such as experts=nvfp4,attention=fp8: roles are "
        f"{', '.join(ROLES)}, and those not named stay as they are.",
    )


_format_option = _enum_option(
    "--format",
    Format,
    "format_",
    default=Format.COMPRESSED_TENSORS.value,
    show_default=True,
    help="Whose names and config: compressed-tensors for vLLM and SGLang, modelopt for TensorRT-LLM.",
)
_group_size_option = click.option(
    "--group-size",
    type=click.Choice(list(GROUP_SIZES)),
    show_default="channel",
    help="Columns that share a scale, for int8-weight-only.",
)
_preset_option = _enum_option(
    "--preset", Preset, "preset", show_default="all-linear", help="Weights that the one scheme is applied to."
)
_ignore_option = click.option(
    "--ignore",
    multiple=True,
    metavar="REGEX",
    help="Leave modules out whose whole name matches; may be given several times.",
)
_mtp_option = _enum_option(
    "--mtp",
    MtpPolicy,
    "mtp",
    show_default="quantize with one 8-bit scheme that needs no calibration, keep else and as modelopt",
    help="What becomes of the MTP layer; its input projection, embedding and head are never quantized.",
)
_kv_cache_option = click.option(
    "--kv-cache",
    type=click.Choice(KV_CACHE_DTYPES),
    help="Write calibrated scales of the KV cache, for all layers but the MTP layer.",
)
_arithmetic_option = _enum_option(
    "--arithmetic",
    Arithmetic,
    "arithmetic",
    show_default="float32, or modelopt in that format",
    help="float32 has the lower error; compressed-tensors gives that library's bytes.",
)
_search_option = _enum_option(
    "--scale-search",
    ScaleSearch,
    "search",
    show_default=f"{DEFAULT_SEARCH}, unless another's bytes are asked for",
    help="Local scales of NVFP4: from the largest magnitude, or by the least squared error.",
)


SCHEME_OPTIONS = frozenset(
    ("--scheme", "--format", "--group-size", "--preset", "--ignore", "--mtp", "--arithmetic", "--scale-search")
)


def scheme_options(*, required: bool = True, kv_cache: bool = False) -> _Decorator:
    """Return what adds these options to a command; `quantize_options` reads them.

    Args:
        required: a scheme must be given.
        kv_cache: add --kv-cache too.
    """
    first = (_scheme_option(required), _format_option, _group_size_option, _preset_option, _ignore_option, _mtp_option)
    cache = (_kv_cache_option,) if kv_cache else ()
    options: tuple[_Decorator, ...] = (*first, *cache, _arithmetic_option, _search_option)

    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return add


def quantize_options(given: dict[str, Any]) -> QuantizeOptions:
    """Return the options of a quantization from what the command line has."""

    def chosen(kind: type[StrEnum], name: str) -> Any:
        return None if given[name] is None else kind(given[name])

    limit = {"max_shard_bytes": given["max_shard_size"]} if "max_shard_size" in given else {}
    return QuantizeOptions(
        scheme=given["scheme"],
        format=Format(given["format_"]),
        arithmetic=chosen(Arithmetic, "arithmetic"),
        search=chosen(ScaleSearch, "search"),
        group_size=given["group_size"],
        preset=chosen(Preset, "preset"),
        mtp=chosen(MtpPolicy, "mtp"),
        ignore=given["ignore"],
        kv_cache=given.get("kv_cache"),
        **limit,
    )
