"""Which weights are quantized, and to what. Everything is derived from the table of tensors, never typed.

The MTP layer. 8-bit schemes that need no calibration are applied to it like to the body, as the official FP8 releases
do: an engine that calls the layer by another name then needs no ignore list that knows it. With NVFP4, with scales from
calibration, with several schemes, and in ModelOpt's format it stays as it is unless asked for: it is 1 % of the model,
a draft layer that is off costs acceptance in every step, and SGLang reads the MTP layer of ModelOpt's NVFP4 as
unquantized whatever the config says.
Router, norms, biases, embeddings, heads and eh_proj are never quantized: engines build them unquantized, and would take
codes for weights.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from converters.errors import UsageError
from converters.quant.scheme import ROLES, ROLES_BY_PRESET, SCHEMES, Format, MtpPolicy, Preset, scheme_info
from converters.schema import DtypePolicy, ModelSchema, Role, Tensor

_FUSED_NEED = "vLLM and SGLang refuse to load such a checkpoint, TensorRT-LLM would leave all of them out"
_EXPERTS_NEED = "vLLM and SGLang choose one scheme for all experts of a layer, by the first; TensorRT-LLM has one too"


def is_quantized(tensor: Tensor) -> bool:
    """Return whether a scheme may apply to this tensor: to GEMM weights, in the MTP layer as in the body."""
    return tensor.spec.dtype is DtypePolicy.QUANTIZABLE


@dataclass(frozen=True, slots=True)
class Policy:
    """Which scheme each role gets, what becomes of the MTP layer, and patterns of modules that are left out."""

    schemes: Mapping[Role, str]
    mtp: MtpPolicy
    ignore: tuple[str, ...] = ()


def parse_schemes(text: str, preset: Preset | None) -> dict[Role, str]:
    """Return the scheme of each role: one for the roles of the preset, or `role=scheme` pairs as they stand.

    Raises:
        UsageError: an unknown scheme or role, a role twice, or pairs and a preset.
    """
    if "=" not in text:
        _check_scheme("--scheme", text)
        return dict.fromkeys(ROLES_BY_PRESET[preset or Preset.ALL_LINEAR], text)
    if preset is not None:
        raise UsageError("--preset", expected="one scheme for all roles", found=f"--scheme {text}, which names roles")
    found: dict[Role, str] = {}
    for pair in text.split(","):
        name, _, scheme = pair.partition("=")
        role = ROLES.get(name)
        if role is None or role in found:
            raise UsageError(
                f"--scheme {pair}", expected=f"role=scheme, each role once: {', '.join(ROLES)}", found=name or "no role"
            )
        _check_scheme(f"--scheme {name}", scheme)
        found[role] = scheme
    return found


def _check_scheme(subject: str, scheme: str) -> None:
    if scheme not in SCHEMES:
        raise UsageError(subject, expected=f"one of {', '.join(SCHEMES)}", found=scheme or "nothing")


def default_mtp(schemes: Iterable[str], format_: Format) -> MtpPolicy:
    """Return what becomes of the MTP layer where nothing is said; see the top of this module."""
    used = set(schemes)
    is_plain = len(used) == 1 and not any(scheme_info(scheme).has_tensor_scale for scheme in used)
    return MtpPolicy.QUANTIZE if is_plain and format_ is not Format.MODELOPT else MtpPolicy.KEEP


def assign(schema: ModelSchema, policy: Policy) -> dict[str, str]:
    """Return the scheme of every weight that is quantized, by the tensor's name, in checkpoint order.

    Raises:
        UsageError: a pattern is no regular expression, matches no module, or splits weights that engines take as one;
            nothing is left to quantize.
    """
    modules = {tensor.module for tensor in schema.tensors.values() if len(tensor.shape) == 2}
    ignored: set[str] = set()
    for entry in policy.ignore:
        pattern = _compiled(entry)
        matched = {module for module in modules if pattern.fullmatch(module)}
        if not matched:
            raise UsageError(
                f"--ignore {entry}",
                expected="a regular expression that matches whole names of modules",
                found="one that matches none",
                next_step=f"A module is called {_sample(schema).module}, for example.",
            )
        ignored |= matched
    found = {}
    for name, tensor in schema.tensors.items():
        if is_quantized(tensor) and tensor.module not in ignored and _is_wanted(tensor, schema, policy):
            found[name] = policy.schemes[tensor.spec.role]
    _check_whole(schema, found, "gets one scheme", fused_key, _FUSED_NEED)
    _check_whole(schema, found, "gets one scheme", expert_key, _EXPERTS_NEED)
    if not found:
        raise UsageError("--ignore", expected="something left to quantize", found="nothing")
    return found


def _is_wanted(tensor: Tensor, schema: ModelSchema, policy: Policy) -> bool:
    if tensor.spec.role not in policy.schemes:
        return False
    if tensor.layer != schema.mtp_layer or schema.mtp_layer is None:
        return True
    is_expert = tensor.spec.role is Role.EXPERT
    return policy.mtp is MtpPolicy.QUANTIZE or (policy.mtp is MtpPolicy.QUANTIZE_EXPERTS and is_expert)


def _compiled(entry: str) -> re.Pattern[str]:
    try:
        return re.compile(entry)
    except re.error as error:
        raise UsageError(f"--ignore {entry}", expected="a regular expression", found=str(error)) from error


def _sample(schema: ModelSchema) -> Tensor:
    return next(tensor for tensor in schema.tensors.values() if is_quantized(tensor))


def parent(tensor: Tensor) -> str:
    """Return the module that a weight's module is a part of; for an expert's, that of all experts of the layer."""
    return tensor.module.rsplit(".", 1 if tensor.expert is None else 2)[0]


def layer_module(tensor: Tensor) -> str:
    """Return the name of the layer that a tensor of a layer belongs to."""
    parts = tensor.module.split(".")
    return ".".join(parts[: parts.index(str(tensor.layer)) + 1])


def fused_key(tensor: Tensor) -> str | None:
    """Return what engines call the matrix that a weight is fused into; None if it stands alone."""
    if tensor.spec.fuse is None or not is_quantized(tensor):
        return None
    return f"{tensor.module.rpartition('.')[0]}.{tensor.spec.fuse.group}"


def expert_key(tensor: Tensor) -> str | None:
    """Return what engines call all experts of a layer; None for a weight that is no routed expert's."""
    return parent(tensor) if tensor.spec.role is Role.EXPERT else None


def _check_whole(
    schema: ModelSchema, found: Mapping[str, str], expected: str, key: Callable[[Tensor], str | None], need: str
) -> None:
    """Refuse a group of weights of which some are quantized and others are not."""
    first: dict[str, Tensor] = {}
    for tensor in schema.tensors.values():
        group = key(tensor)
        if group is None:
            continue
        other = first.setdefault(group, tensor)
        if found.get(other.name) != found.get(tensor.name):
            kept, left = (other, tensor) if other.name in found else (tensor, other)
            raise UsageError(
                f"--ignore: {group}",
                expected=f"a whole that {expected}",
                found=f"{left.module} left out and {kept.module} not",
                next_step=f"{need}. Leave out all of it or nothing.",
            )


def fused_groups(schema: ModelSchema, found: Mapping[str, str]) -> dict[str, tuple[Tensor, ...]]:
    """Return for every quantized weight those that engines multiply as one with it, itself included, in order."""
    groups: dict[str, list[Tensor]] = {}
    for name in found:
        tensor = schema.tensors[name]
        groups.setdefault(fused_key(tensor) or name, []).append(tensor)
    return {tensor.name: tuple(group) for group in groups.values() for tensor in group}
