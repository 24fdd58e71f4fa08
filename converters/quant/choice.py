"""What a quantization is to be: the options as they are given, and what they mean once defaults are filled in."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from converters.checkpoint.packing import DEFAULT_MAX_SHARD_BYTES
from converters.errors import UsageError
from converters.quant.policy import Policy, default_mtp, parse_schemes
from converters.quant.scheme import (
    ARITHMETICS_BY_FORMAT,
    DEFAULT_SEARCH,
    GROUP_SIZES,
    GROUPED_SCHEME,
    KV_CACHE_DTYPES,
    SCHEMES_BY_FORMAT,
    Arithmetic,
    Format,
    MtpPolicy,
    Preset,
    Recipe,
    ScaleSearch,
    scheme_info,
)
from converters.schema import ModelSchema, Role

if TYPE_CHECKING:
    from converters.quant.rounded import Rounded
    from converters.quant.stats import CalibrationStats

# parts of a job's identity that a calibration brings in
MEASURED = frozenset({"stats_sha256", "rounded_sha256"})


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What to quantize to; None leaves the choice to the format and the scheme.

    Attributes:
        scheme: one of SCHEMES, or `role=scheme` pairs, separated by commas; roles that are not named stay as they are.
        format: whose names, shapes and config.
        arithmetic: how scales and codes are computed.
        search: how NVFP4's local scales are chosen.
        group_size: a key of GROUP_SIZES, for int8-weight-only; None: the whole row.
        preset: roles that one scheme is applied to; None: all.
        mtp: what becomes of the MTP layer.
        ignore: regular expressions; modules whose whole name one matches stay as they are.
        kv_cache: dtype of the cache that scales are written for.
        stats: of calibration.
        rounded: weights that GPTQ rounded, to be copied.
        max_shard_bytes: largest file.
    """

    scheme: str
    format: Format = Format.COMPRESSED_TENSORS
    arithmetic: Arithmetic | None = None
    search: ScaleSearch | None = None
    group_size: str | None = None
    preset: Preset | None = None
    mtp: MtpPolicy | None = None
    ignore: tuple[str, ...] = ()
    kv_cache: str | None = None
    stats: "CalibrationStats | None" = None
    rounded: "Rounded | None" = None
    max_shard_bytes: int = DEFAULT_MAX_SHARD_BYTES

    def with_stats(self, stats: "CalibrationStats | None") -> "QuantizeOptions":
        """Return the same options with statistics of calibration."""
        return replace(self, stats=stats)


@dataclass(frozen=True, slots=True)
class Choice:
    """What the options mean.

    Attributes:
        roles: the scheme of each role.
        format: whose names and shapes.
        arithmetic: how scales and codes are computed.
        search: how local scales are chosen, in schemes that have them.
        group: columns that share a scale in int8-weight-only; 0: the row.
        mtp: what becomes of the MTP layer; None: there is none.
        ignore: patterns of modules that are left out.
        has_kv_scales: scales of the FP8 KV cache are written.
    """

    roles: dict[Role, str]
    format: Format
    arithmetic: Arithmetic
    search: ScaleSearch
    group: int
    mtp: MtpPolicy | None
    ignore: tuple[str, ...]
    has_kv_scales: bool

    @property
    def policy(self) -> Policy:
        """Which weights get which scheme."""
        return Policy(self.roles, self.mtp or MtpPolicy.KEEP, self.ignore)

    @property
    def needs_stats(self) -> bool:
        """Whether a scale is written that only calibration knows."""
        return self.has_kv_scales or any(scheme_info(scheme).has_input_scale for scheme in self.roles.values())

    def recipe(self, scheme: str) -> Recipe:
        """Return how weights of a scheme are stored."""
        group = self.group if scheme == GROUPED_SCHEME else 0
        search = self.search if scheme_info(scheme).is_searched else ScaleSearch.NONE
        return Recipe(scheme, self.format, self.arithmetic, search, group)

    def identity(self, options: QuantizeOptions) -> dict[str, Any]:
        """Return what makes a job another job, in values that JSON has, defaults filled in."""
        return {
            "scheme": {str(role): scheme for role, scheme in self.roles.items()},
            "format": str(self.format),
            "arithmetic": str(self.arithmetic),
            "scale_search": str(self.search),
            "group_size": self.group,
            "mtp": str(self.mtp or "none"),
            "ignore": list(self.ignore),
            "kv_cache": options.kv_cache if self.has_kv_scales else None,
            "stats_sha256": options.stats.sha256 if options.stats else None,
            **({"rounded_sha256": options.rounded.sha256} if options.rounded else {}),
            "max_shard_bytes": options.max_shard_bytes,
        }


