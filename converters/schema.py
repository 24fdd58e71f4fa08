"""THE table of tensors: name, shape, role, layers, parallel dim, fuse group and dtype policy of every one.

`expand(config)` lists the tensors a checkpoint of that model has; `parse(name)` is its inverse. Every other part asks
this module; no tensor name stands anywhere else.

Source: the official GLM-4.5, 4.5-Air, 4.6 and 4.7 checkpoints. The MTP layer is the decoder layer with index
`num_hidden_layers`, always MoE; 4.5, Air and 4.7 give it private copies of embedding and head, 4.6 does not.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

from converters.config import Glm4MoeConfig
from converters.errors import InputError
from converters.tensors import DtypePolicy, Fuse, Layers, ParsedName, Role, Tensor, TensorSpec

__all__ = [
    "CACHE_SCALES",
    "COMPANIONS",
    "MTP_COPIES",
    "TABLE",
    "DtypePolicy",
    "ModelSchema",
    "ParsedName",
    "Role",
    "Tensor",
    "TensorSpec",
    "expand",
    "numbered",
    "parse",
    "parsed_name",
    "schema_for_parsed",
    "unknown_name",
]

_LAYER = "model.layers.{layer}."
_EXPERT = _LAYER + "mlp.experts.{expert}."
_Q = DtypePolicy.QUANTIZABLE
_QKV = tuple(Fuse("qkv_proj", position) for position in range(3))
_GATE, _UP = (Fuse("gate_up_proj", position) for position in range(2))


def _mlp(prefix: str, role: Role, layers: Layers, width: str) -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(prefix + "gate_proj.weight", (width, "hidden_size"), role, layers, 0, _GATE, _Q),
        TensorSpec(prefix + "up_proj.weight", (width, "hidden_size"), role, layers, 0, _UP, _Q),
        TensorSpec(prefix + "down_proj.weight", ("hidden_size", width), role, layers, 1, None, _Q),
    )


def _attention() -> tuple[TensorSpec, ...]:
    prefix, rows = _LAYER + "self_attn.", {"q": "q_size", "k": "kv_size", "v": "kv_size"}
    weights = tuple(
        TensorSpec(f"{prefix}{x}_proj.weight", (rows[x], "hidden_size"), Role.ATTENTION, Layers.ALL, 0, fuse, _Q)
        for x, fuse in zip("qkv", _QKV, strict=True)
    )
    biases = tuple(
        TensorSpec(
            f"{prefix}{x}_proj.bias", (rows[x],), Role.ATTENTION_BIAS, Layers.ALL, 0, fuse, when="attention_bias"
        )
        for x, fuse in zip("qkv", _QKV, strict=True)
    )
    norms = tuple(
        TensorSpec(f"{prefix}{x}_norm.weight", ("head_dim",), Role.QK_NORM, Layers.ALL, when="use_qk_norm")
        for x in "qk"
    )
    o_proj = TensorSpec(prefix + "o_proj.weight", ("hidden_size", "q_size"), Role.ATTENTION, Layers.ALL, 1, None, _Q)
    return (*weights, *biases, o_proj, *norms)


_H = ("hidden_size",)
_VOCAB = ("vocab_size", "hidden_size")
TABLE: tuple[TensorSpec, ...] = (
    TensorSpec("model.embed_tokens.weight", _VOCAB, Role.EMBEDDING, Layers.NONE, 0),
    TensorSpec("lm_head.weight", _VOCAB, Role.HEAD, Layers.NONE, 0),
    TensorSpec("model.norm.weight", _H, Role.NORM, Layers.NONE),
    TensorSpec(_LAYER + "input_layernorm.weight", _H, Role.NORM, Layers.ALL),
    *_attention(),
    TensorSpec(_LAYER + "post_attention_layernorm.weight", _H, Role.NORM, Layers.ALL),
    *_mlp(_LAYER + "mlp.", Role.DENSE_MLP, Layers.DENSE, "intermediate_size"),
    TensorSpec(_LAYER + "mlp.gate.weight", ("n_routed_experts", "hidden_size"), Role.ROUTER, Layers.MOE),
    TensorSpec(
        _LAYER + "mlp.gate.e_score_correction_bias",
        ("n_routed_experts",),
        Role.ROUTER_BIAS,
        Layers.MOE,
        dtype=DtypePolicy.KEEP_FP32,
    ),
    *_mlp(_EXPERT, Role.EXPERT, Layers.MOE, "moe_intermediate_size"),
    *_mlp(_LAYER + "mlp.shared_experts.", Role.SHARED_EXPERT, Layers.MOE, "shared_intermediate_size"),
    TensorSpec(_LAYER + "eh_proj.weight", ("hidden_size", "eh_size"), Role.MTP_PROJECTION, Layers.MTP),
    TensorSpec(_LAYER + "enorm.weight", _H, Role.NORM, Layers.MTP),
    TensorSpec(_LAYER + "hnorm.weight", _H, Role.NORM, Layers.MTP),
    TensorSpec(_LAYER + "shared_head.norm.weight", _H, Role.NORM, Layers.MTP),
    TensorSpec(_LAYER + "embed_tokens.weight", _VOCAB, Role.MTP_EMBEDDING, Layers.MTP, 0),
    TensorSpec(_LAYER + "shared_head.head.weight", _VOCAB, Role.MTP_HEAD, Layers.MTP, 0),
)
MTP_COPIES = frozenset({Role.MTP_EMBEDDING, Role.MTP_HEAD})

# what quantized formats hang on a module beside or instead of its `weight`
COMPANIONS = frozenset(
    {
        "weight_packed",
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_global_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_g_idx",
        "input_scale",
        "input_global_scale",
        "activation_scale",
    }
)
# scales of an FP8 KV cache; they say nothing about weights and have the same name in every layout
CACHE_SCALES = frozenset({"k_scale", "v_scale", "output_scale"})


def _pattern(name: str) -> str:
    return name.replace("{layer}", "#").replace("{expert}", "#")


_BY_PATTERN = {_pattern(spec.name): spec for spec in TABLE}
# compressed-tensors hangs the cache's scales on the attention module, others on the projection
_CACHE_PATTERNS = {
    _pattern(f"{_LAYER}self_attn.{x}_scale"): _pattern(f"{_LAYER}self_attn.{x}_proj.weight") for x in "kv"
}


def numbered(name: str) -> tuple[str, tuple[int, ...]]:
    """Return a name with `#` for each number in it, and the numbers; `007` is not how a layer is spelled."""
    parts = name.split(".")
    is_number = [part.isdecimal() and part.isascii() and str(int(part)) == part for part in parts]
    pattern = ".".join("#" if number else part for part, number in zip(parts, is_number, strict=True))
    return pattern, tuple(int(part) for part, number in zip(parts, is_number, strict=True) if number)


def parse(name: str) -> ParsedName:
    """Take a tensor name apart.

    Raises:
        InputError: no row of the table has this name.
    """
    pattern, numbers = numbered(name)
    module, _, last = pattern.rpartition(".")
    companion = last if last in COMPANIONS or last in CACHE_SCALES else None
    if companion:
        pattern = _CACHE_PATTERNS.get(pattern, f"{module}.weight")
    spec = _BY_PATTERN.get(pattern)
    if spec is None:
        raise unknown_name(name)
    return parsed_name(spec, numbers, companion)


def parsed_name(spec: TensorSpec, numbers: tuple[int, ...], companion: str | None) -> ParsedName:
    """Return a parsed name from the numbers that stood in it: layer, then expert."""
    layer, expert = (*numbers, None, None)[:2]
    return ParsedName(spec, layer, expert, companion)


def unknown_name(name: str) -> InputError:
    """Return the error for a name that no layout of any model has."""
    return InputError(
        f"tensor {name!r}", expected="a GLM-4 MoE tensor name", found="one that is not in the table of tensors"
    )


@dataclass(frozen=True)
class ModelSchema:
    """The table applied to one config.

    Args:
        config: the model.
        has_mtp: the checkpoint carries the MTP layer (when the config announces one).
        has_mtp_copies: the MTP layer brings its own embedding and head.
        has_router_bias: routers have a correction bias; pruned derivatives lack it everywhere.
    """

    config: Glm4MoeConfig
    has_mtp: bool
    has_mtp_copies: bool
    has_router_bias: bool = True

    @property
    def mtp_layer(self) -> int | None:
        """Index of the MTP layer, or None."""
        return self.config.num_hidden_layers if self.has_mtp else None

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by name, in the order of the official checkpoints: embedding, layers, head."""
        return {tensor.name: tensor for tensor in self._walk()}

    def layer_specs(self, layer: int) -> list[TensorSpec]:
        """Return the rows of the table that a layer has, in table order."""
        kinds = {Layers.ALL, Layers.DENSE if layer < self.config.first_k_dense_replace else Layers.MOE}
        if layer == self.mtp_layer:
            kinds = {Layers.ALL, Layers.MOE, Layers.MTP}
        return [spec for spec in TABLE if spec.layers in kinds and self._present(spec)]

    def tensor(self, role: Role, part: str, layer: int | None = None, expert: int | None = None) -> Tensor:
        """Return one tensor by what it is, e.g. (Role.EXPERT, "up_proj.weight", 3, 7).

        Raises:
            KeyError: the table or this model has no such tensor.
        """
        spec = _BY_ROLE_PART[role, part, layer is not None]
        return self.tensors[spec.name.format(layer=layer, expert=expert)]

    def locate(self, name: str) -> Tensor:
        """Return the tensor of this name, or of the weight whose companion it is.

        Raises:
            InputError: the model has no such tensor.
        """
        parsed = parse(name)
        own_name = parsed.spec.name.format(layer=parsed.layer, expert=parsed.expert)
        if own_name not in self.tensors:
            raise InputError(f"tensor {name!r}", expected="a tensor of this model", found="none in its config")
        return self.tensors[own_name]

    def _present(self, spec: TensorSpec) -> bool:
        if spec.role in MTP_COPIES:
            return self.has_mtp_copies
        if spec.role is Role.ROUTER_BIAS:
            return self.has_router_bias
        return spec.when is None or bool(getattr(self.config, spec.when))

    def _walk(self) -> Iterator[Tensor]:
        heads = [spec for spec in TABLE if spec.layers is Layers.NONE]
        yield from (self._tensor(spec) for spec in heads if spec.role is Role.EMBEDDING)
        for layer in range(self.config.num_hidden_layers + (1 if self.has_mtp else 0)):
            for specs in _runs(self.layer_specs(layer)):
                experts = range(self.config.n_routed_experts) if specs[0].role is Role.EXPERT else (None,)
                yield from (self._tensor(spec, layer, expert) for expert in experts for spec in specs)
        yield from (self._tensor(spec) for spec in heads if spec.role is not Role.EMBEDDING)

    def _tensor(self, spec: TensorSpec, layer: int | None = None, expert: int | None = None) -> Tensor:
        shape = tuple(getattr(self.config, size) for size in spec.shape)
        return Tensor(spec.name.format(layer=layer, expert=expert), shape, spec, layer, expert)


