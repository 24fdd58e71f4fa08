"""Which released model a checkpoint is, or is derived from.

The table holds what the official configs say, as published; sizes of tensors follow from it through the schema.
GLM-4.5 and GLM-4.7 have identical shapes: the context length and the way the MTP layer is shipped tell them apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.checkpoint.index import MTP_FILE
from converters.config import Glm4MoeConfig

_SHARED = {
    "vocab_size": 151552,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
}
_LARGE = {
    **_SHARED,
    "hidden_size": 5120,
    "num_hidden_layers": 92,
    "first_k_dense_replace": 3,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "n_routed_experts": 160,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
}
_AIR = {
    **_SHARED,
    "hidden_size": 4096,
    "num_hidden_layers": 46,
    "first_k_dense_replace": 1,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
}
# context length of the 4.5 generation, and of the one after it
_CONTEXT_45, _CONTEXT_46 = 131072, 202752
FAMILIES: dict[str, Mapping[str, Any]] = {"GLM-4.5-Air": _AIR, "GLM-4.5": _LARGE}
# a model that shares these with a released one is derived from it, whatever else was pruned or changed
_IDENTITY = ("hidden_size", "num_attention_heads", "head_dim", "moe_intermediate_size")
UNKNOWN = "custom"


@dataclass(frozen=True, slots=True)
class MtpFacts:
    """How the MTP layer is shipped. `own_file`: its tensors are all in mtp.safetensors."""

    layer: int | None
    copies: bool
    own_file: bool
    tensors: int
    bytes: int

    @property
    def style(self) -> str:
        """What there is, in words."""
        if self.layer is None:
            return "none"
        parts = "with its own embedding and head" if self.copies else "without embedding and head"
        return f"layer {self.layer}, {parts}, in {MTP_FILE if self.own_file else 'the main files'}"


@dataclass(frozen=True, slots=True)
class Variant:
    """The released model, what it was recognised by, and where a derivative differs from it."""

    name: str
    base: str
    evidence: tuple[str, ...]
    differences: tuple[str, ...]


def detect_variant(config: Glm4MoeConfig, mtp: MtpFacts, *, has_correction_bias: bool) -> Variant:
    """Return which released model this is; one that differs in shape or lacks a part is a derivative of it."""
    for family, fields in FAMILIES.items():
        if all(getattr(config, name) == fields[name] for name in _IDENTITY):
            base, evidence = _release(family, config, mtp)
            differences = _differences(config, fields, mtp, has_correction_bias)
            name = f"derivative of {base}" if differences else base
            return Variant(name, base, (_sizes(config), *evidence), differences)
    return Variant(UNKNOWN, "", (f"{_sizes(config)}: no released GLM-4 MoE model has these sizes",), ())


def _sizes(config: Glm4MoeConfig) -> str:
    return f"hidden_size {config.hidden_size}, {config.num_hidden_layers} layers, {config.n_routed_experts} experts"


def _release(family: str, config: Glm4MoeConfig, mtp: MtpFacts) -> tuple[str, tuple[str, ...]]:
    context = f"max_position_embeddings {config.max_position_embeddings}"
    if family != "GLM-4.5":
        return family, (context,)
    if config.max_position_embeddings == _CONTEXT_45:
        return family, (f"{context}: 4.6 and 4.7 have {_CONTEXT_46}",)
    if config.max_position_embeddings != _CONTEXT_46:
        return "GLM-4.5, 4.6 or 4.7", (f"{context}: none of them",)
    long_context = f"{context}: 4.5 has {_CONTEXT_45}"
    if mtp.layer is None:
        return "GLM-4.6 or 4.7", (long_context, "no MTP layer to tell them apart")
    if not mtp.copies:
        return "GLM-4.6", (long_context, "MTP layer without embedding and head: 4.7 has both")
    where = f", in {MTP_FILE} as published" if mtp.own_file else ""
    return "GLM-4.7", (long_context, f"MTP layer with its own embedding and head{where}: 4.6 has neither")


def _differences(
    config: Glm4MoeConfig, fields: Mapping[str, Any], mtp: MtpFacts, has_correction_bias: bool
) -> tuple[str, ...]:
    found = [
        f"{name} {getattr(config, name)} instead of {value}"
        for name, value in fields.items()
        if getattr(config, name) != value
    ]
    if mtp.layer is None:
        found.append("no MTP layer")
    if not has_correction_bias:
        found.append("no correction bias")
    return tuple(found)