def choose(schema: ModelSchema, options: QuantizeOptions) -> Choice:
    """Fill in defaults.

    Raises:
        UsageError: options that do not go together.
    """
    roles = parse_schemes(options.scheme, options.preset)
    schemes = dict.fromkeys(roles.values())
    _check_format(options.format, tuple(schemes))
    arithmetics = ARITHMETICS_BY_FORMAT[options.format]
    if options.arithmetic is not None and options.arithmetic not in arithmetics:
        raise UsageError(
            f"--arithmetic {options.arithmetic}",
            expected=f"{' or '.join(arithmetics)} for --format {options.format}",
            found=str(options.arithmetic),
        )
    arithmetic = options.arithmetic or arithmetics[0]
    if options.kv_cache is not None and (options.kv_cache not in KV_CACHE_DTYPES or options.format is Format.DEEPSEEK):
        raise UsageError(
            f"--kv-cache {options.kv_cache}",
            expected=f"{' or '.join(KV_CACHE_DTYPES)}, with --format compressed-tensors or modelopt",
            found=f"--format {options.format}",
        )
    choice = Choice(
        roles,
        options.format,
        arithmetic,
        _search(options, tuple(schemes)),
        _group(options, tuple(schemes)),
        _mtp(schema, options, roles),
        options.ignore,
        options.kv_cache is not None,
    )
    if options.stats is not None and not choice.needs_stats:
        raise UsageError(
            "--stats", expected="a scheme with calibrated scales, or --kv-cache", found=f"--scheme {options.scheme}"
        )
    return choice


def _check_format(format_: Format, schemes: tuple[str, ...]) -> None:
    known = SCHEMES_BY_FORMAT[format_]
    if len(schemes) > 1 and format_ is not Format.COMPRESSED_TENSORS:
        raise UsageError(
            f"--format {format_}",
            expected="one scheme for all roles",
            found=", ".join(schemes),
            next_step="Several schemes in one checkpoint are written as compressed-tensors; TensorRT-LLM, which the "
            "other formats are for, takes one scheme only.",
        )
    for scheme in schemes:
        if scheme not in known:
            able = [str(other) for other, names in SCHEMES_BY_FORMAT.items() if scheme in names]
            raise UsageError(
                f"--format {format_}",
                expected=f"one of its schemes: {', '.join(known)}",
                found=scheme,
                next_step=f"{scheme} exists as --format {' or '.join(able)}.",
            )


def _search(options: QuantizeOptions, schemes: tuple[str, ...]) -> ScaleSearch:
    is_searched = any(scheme_info(scheme).is_searched for scheme in schemes)
    if options.search is None:
        # who names another's arithmetic wants its bytes
        is_own = options.arithmetic in (None, Arithmetic.FLOAT32)
        return DEFAULT_SEARCH if is_searched and is_own else ScaleSearch.NONE
    if options.search is not ScaleSearch.NONE and not is_searched:
        raise UsageError(
            f"--scale-search {options.search}", expected="a scheme with local scales: nvfp4", found=options.scheme
        )
    return options.search


def _group(options: QuantizeOptions, schemes: tuple[str, ...]) -> int:
    if options.group_size is None:
        return 0
    if GROUPED_SCHEME not in schemes:
        raise UsageError(
            f"--group-size {options.group_size}", expected=f"--scheme {GROUPED_SCHEME}", found=options.scheme
        )
    if options.group_size not in GROUP_SIZES:
        raise UsageError("--group-size", expected=f"one of {', '.join(GROUP_SIZES)}", found=options.group_size)
    return GROUP_SIZES[options.group_size]


def _mtp(schema: ModelSchema, options: QuantizeOptions, roles: dict[Role, str]) -> MtpPolicy | None:
    if schema.mtp_layer is None:
        if options.mtp not in (None, MtpPolicy.KEEP):
            raise UsageError(f"--mtp {options.mtp}", expected="a source with an MTP layer", found="none in it")
        return None
    if options.mtp is MtpPolicy.QUANTIZE_EXPERTS and Role.EXPERT not in roles:
        raise UsageError(f"--mtp {options.mtp}", expected="a scheme for experts", found=options.scheme)
    return options.mtp or default_mtp(roles.values(), options.format)