# the final norm and the norm of the MTP head end alike; having a layer tells them apart
_BY_ROLE_PART = {(spec.role, spec.part, spec.layers is not Layers.NONE): spec for spec in TABLE}
assert len(_BY_ROLE_PART) == len(TABLE)


def _runs(specs: list[TensorSpec]) -> Iterator[list[TensorSpec]]:
    """Split specs into runs of equal role, so that an expert's three weights stay together."""
    start = 0
    for index in range(1, len(specs) + 1):
        if index == len(specs) or specs[index].role is not specs[start].role:
            yield specs[start:index]
            start = index


def expand(config: Glm4MoeConfig, *, mtp: bool = True, mtp_copies: bool = True) -> ModelSchema:
    """Return the schema of a full checkpoint of this config.

    Args:
        config: the model.
        mtp: include the MTP layer, if the config announces one.
        mtp_copies: the MTP layer has its own embed_tokens and shared_head.head (4.5, Air, 4.7; not 4.6).
    """
    has_mtp = mtp and config.num_nextn_predict_layers > 0
    return ModelSchema(config, has_mtp, has_mtp and mtp_copies)


def schema_for_parsed(config: Glm4MoeConfig, parsed: Iterable[ParsedName]) -> ModelSchema:
    """Return the schema that fits the MTP style and the routers which these names show."""
    seen = {(name.spec.role, name.layer == config.num_hidden_layers) for name in parsed}
    mtp_roles = {role for role, is_mtp in seen if is_mtp}
    schema = expand(config, mtp=bool(mtp_roles), mtp_copies=bool(mtp_roles & MTP_COPIES))
    roles = {role for role, _ in seen}
    # a model without any router has no bias either, and nothing is missing
    return replace(schema, has_router_bias=Role.ROUTER_BIAS in roles or Role.ROUTER not in roles)
