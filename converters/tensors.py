"""What the table of tensors is made of: its rows, the tensors they stand for, and what a tensor is for.

Others import these from `converters.schema`, where the table is.
"""

from dataclasses import dataclass
from enum import Enum, StrEnum
from math import prod


class Role(StrEnum):
    """What a tensor is for; policy, sharding, loading and reports key on this."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"
    QK_NORM = "qk_norm"
    ATTENTION = "attention"
    ATTENTION_BIAS = "attention_bias"
    DENSE_MLP = "dense_mlp"
    ROUTER = "router"
    ROUTER_BIAS = "router_bias"
    EXPERT = "expert"
    SHARED_EXPERT = "shared_expert"
    MTP_PROJECTION = "mtp_projection"
    MTP_EMBEDDING = "mtp_embedding"
    MTP_HEAD = "mtp_head"


class Layers(Enum):
    """Which layers have the tensor. The MTP layer has everything a MoE layer has, and its own rows."""

    NONE = "none"
    ALL = "all"
    DENSE = "dense"
    MOE = "moe"
    MTP = "mtp"


class DtypePolicy(Enum):
    """What a conversion may do to the values."""

    QUANTIZABLE = "quantizable"  # a GEMM weight: cast or quantized on request
    KEEP = "keep"  # norms, biases, embeddings, heads, router: cast only by --dtype
    KEEP_FP32 = "keep_fp32"  # e_score_correction_bias: never below fp32


@dataclass(frozen=True, slots=True)
class Fuse:
    """Membership in a group of weights that engines multiply as one; members share per-tensor scales."""

    group: str
    position: int


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One row of the table. `shape` holds names of Glm4MoeConfig sizes; `tp_dim` is the dim tensor parallelism cuts."""

    name: str
    shape: tuple[str, ...]
    role: Role
    layers: Layers
    tp_dim: int | None = None
    fuse: Fuse | None = None
    dtype: DtypePolicy = DtypePolicy.KEEP
    when: str | None = None

    @property
    def part(self) -> str:
        """Last module and parameter name, e.g. `q_proj.weight`; unique within a role."""
        return ".".join(self.name.rsplit(".", 2)[-2:])


@dataclass(frozen=True, slots=True)
class Tensor:
    """A concrete tensor of one model: the spec with its layer, expert and shape filled in."""

    name: str
    shape: tuple[int, ...]
    spec: TensorSpec
    layer: int | None = None
    expert: int | None = None

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def module(self) -> str:
        """Name without its last part: what quantization configs call the module."""
        return self.name.rsplit(".", 1)[0]


@dataclass(frozen=True, slots=True)
class ParsedName:
    """A name taken apart. `companion` is the quantization suffix when the name is not the weight itself."""

    spec: TensorSpec
    layer: int | None
    expert: int | None
    companion: str | None = None
